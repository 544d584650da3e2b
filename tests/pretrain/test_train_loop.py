"""Steps with a non-finite loss or gradient are never moved on; reruns are equal; the base may run in any groups."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.errors import TrainingError
from pretrain import optimization
from pretrain.checkpoints.checkpoint_folder import read_description, resolve_checkpoint
from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.stages.base import BaseStage
from pretrain.stages.contract import StageLoss
from tests.pretrain.tiny_runs import metrics, series, tiny_recipe, train_in_process


def recipe(folder: Path, data: Path, skips: int = 0, **training: Any) -> RunConfig:
    """Six steps of one micro-batch of the base; so many bad steps in a row are skipped."""
    faults = {"bad_step": "skip", "max_bad_steps": skips} if skips else {"bad_step": "stop"}
    return tiny_recipe("base", folder, data, training={"micro_batch_size": 8} | training, faults=faults)


def break_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str) -> None:
    """Make the loss, or only its gradient, NaN in the training steps of the given numbers."""
    whole, count = BaseStage.forward, [0]

    def broken(self: BaseStage, model: Any, batch: Any, carry: Any) -> Any:
        result = whole(self, model, batch, carry)
        assert isinstance(result, StageLoss)
        count[0] += model.training
        if model.training and count[0] in steps:
            if what == "loss":
                result.means["loss"] = result.means["loss"] * float("nan")
            else:
                result.loss.register_hook(lambda gradient: gradient * float("nan"))
        return result

    monkeypatch.setattr(BaseStage, "forward", broken)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_run_ends_before_the_optimizer_moves(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    break_steps(monkeypatch, {4}, what)
    with pytest.raises(TrainingError, match=r"step 4: .*nan.*the optimizer was not moved"):
        train_in_process(recipe(tmp_path / "run", tiny_blend))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    assert read_description(resolve_checkpoint(tmp_path / "run")).step == 3


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_are_skipped_and_counted(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Two in a row are allowed; the weights stay finite and the count is in the log."""
    break_steps(monkeypatch, {2, 3, 5}, what)
    train_in_process(recipe(tmp_path / "run", tiny_blend, skips=2))
    assert [(line["step"], line["skipped_steps"]) for line in metrics(tmp_path / "run")] == [
        (1, 0),
        (4, 2),
        (6, 3),
    ]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics(tmp_path / "run", "validation"))


def test_one_more_in_a_row_ends_the_run(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, {2, 3, 4}, "gradient")
    with pytest.raises(TrainingError, match=r"step 4: "):
        train_in_process(recipe(tmp_path / "run", tiny_blend, skips=2))


def test_a_skipped_step_leaves_the_weights(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose last step is skipped ends as the run that is a step shorter; a whole step, the twin, does not."""
    for name, steps, broken in (("short", 5, set()), ("skipped", 6, {6}), ("whole", 6, set())):
        with monkeypatch.context() as patch:
            break_steps(patch, broken, "gradient")
            train_in_process(recipe(tmp_path / name, tiny_blend, steps=steps, skips=1))
    ends = {
        name: read_description(resolve_checkpoint(tmp_path / name)).fingerprints
        for name in ("short", "skipped", "whole")
    }
    assert ends["short"] == ends["skipped"]
    assert ends["short"] != ends["whole"]


def test_deterministic_runs_are_equal_to_the_last_bit(tmp_path: Path, tiny_blend: Path) -> None:
    """Another seed, the twin, gives other weights."""
    fingerprints = []
    try:
        for name, seed in (("one", 42), ("two", 42), ("twin", 43)):
            config = recipe(tmp_path / name, tiny_blend, steps=2, deterministic=True)
            train_in_process(type(config)(**(vars(config) | {"seed": seed})))
            fingerprints.append(read_description(resolve_checkpoint(tmp_path / name)).fingerprints)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[0] != fingerprints[2]


def test_the_base_micro_batch_size_changes_nothing(tmp_path: Path, tiny_blend: Path) -> None:
    """Two runs of stage idm, the base on one or on four micro-batches at once; another seed, the twin, differs."""
    train_in_process(tiny_recipe("base", tmp_path / "base", tiny_blend, training={"steps": 2}))
    losses = {}
    for name, base_size, seed in (("alone", None, 42), ("together", 8, 42), ("twin", 8, 43)):
        recipe = tiny_recipe(
            "idm",
            tmp_path / name,
            tiny_blend,
            tmp_path / "base",
            training={"steps": 3, "micro_batch_size": 2, "base_micro_batch_size": base_size},
            validation={"interval_steps": 10},
            checkpoint={"interval_steps": 10},
        )
        train_in_process(type(recipe)(**(vars(recipe) | {"seed": seed})))
        losses[name] = series(tmp_path / name, "loss")
    assert abs(losses["alone"] / losses["together"] - 1).max() < 1e-6
    assert abs(losses["alone"] / losses["twin"] - 1).max() > 1e-4


def test_loader_processes_give_the_same_samples(tmp_path: Path, tiny_blend: Path) -> None:
    """Two processes load what none does; samples of another seed, the twin, are others."""
    losses = {}
    for name, workers, seed in (("none", 0, 42), ("two", 2, 42), ("twin", 2, 43)):
        config = tiny_recipe(
            "base",
            tmp_path / name,
            tiny_blend,
            data={"loader_workers": workers},
            training={"steps": 3},
            validation={"interval_steps": 10},
            checkpoint={"interval_steps": 10},
        )
        train_in_process(type(config)(**(vars(config) | {"seed": seed})))
        losses[name] = series(tmp_path / name, "loss")
    assert (losses["none"] == losses["two"]).all()
    assert (losses["none"] != losses["twin"]).all()


@pytest.mark.parametrize("wrapper", ["ReleasableDataParallel", "DistributedDataParallel"])
def test_a_model_that_was_trained_is_freed(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch, wrapper: str
) -> None:
    """So that a roll-back has its memory. In Megatron's own wrapper, the twin, it stays for good."""
    monkeypatch.setattr(optimization, "ReleasableDataParallel", getattr(optimization, wrapper))
    is_there = []
    forward = ColaModel.forward

    def seen(self: ColaModel, *arguments: Any) -> Any:
        is_there.append(weakref.ref(self))
        return forward(self, *arguments)

    monkeypatch.setattr(ColaModel, "forward", seen)
    train_in_process(recipe(tmp_path / "run", tiny_blend, steps=1))
    gc.collect()
    assert (is_there[0]() is None) == (wrapper == "ReleasableDataParallel")
