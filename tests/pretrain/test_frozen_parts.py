"""What a stage freezes is bit-identical for ever; what it trains moves."""

from pathlib import Path

import pytest

from data_prep.errors import UserError
from pretrain.checkpoints.checkpoint_folder import read_description, resolve_checkpoint
from pretrain.model.cola import ColaModel
from tests.pretrain.tiny_runs import STARTS, metrics, tiny_recipe, train_in_process

TRAINED = {"base": {"base"}, "idm": {"idm", "world_model"}, "policy": {"policy"}}
FROZEN = {"base": set(), "idm": {"base"}, "policy": {"base", "idm", "world_model"}}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """Runs of the three stages in one precision."""
    folder = tmp_path_factory.mktemp("frozen")
    for stage, start in STARTS.items():
        start_from = folder / start if start else None
        precision = {"precision": request.param}
        train_in_process(tiny_recipe(stage, folder / stage, tiny_blend, start_from, training=precision))
    return folder


def fingerprints(run: Path) -> dict[str, str]:
    return read_description(resolve_checkpoint(run)).fingerprints


def of_parts(tensors: dict[str, str], parts: set[str]) -> dict[str, str]:
    return {name: value for name, value in tensors.items() if name.split(".")[0] in parts}


@pytest.mark.parametrize("stage", ["idm", "policy"])
def test_frozen_tensors_are_those_of_the_run_before(runs: Path, stage: str) -> None:
    """Every tensor of every frozen part, after six steps, equals the one that was loaded."""
    before = fingerprints(runs / STARTS[stage])  # type: ignore[operator]
    after = of_parts(fingerprints(runs / stage), FROZEN[stage])
    assert {name.split(".")[0] for name in after} == FROZEN[stage]
    assert after == {name: before[name] for name in after}


@pytest.mark.parametrize("stage", STARTS)
def test_trained_tensors_move(runs: Path, stage: str) -> None:
    """Every trained tensor differs between the checkpoints of step 3 and step 6."""
    first, last = (
        of_parts(fingerprints(runs / stage / "checkpoints" / f"step_0000000{step}"), TRAINED[stage])
        for step in (3, 6)
    )
    assert first.keys() == last.keys()
    assert [name for name in first if first[name] == last[name]] == []


@pytest.mark.parametrize("stage", STARTS)
def test_checkpoints_hold_only_what_was_trained(runs: Path, stage: str) -> None:
    """The frozen base is referred to, not copied."""
    assert set(read_description(resolve_checkpoint(runs / stage)).parts) == TRAINED[stage]


def test_base_learns_in_either_precision(runs: Path) -> None:
    """The loss of the base falls by more than half a nat within six steps."""
    losses = [line["loss"] for line in metrics(runs / "base")]
    assert losses[-1] < losses[0] - 0.5


def test_a_base_that_moves_stops_the_run(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault twin: training the base by mistake is caught before a checkpoint is written."""
    train_in_process(tiny_recipe("base", tmp_path / "base", tiny_blend, training={"steps": 1}))
    hidden = ColaModel.forward

    def nudge_the_base(self: ColaModel, *arguments):  # type: ignore[no-untyped-def]
        self.base.decoder.final_layernorm.weight.data[0] += 2**-10
        return hidden(self, *arguments)

    monkeypatch.setattr(ColaModel, "forward", nudge_the_base)
    with pytest.raises(UserError, match=r"frozen tensors: 1 tensor\(s\) are not what was saved"):
        train_in_process(tiny_recipe("idm", tmp_path / "idm", tiny_blend, tmp_path / "base"))
    assert list((tmp_path / "idm").glob("checkpoints/*")) == []
