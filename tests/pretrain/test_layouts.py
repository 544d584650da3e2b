"""One rank is the reference: every stage trains alike under tensor, sequence, pipeline and data parallelism."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.forked_ranks import start_program
from tests.pretrain.layouts import (
    FAULTS,
    LAYOUTS,
    OF_ALL_STAGES,
    SAVED,
    STEPS,
    TRAINED,
    Layout,
    layout_recipe,
)
from tests.pretrain.tiny_runs import STARTS, series, train_in_process

LOSS_TOLERANCE, NORM_TOLERANCE = 2e-6, 5e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """Folder of runs: one_rank/<stage> and, from one launch, <layout or fault>/<stage>."""
    folder = tmp_path_factory.mktemp("layouts")
    reference = folder / "one_rank"
    for stage in STARTS:
        train_in_process(layout_recipe(Layout(), stage, reference / stage, tiny_blend, reference))
    start_program("tests.pretrain.layouts_worker", tiny_blend, reference, folder)
    return folder


def largest_difference(runs: Path, layout: str, stage: str, name: str, split: str = "train") -> float:
    """Largest relative difference of a metric from the one-rank run."""
    expected, found = (
        series(runs / "one_rank" / stage, name, split),
        series(runs / layout / stage, name, split),
    )
    assert len(expected) == len(found) > 0
    return float(np.max(np.abs(found - expected) / np.abs(expected)))


def test_every_two_sizes_meet_in_every_stage() -> None:
    """All three only in the IDM."""
    assert len(TRAINED) == (3 * 3 * 2 - 1) + 2 * len(OF_ALL_STAGES)
    for stage in STARTS:
        sizes = {
            ((layout.tensor, layout.sequence), layout.pipeline, layout.data)
            for layout in LAYOUTS.values()
            if stage in layout.stages
        }
        for one, other in itertools.combinations(range(3), 2):
            choices = [{size[axis] for size in sizes} for axis in (one, other)]
            assert {(size[one], size[other]) for size in sizes} == set(itertools.product(*choices))


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "layout"), TRAINED)
def test_every_layout_trains_as_one_rank(runs: Path, layout: str, stage: str) -> None:
    """Losses of every step, gradient norms and validation losses agree to fp32 rounding."""
    assert largest_difference(runs, layout, stage, "loss") < LOSS_TOLERANCE
    assert largest_difference(runs, layout, stage, "grad_norm") < NORM_TOLERANCE
    assert largest_difference(runs, layout, stage, "loss", "validation") < LOSS_TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_uses_the_same_actions(runs: Path, layout: str) -> None:
    """The action shares are those of all ranks together, and the noise does not depend on the rank."""
    expected, found = (
        series(runs / "one_rank" / "idm", "action_fractions"),
        series(runs / layout / "idm", "action_fractions"),
    )
    assert np.abs(found - expected).max() < 0.01


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STARTS)
def test_one_rank_goes_on_where_another_layout_stopped(
    runs: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Weights and optimizer state pass between layouts; without the latter, the twin, the run takes another way."""
    ends = {}
    for name, start in (("own", "one_rank"), ("other", SAVED), ("twin", SAVED)):
        run = runs / f"resumed_{name}" / stage
        shutil.copytree(runs / start / stage, run)
        with monkeypatch.context() as patch:
            if name == "twin":
                patch.setattr("pretrain.checkpoints.checkpointing.load_optimizer", lambda *_: None)
            recipe = layout_recipe(Layout(), stage, run, tiny_blend, runs / "one_rank", steps=STEPS + 2)
            train_in_process(recipe, resume=True)
        ends[name] = series(run, "loss")[STEPS:]
    assert np.abs(ends["other"] / ends["own"] - 1).max() < LOSS_TOLERANCE
    assert np.abs(ends["twin"] / ends["own"] - 1).max() > 20 * LOSS_TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_layout_shows(runs: Path, fault: str) -> None:
    """Each planted mistake is far outside of a tolerance above."""
    (stage,) = FAULTS[fault].stages
    excess = max(
        largest_difference(runs, fault, stage, "loss") / LOSS_TOLERANCE,
        largest_difference(runs, fault, stage, "grad_norm") / NORM_TOLERANCE,
    )
    assert excess > 20
