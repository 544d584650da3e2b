"""Training on a real Slurm, under everything that ends a start of a job: the result is the uninterrupted run's."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.recipes import dump_recipe
from tests.pretrain.tiny_runs import metrics, tiny_recipe
from tests.slurm.cluster import ENDED, Cluster
from tests.slurm.conftest import SMALL, Checkout, make_checkout

pytestmark = pytest.mark.slurm

TWO_NODES = ("--nodes=2", *SMALL[1:])
STEPS = 390
VOLATILE = ("elapsed_seconds", "tokens_per_second", "tflops_per_second", "memory_gib")


@pytest.fixture(scope="module")
def checkout(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Checkout:
    made = make_checkout(cluster, tmp_path_factory.mktemp("training") / "checkout")
    for name in ("straight", "stormy"):
        recipe = tiny_recipe(
            "base",
            Path("runs") / name,
            tiny_blend,
            data={"loader_workers": 1},
            training={"steps": STEPS, "micro_batch_size": 1},
            validation={"interval_steps": STEPS},
            checkpoint={"interval_steps": 25},
        )
        (made.root / f"{name}.yaml").write_text(dump_recipe(recipe))
    return made


@pytest.fixture(scope="module")
def straight(cluster: Cluster, checkout: Checkout) -> dict[str, str]:
    """The facts of a job on two nodes that nothing disturbs."""
    job = checkout.submit("pretrain_idm.sh", options=TWO_NODES, IDM_RECIPE="straight.yaml")
    return cluster.wait_for_end(job)[0] | {"log": checkout.log(job)}


@pytest.fixture(scope="module")
def stormy(cluster: Cluster, checkout: Checkout) -> dict[str, str]:
    """The facts of the same job that is told that its time is up, loses a node, and is preempted."""
    job = checkout.submit("pretrain_idm.sh", options=TWO_NODES, IDM_RECIPE="stormy.yaml")
    run = checkout.root / "runs/stormy"

    def wait_for_steps() -> None:
        before = _last_step(run)

        def has_trained() -> bool:
            assert cluster.facts(job)["JobState"] not in ENDED, checkout.log(job)
            return _last_step(run) >= before + 40

        cluster.wait_until("training", has_trained, seconds=300)

    wait_for_steps()
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for_restart(job, 1)
    wait_for_steps()
    cluster.lose_and_reboot("n2")
    cluster.wait_for_restart(job, 2)
    cluster.resume("n2")
    wait_for_steps()
    urgent = cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"),
        "--wrap=true",
        cwd=checkout.root,
    ).strip()
    cluster.wait_for_end(urgent)
    return cluster.wait_for_end(job)[0] | {"log": checkout.log(job)}


def _last_step(run: Path) -> int:
    return metrics(run)[-1]["step"] if (run / "metrics.jsonl").exists() else 0


def _figures(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in VOLATILE}
        for split in ("train", "validation")
        for line in metrics(run, split)
    ]


def test_an_undisturbed_job_completes(straight: dict[str, str]) -> None:
    assert (straight["JobState"], straight["Restarts"]) == ("COMPLETED", "0"), straight["log"]
    assert "2 node(s) x 1 rank(s)" in straight["log"]


def test_the_job_goes_on_after_each_end(stormy: dict[str, str], checkout: Checkout) -> None:
    """Time limit, lost node, preemption: three restarts, each further on than the one before."""
    assert (stormy["JobState"], stormy["Restarts"]) == ("COMPLETED", "3"), stormy["log"]
    lines = (checkout.root / "runs/stormy/history.jsonl").read_text().splitlines()
    starts = [event for event in map(json.loads, lines) if event["event"] == "start"]
    steps = [start["from_step"] for start in starts]
    assert len(steps) == 4
    assert steps[0] == 0 and steps == sorted(set(steps)) and steps[-1] < STEPS
    # All but the lost node came with time to save.
    assert [starts[number]["lost_steps"] for number in (1, 3)] == [0, 0]


def test_the_result_is_that_of_the_undisturbed_job(
    straight: dict[str, str], stormy: dict[str, str], checkout: Checkout
) -> None:
    """Every logged figure of every step, to the last bit."""
    expected, found = (_figures(checkout.root / "runs" / name) for name in ("straight", "stormy"))
    assert len(expected) >= STEPS
    assert found == expected
