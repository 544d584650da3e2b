"""What a job does at each end of its step, on a real Slurm: go on, start again, or fail for good.

The trainer's place is taken by a few lines of shell that end as they are told; Slurm and the scripts are the real ones.
"""

import sys

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SMALL, Checkout, make_checkout

pytestmark = pytest.mark.slurm

# Ends with the exit code that EXIT_CODES names for this start of the job; "listen": with 75, when it gets
# USR1; "unlaunched": with 1, before it has made the folder of its logs. As pretrain.status it ends with PROGRESS, and
# asked for a recipe's run folder it names one.
TRAINER = """\
#!/usr/bin/env bash
case $* in
  *pretrain.status*) exit "$PROGRESS" ;;
  -c*) echo runs/stand_in && exit ;;
esac
read -ra codes <<<"$EXIT_CODES"
code=${codes[${SLURM_RESTART_COUNT:-0}]}
[[ $code == unlaunched ]] && exit 1
mkdir -p "runs/stand_in/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
echo "begins, to end with $code"
[[ $code != listen ]] || exec "$REAL_PYTHON" -c "$LISTEN"
exit "$code"
"""
LISTEN = """\
import signal, sys, time
time.sleep(2)
signal.signal(signal.SIGUSR1, lambda *_: (print("heard USR1"), sys.exit(75)))
time.sleep(60)
"""
FINAL_CODES = ("2", "3", "4", "5", "6", "127")
PASSING_CODES = ("75", "7", "1", "137")
# Name -> exit codes of the job's starts, whether pretrain.status sees progress (0: yes), options of sbatch.
JOBS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "done": ("0", "1", SMALL),
    **{f"again {code}": (f"{code} 0", "1", SMALL) for code in PASSING_CODES},
    "no progress": ("75 139 0", "1", SMALL),
    "progress": ("75 139 0", "0", SMALL),
    "never launched": ("unlaunched unlaunched 0", "0", SMALL),
    "refused": ("75 0", "0", (*SMALL, "--no-requeue")),
    "two nodes": ("listen 0", "1", ("--nodes=2", *SMALL[1:])),
    "time limit": ("listen 0", "1", SMALL),
    "cancelled": ("listen 0", "1", SMALL),
    "deaf": ("listen 0", "1", SMALL),
    **{f"final {code}": (f"{code} 0", "0", SMALL) for code in FINAL_CODES},
}


