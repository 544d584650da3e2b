"""One rank is the reference: two ranks, as tensor or as data parallel, train every stage alike."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pretrain.layouts_worker import ACTIONS
from tests.pretrain.tiny_runs import STARTS, series, tiny_recipe, train_in_process

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("layouts_worker.py")
LAYOUTS = ("tensor_parallel", "data_parallel")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """Folder of runs: one_rank/<stage> and, from one launch of two ranks, <layout>/<stage>."""
    folder = tmp_path_factory.mktemp("layouts")
    reference = folder / "one_rank"
    for stage, start in STARTS.items():
        train_in_process(
            tiny_recipe(
                stage, reference / stage, tiny_blend, reference / start if start else None, actions=ACTIONS
            )
        )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, str(WORKER), str(tiny_blend), str(reference), str(folder)],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    return folder


def largest_difference(runs: Path, layout: str, stage: str, name: str, split: str = "train") -> float:
    """Largest relative difference of a metric from the one-rank run."""
    expected, found = (
        series(runs / "one_rank" / stage, name, split),
        series(runs / layout / stage, name, split),
    )
    return float(np.max(np.abs(found - expected) / np.abs(expected)))


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", STARTS)
def test_two_ranks_train_as_one(runs: Path, layout: str, stage: str) -> None:
    """Losses of every step, gradient norms and validation losses agree to fp32 rounding."""
    assert largest_difference(runs, layout, stage, "loss") < 2e-5
    assert largest_difference(runs, layout, stage, "grad_norm") < 5e-5
    assert largest_difference(runs, layout, stage, "loss", "validation") < 2e-5


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_use_the_same_actions(runs: Path, layout: str) -> None:
    """The action shares are those of all ranks together, and the noise does not depend on the rank."""
    expected, found = (
        series(runs / "one_rank" / "idm", "action_fractions"),
        series(runs / layout / "idm", "action_fractions"),
    )
    assert np.abs(found - expected).max() < 0.01


@pytest.mark.distributed
@pytest.mark.parametrize("fault", ["fault_noise", "fault_gradient"])
def test_a_fault_in_the_layout_shows(runs: Path, fault: str) -> None:
    """Noise by rank, or a gradient not summed over tensor-parallel ranks, is far outside the tolerance."""
    assert largest_difference(runs, fault, "idm", "loss") > 4e-5
    assert largest_difference(runs, fault, "idm", "grad_norm") > 1e-3
