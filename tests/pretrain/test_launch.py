"""The launcher starts ranks, passes signals on, keeps each rank's words, and ends with the most telling exit code."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.errors import UserError
from pretrain.launch import launch
from pretrain.launching.launch_options import parse_options
from pretrain.launching.rank_exits import RankEnd, describe_end, most_telling
from pretrain.recipes import dump_recipe
from pretrain.run_record.run_starts import read_starts
from tests.pretrain.tiny_runs import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
# What the ranks run in place of training: CASE says how it ends.
RANKS = """
import os, signal, sys, time
case, rank = os.environ["CASE"], int(os.environ["RANK"])
print(f"rank {rank} of {os.environ['WORLD_SIZE']}: {' '.join(sys.argv[1:])}")
print(f"rank {rank} on stderr", file=sys.stderr)
asked = []
if case == "saves":
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
if case == "deaf":
    signal.signal(signal.SIGTERM, lambda *_: print("deaf to SIGTERM"))
if case == "killed":
    last_words = sys.argv[-1] + "/last_words"
    if rank == 1:
        open(last_words, "w")
        os.kill(os.getpid(), signal.SIGKILL)
    while not os.path.exists(last_words):
        time.sleep(0.02)
    raise ConnectionError("a peer is gone")
print("bar 1\\rbar 2\\r", end="")
print("ready")
while case != "done" and not asked:
    time.sleep(0.02)
if asked:
    print("saving")
    while len(asked) < 2:
        time.sleep(0.02)
    print("saved after", ", ".join(asked))
    sys.exit(75)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipe.yaml, of a run in run/, and ranks_of_the_test.py."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "ranks_of_the_test.py").write_text(RANKS)
    recipe = tiny_recipe("base", folder / "run", folder / "data")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder


def arguments_of(folder: Path, case: str, *options: str) -> list[str]:
    """For a launch in a run folder of the case's own."""
    return [*options, str(folder / "recipe.yaml"), "--run-folder", str(folder / case)]