@pytest.fixture(scope="module")
def checkout(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Job scripts that allow one restart without looking for progress: three take long."""
    folder = tmp_path_factory.mktemp("requeue")
    trainer = folder / "python"
    trainer.write_text(TRAINER)
    trainer.chmod(0o755)
    made = make_checkout(
        cluster, folder / "checkout", PYTHON=str(trainer), REAL_PYTHON=sys.executable, LISTEN=LISTEN
    )
    _change(made, "job.sh", "FREE_RESTARTS=3\n", "FREE_RESTARTS=1\n")
    _change(made, "launch.sh", "PROGRESS_STARTS=3\n", "PROGRESS_STARTS=2\n")
    return made


@pytest.fixture(scope="module")
def deaf_checkout(cluster: Cluster, checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The fault twin: its scripts do not handle signals."""
    faulty = make_checkout(cluster, tmp_path_factory.mktemp("deaf") / "checkout", **checkout.environment)
    _change(faulty, "job.sh", "\ntrap stop_step USR1\n", "\n")
    return faulty


def _change(checkout: Checkout, name: str, text: str, to: str) -> None:
    script = checkout.root / "slurm" / name
    before = script.read_text()
    assert before.count(text) == 1
    script.write_text(before.replace(text, to))


@pytest.fixture(scope="module")
def ended(cluster: Cluster, checkout: Checkout, deaf_checkout: Checkout) -> dict[str, dict[str, str]]:
    """The facts of all jobs after their ends; they run at the same time, since each waits most of its time."""
    origins = {name: deaf_checkout if name == "deaf" else checkout for name in JOBS}
    jobs = {
        name: origins[name].submit(
            "pretrain_idm.sh", options=options, EXIT_CODES=exit_codes, PROGRESS=progress
        )
        for name, (exit_codes, progress, options) in JOBS.items()
    }
    array = _submit_array(checkout)
    for name, (exit_codes, _, _) in JOBS.items():
        if exit_codes.startswith("listen"):
            _wait_for_step(origins[name], jobs[name])
            signal = () if name == "cancelled" else ("--batch", "--signal=USR1")
            cluster.run("scancel", *signal, jobs[name])
    tasks = {f"task {number}": f"{array}_{number}" for number in range(3)}
    facts = dict(zip([*jobs, *tasks], cluster.wait_for_end(*jobs.values(), *tasks.values()), strict=True))
    for name, job in jobs.items():
        facts[name]["log"] = origins[name].log(job)
    return facts


def _wait_for_step(checkout: Checkout, job: str) -> None:
    checkout.cluster.wait_until(f"the step of job {job}", lambda: "begins" in checkout.log(job))


def _submit_array(checkout: Checkout) -> str:
    """Three tasks, the last of which crashes once."""
    script = checkout.root.parent / "last_task_crashes_once"
    script.write_text(
        "#!/usr/bin/env bash\nexit $((SLURM_ARRAY_TASK_ID == 2 && ! ${SLURM_RESTART_COUNT:-0}))\n"
    )
    script.chmod(0o755)
    return checkout.submit("blend.sh", options=("--array=0-2", "--cpus-per-task=1"), PYTHON=str(script))


def _outcome(facts: dict[str, str]) -> tuple[str, int, str]:
    return facts["JobState"], int(facts["Restarts"]), facts["ExitCode"]


def test_a_finished_step_ends_the_job(ended: dict[str, dict[str, str]]) -> None:
    assert _outcome(ended["done"]) == ("COMPLETED", 0, "0:0")


@pytest.mark.parametrize("code", PASSING_CODES)
def test_stops_hangs_and_crashes_start_again(ended: dict[str, dict[str, str]], code: str) -> None:
    assert _outcome(ended[f"again {code}"]) == ("COMPLETED", 1, "0:0")


def test_a_run_that_gets_no_further_fails(ended: dict[str, dict[str, str]]) -> None:
    """With the code of its last start; one that does get further may go on for ever."""
    assert _outcome(ended["no progress"]) == ("FAILED", 1, "139:0")
    assert _outcome(ended["never launched"]) == ("FAILED", 1, "1:0")
    assert _outcome(ended["progress"]) == ("COMPLETED", 2, "0:0")


@pytest.mark.parametrize("code", FINAL_CODES)
def test_what_must_be_put_right_first_is_not_requeued(ended: dict[str, dict[str, str]], code: str) -> None:
    assert _outcome(ended[f"final {code}"]) == ("FAILED", 0, f"{code}:0")


def test_a_refused_requeue_fails_the_job(ended: dict[str, dict[str, str]]) -> None:
    assert _outcome(ended["refused"]) == ("FAILED", 0, "75:0")
    assert "submit it again to go on" in ended["refused"]["log"]


@pytest.mark.parametrize("name", ["time limit", "two nodes"])
def test_usr1_reaches_every_node_and_requeues(ended: dict[str, dict[str, str]], name: str) -> None:
    """Though it comes before the step listens."""
    assert _outcome(ended[name]) == ("COMPLETED", 1, "0:0")
    assert ended[name]["log"].count("heard USR1") == (2 if name == "two nodes" else 1)


def test_without_the_trap_usr1_ends_the_job(ended: dict[str, dict[str, str]]) -> None:
    assert _outcome(ended["deaf"])[:2] == ("FAILED", 0)


def test_a_cancelled_job_stays_cancelled(ended: dict[str, dict[str, str]]) -> None:
    assert _outcome(ended["cancelled"])[:2] == ("CANCELLED", 0)
    assert "it is not requeued" in ended["cancelled"]["log"]


def test_one_task_of_an_array_is_requeued_alone(ended: dict[str, dict[str, str]]) -> None:
    """The last task has the number of the whole array, so that a requeue by number would take them all."""
    outcomes = [_outcome(ended[f"task {number}"]) for number in range(3)]
    assert outcomes == [("COMPLETED", restarts, "0:0") for restarts in (0, 0, 1)]
