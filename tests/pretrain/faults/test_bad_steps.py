"""Spikes are known by what was usual of late; bad steps are skipped, rolled back or end the run, and are counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import TrainingError
from pretrain.checkpoints.checkpoint_folder import read_description, resolve_checkpoint
from pretrain.config import FaultConfig
from pretrain.faults.bad_steps import FEWEST_STEPS, BadStepError, BadSteps, RollBackError
from pretrain.metrics import StepMeans
from pretrain.run_record.history import read_history
from pretrain.train_loop import TrainLoop
from tests.pretrain.tiny_runs import metrics, saved_tensors, tiny_recipe, train_in_process


@given(
    losses=st.lists(st.floats(0.1, 10), min_size=FEWEST_STEPS, max_size=200),
    factor=st.floats(1.1, 10),
    loss=st.floats(0.1, 200),
)
def test_a_spike_is_told_from_the_median_of_the_last_64(
    losses: list[float], factor: float, loss: float
) -> None:
    bad_steps = BadSteps(FaultConfig(spike_factor=factor))
    for value in losses:
        bad_steps.count_good(value)
    if loss > factor * float(np.median(losses[-64:])):
        with pytest.raises(BadStepError, match="times the median of the last"):
            bad_steps.refuse_spike(loss)
    else:
        bad_steps.refuse_spike(loss)


def test_no_spike_is_seen_without_a_factor_or_a_past() -> None:
    BadSteps(FaultConfig(), recent_losses=[1.0] * 64).refuse_spike(1e9)
    BadSteps(FaultConfig(spike_factor=2), recent_losses=[1.0] * (FEWEST_STEPS - 1)).refuse_spike(1e9)
    with pytest.raises(BadStepError):
        BadSteps(FaultConfig(spike_factor=2), recent_losses=[1.0] * FEWEST_STEPS).refuse_spike(1e9)


def test_what_follows_is_the_recipes_choice() -> None:
    error = BadStepError("loss nan")
    with pytest.raises(
        TrainingError, match=r"step 7: loss nan; the optimizer was not moved; .*faults.bad_step"
    ):
        BadSteps(FaultConfig(bad_step="stop")).count_bad(7, 70, error)
    with pytest.raises(RollBackError) as rolled_back:
        BadSteps(FaultConfig(bad_step="roll_back")).count_bad(7, 70, error)
    assert (rolled_back.value.step, rolled_back.value.next_sample) == (7, 70)
    skipping = BadSteps(FaultConfig(bad_step="skip", max_bad_steps=2))
    assert skipping.count_bad(7, 70, error) == "step 7: loss nan; skipped (1 in a row)"
    skipping.count_good(1.0)
    for step in (9, 10):
        skipping.count_bad(step, 10 * step, error)
    with pytest.raises(TrainingError, match=r"bad step 3 in a row, faults.max_bad_steps allows 2"):
        skipping.count_bad(11, 110, error)
    assert skipping.skipped == 3


def change_losses(patch: pytest.MonkeyPatch, change: Callable[[int, float], float]) -> None:
    """Have the trainer see `change(next sample, loss)` instead of each training step's loss."""
    whole = TrainLoop.train_step
    read: dict[TrainLoop, int] = {}

    def step(self: TrainLoop, batches: Any, means: Any) -> Any:
        reduce = means.reduce_step
        sample = read[self] = read.get(self, self.begin.next_sample) + 8

        def changed(micro_batches: Any) -> StepMeans:
            report = reduce(micro_batches)
            return report._replace(means=report.means | {"loss": change(sample, report.means["loss"])})

        means.reduce_step = changed
        try:
            return whole(self, batches, means)
        finally:
            del means.reduce_step

    patch.setattr(TrainLoop, "train_step", step)


def recipe(run: Path, data: Path, steps: int, **faults: Any) -> Any:
    """Steps of eight samples."""
    return tiny_recipe(
        "base",
        run,
        data,
        training={"steps": steps},
        faults={"spike_factor": 3.0, **faults},
        checkpoint={"interval_steps": 9},
        validation={"interval_steps": 100},
    )


def test_a_spike_is_rolled_back_and_its_data_left_out(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 20 spikes: back to step 18, and on with the samples after it; so does a run resumed after that."""
    run = tmp_path / "run"
    change_losses(monkeypatch, lambda sample, loss: loss * 10 if sample == 20 * 8 else loss)
    train_in_process(recipe(run, tiny_blend, 24, bad_step="roll_back"))
    events = {e["event"]: e["facts"] for e in read_history(run)}
    assert events["rolled_back"] == {"step": 20, "to_step": 18}
    assert events["bad_step"]["action"] == "rolled_back"
    assert [line["step"] for line in metrics(run)] == list(range(1, 25))
    assert read_description(resolve_checkpoint(run)).consumed_samples == 26 * 8
    twice = tmp_path / "twice"
    for steps in (22, 24):
        train_in_process(recipe(twice, tiny_blend, steps, bad_step="roll_back"), resume=True)
    ours, expected = saved_tensors(twice), saved_tensors(run)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
    losses = [[line["loss"] for line in metrics(r)] for r in (run, twice)]
    assert losses[0] == losses[1]


def test_a_spike_that_stays_ends_the_run(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the data after step 19, the loss spikes: three roll-backs, then the end."""
    change_losses(monkeypatch, lambda sample, loss: loss * 10 if sample > 19 * 8 else loss)
    with pytest.raises(
        TrainingError, match=r"roll-back 3 without a new checkpoint, faults.max_bad_steps allows 2"
    ):
        train_in_process(recipe(tmp_path / "run", tiny_blend, 24, bad_step="roll_back", max_bad_steps=2))
    kinds = [event["event"] for event in read_history(tmp_path / "run")]
    assert kinds.count("rolled_back") == 2
    assert kinds.count("bad_step") == 3


def test_counts_and_losses_of_late_survive_a_resume(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spikes at steps 18 and 20, skipped, with a stop between them: the second is still known for one."""
    spikes = {18 * 8, 20 * 8}
    change_losses(monkeypatch, lambda sample, loss: loss * 10 if sample in spikes else loss)
    for name, stops in (("straight", (22,)), ("resumed", (19, 22))):
        for steps in stops:
            train_in_process(recipe(tmp_path / name, tiny_blend, steps, bad_step="skip"), resume=True)
    lines = [
        [(line["step"], line["loss"], line["skipped_steps"]) for line in metrics(tmp_path / n)]
        for n in ("straight", "resumed")
    ]
    assert lines[0] == lines[1]
    assert lines[0][-1][2] == 2
    assert {18, 20}.isdisjoint(step for step, *_ in lines[0])
    ours, expected = saved_tensors(tmp_path / "resumed"), saved_tensors(tmp_path / "straight")
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