@pytest.fixture
def case(folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The case that the test names, told to the ranks."""
    for name, value in {"CASE": request.param, "PYTHONPATH": f"{folder}:{ROOT}", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    return str(request.param)


def launch_apart(arguments: list[str]) -> subprocess.Popen[bytes]:
    """A launcher that can be signalled."""
    code = (
        f"import sys; from pretrain.launch import launch; sys.exit(launch({arguments}, 'ranks_of_the_test'))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


@pytest.fixture
def started(folder: Path, case: str) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks of the case, once the first is ready."""
    launcher = launch_apart(arguments_of(folder, case, "--ranks-per-node", "2"))
    wait_for(launcher, b"ready")
    yield launcher
    launcher.kill()
    launcher.communicate()


def wait_for(launcher: subprocess.Popen[bytes], words: bytes) -> None:
    """Read on until a line has `words`."""
    assert launcher.stdout is not None
    assert any(words in line for line in launcher.stdout)


def texts(launcher: subprocess.Popen[bytes]) -> tuple[str, str]:
    """What it still writes to stdout and stderr, until its end."""
    output, errors = launcher.communicate(timeout=60)
    return output.decode(), errors.decode()


@pytest.mark.parametrize("case", ["done"], indirect=True)
def test_each_rank_has_a_log_and_the_first_is_shown_as_it_is(
    folder: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both streams; carriage returns stay, so that a bar can redraw itself."""
    assert launch(arguments_of(folder, case, "--ranks-per-node", "2"), "ranks_of_the_test") == 0
    shown, errors = capfd.readouterr()
    assert errors == ""
    logs = folder / "done" / "logs" / "7.0"
    for rank in (0, 1):
        log = (logs / f"rank_{rank:05d}.log").read_bytes().decode()
        assert f"rank {rank} of 2: {folder / 'recipe.yaml'} --run-folder" in log
        assert f"rank {rank} on stderr" in log
        assert "bar 1\rbar 2\rready\n" in log
    assert shown == (logs / "rank_00000.log").read_bytes().decode()
    (noted,) = read_starts(folder / "done")
    assert (noted.job, noted.exit_code, noted.saved) == ("7.0", 0, 0)


@pytest.mark.parametrize("case", ["killed"], indirect=True)
def test_a_killed_rank_tells_more_than_its_failing_peers(
    folder: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line, and no page of torch's."""
    assert launch(arguments_of(folder, case, "--ranks-per-node", "2"), "ranks_of_the_test") == 137
    errors = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL, exit code 137; its log: " in errors
    assert len(errors.splitlines()) == 1
    assert read_starts(folder / "killed")[-1].exit_code == 137


@pytest.mark.parametrize("case", ["saves"], indirect=True)
def test_ranks_that_are_asked_to_stop_get_the_time_to_save(started: subprocess.Popen[bytes]) -> None:
    """However often they are asked."""
    started.send_signal(signal.SIGUSR1)
    wait_for(started, b"saving")
    started.send_signal(signal.SIGTERM)
    shown, errors = texts(started)
    assert started.returncode == 75
    assert "saved after SIGUSR1, SIGTERM" in shown
    assert "exit code 75" in errors


@pytest.mark.parametrize("case", ["deaf"], indirect=True)
def test_the_first_interrupt_is_a_sigterm_and_the_second_ends_at_once(
    started: subprocess.Popen[bytes],
) -> None:
    started.send_signal(signal.SIGINT)
    wait_for(started, b"deaf to SIGTERM")
    started.send_signal(signal.SIGINT)
    texts(started)
    assert started.returncode == 130


@pytest.mark.parametrize("case", ["early"], indirect=True)
def test_ranks_that_cannot_save_yet_end_as_stopped(started: subprocess.Popen[bytes]) -> None:
    """Those have no handler, as before training has begun."""
    started.send_signal(signal.SIGUSR1)
    texts(started)
    assert started.returncode == 75


@pytest.mark.parametrize("case", ["deaf"], indirect=True)
def test_no_rank_outlives_a_killed_launcher(started: subprocess.Popen[bytes]) -> None:
    ranks = psutil.Process(started.pid).children()
    assert len(ranks) == 2
    started.kill()
    gone, alive = psutil.wait_procs(ranks, timeout=20)
    assert (len(gone), alive) == (2, [])


def test_a_wrong_recipe_is_told_once_and_starts_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(folder / "recipe.yaml")
    run = ["--run-folder", str(folder / "never")]
    with pytest.raises(UserError, match="stepz"):
        launch([recipe, *run, "--training.stepz", "3"])
    with pytest.raises(UserError, match="3 data-parallel ranks"):
        launch(["--ranks-per-node", "3", recipe, *run])
    with pytest.raises(UserError, match="no such recipe"):
        launch(["nowhere.yaml"])
    with pytest.raises(UserError, match="exclude each other"):
        launch([recipe, *run, "--resume", "--overwrite"])
    with pytest.raises(SystemExit) as helped:
        launch([recipe, "--help"])
    assert helped.value.code == 0
    assert "--training.steps" in capsys.readouterr().out
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ranks-per-node", "0"], "at least 1"),
        (["--nodes", "2"], "HOST:PORT"),
        (["--nodes", "2", "--master", "here:0"], "HOST:PORT"),
        (["--nodes", "2", "--node-rank", "2", "--master", "here:1"], "node ranks go from 0"),
        (["--nodes", "two"], "invalid int value"),
        (["--rank", "2"], "unrecognized|required|--rank"),
    ],
)
def test_options_that_do_not_fit_are_told_in_a_line(arguments: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as refusal:
        launch([*arguments, "recipe.yaml"])
    assert "\n" not in str(refusal.value)


def test_options_end_at_the_recipe() -> None:
    layout, training = parse_options(["--ranks-per-node", "4", "r.yaml", "--resume", "--nodes", "3"], None)
    assert (layout.ranks_per_node, layout.nodes) == (4, 1)
    assert training == ["r.yaml", "--resume", "--nodes", "3"]


@pytest.mark.parametrize(
    ("return_codes", "stop_requested", "end"),
    [
        ({0: 1, 1: -9}, False, RankEnd(1, 137)),  # killed, and its peer lost it
        ({0: 6, 1: -9}, False, RankEnd(0, 6)),  # found out; its peer was left over
        ({0: -9, 1: 7}, False, RankEnd(1, 7)),  # a hang, of which one rank could not tell
        ({0: -6, 1: 1}, False, RankEnd(0, 134)),
        ({0: 75, 1: 75}, True, RankEnd(0, 75)),
        ({0: 75, 1: -15}, False, RankEnd(0, 75)),
        ({0: 1, 1: -15}, False, RankEnd(0, 1)),  # crashed; its peer was ended
        ({0: 1, 1: -10}, True, RankEnd(1, 75)),  # asked to stop before it could save
        ({0: -15}, False, RankEnd(0, 143)),
        ({2: 1, 3: 1}, False, RankEnd(2, 1)),
    ],
)
def test_the_most_telling_end(return_codes: dict[int, int], stop_requested: bool, end: RankEnd) -> None:
    assert most_telling(return_codes, stop_requested) == end


def test_an_end_in_words() -> None:
    assert describe_end(RankEnd(3, 139)) == "rank 3 was killed by SIGSEGV"
    assert describe_end(RankEnd(0, 3)) == "rank 0 ended with exit code 3"
    assert describe_end(RankEnd(0, 255)) == "rank 0 ended with exit code 255"


@pytest.mark.parametrize("case", ["done"], indirect=True)
def test_two_nodes_meet(folder: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Each with its own launcher; ranks are numbered over both, and only the first node's first is shown."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        nodes = ("--nodes", "2", "--master", f"127.0.0.1:{server.getsockname()[1]}", "--node-rank")
    first = launch_apart(arguments_of(folder, "two_nodes", *nodes, "0"))
    assert launch(arguments_of(folder, "two_nodes", *nodes, "1"), "ranks_of_the_test") == 0
    shown, _ = texts(first)
    assert first.returncode == 0
    assert "rank 0 of 2" in shown
    assert capfd.readouterr().out == ""
    logs = folder / "two_nodes" / "logs" / "7.0"
    assert "rank 1 of 2" in (logs / "rank_00001.log").read_text()
    lines = [json.loads(line) for line in (logs / "launches.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["launch", "exit"]
