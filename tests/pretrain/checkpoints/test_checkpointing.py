"""A base whose weights change as they are loaded, as they do in FP8: what is checked, recorded and held.

FP8 weights need a GPU; here the loaded weights of the base are rounded to E4M3 instead, which leaves the rest as it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain.run_checks
from data_prep.errors import UserError
from pretrain.checkpoints.checkpoint_folder import read_description, resolve_checkpoint
from pretrain.checkpoints.checkpointing import model_fingerprints, sharded_weights
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext
from tests.pretrain.tiny_runs import STARTS, tiny_recipe, train_in_process

PRECISION = {"precision": "bf16", "steps": 3}


def rounding_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have models round the linear weights of their base's blocks whenever they load them."""
    load = ColaModel.load_state_dict

    def load_rounded(self: ColaModel, state: Mapping[str, Any], **options: Any) -> Any:
        rounded = {
            name: value.to(torch.float8_e4m3fn).to(value.dtype)
            if name.startswith("base.decoder.layers") and value.dim() == 2
            else value
            for name, value in state.items()
        }
        return load(self, rounded, **options)

    monkeypatch.setattr(ColaModel, "load_state_dict", load_rounded)


def fingerprints_of_base(run: Path) -> dict[str, str]:
    """As the newest checkpoint of `run` records them."""
    recorded = read_description(resolve_checkpoint(run)).fingerprints
    return {name: value for name, value in recorded.items() if name.startswith("base.")}


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """A trained base."""
    folder = tmp_path_factory.mktemp("base") / "base"
    train_in_process(tiny_recipe("base", folder, tiny_blend, training=PRECISION))
    return folder


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 recipes are let through on this machine, and the base's weights rounded."""
    monkeypatch.setattr(pretrain.run_checks, "find_device_problems", lambda *_, **__: [])
    rounding_the_base(monkeypatch)


def start(stage: str, folder: Path, blend: Path, base_run: Path, base_fp8: str = "tensorwise") -> Path:
    """Train `stage` in `folder` with an FP8 base; returns its run folder."""
    start_from = base_run if STARTS[stage] == "base" else folder / "idm"
    training = {**PRECISION, "base_fp8": base_fp8}
    train_in_process(tiny_recipe(stage, folder / stage, blend, start_from, training=training))
    return folder / stage


@pytest.mark.usefixtures("rounded")
def test_checkpoints_record_the_weights_that_were_quantised(
    base_run: Path, tiny_blend: Path, tmp_path: Path
) -> None:
    """Two stages on an FP8 base record the base's own fingerprints, so that the next stage finds the same base."""
    for stage in ("idm", "policy"):
        run = start(stage, tmp_path, tiny_blend, base_run)
        assert fingerprints_of_base(run) == fingerprints_of_base(base_run)


@pytest.mark.usefixtures("rounded")
def test_quantised_weights_that_move_stop_the_run(
    base_run: Path, tiny_blend: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault twin: one FP8 weight changed in training is found before a checkpoint is written."""
    forward = ColaModel.forward

    def nudge(self: ColaModel, *arguments: Any) -> Any:
        weights = self.base.decoder.layers[0].mlp.linear_fc2.weight.data
        weights[0, 0] += 1.0
        return forward(self, *arguments)

    monkeypatch.setattr(ColaModel, "forward", nudge)
    with pytest.raises(UserError, match=r"frozen tensors: 1 tensor\(s\) are not what was saved"):
        start("idm", tmp_path, tiny_blend, base_run)
    assert list((tmp_path / "idm").glob("checkpoints/*")) == []


@pytest.mark.usefixtures("rounded")
def test_rounding_without_fp8_is_refused(base_run: Path, tiny_blend: Path, tmp_path: Path) -> None:
    """The fault twin: a base that the recipe keeps in BF16 must hold what its checkpoint recorded."""
    with pytest.raises(UserError, match=r"tensor\(s\) are not what was saved, first base.decoder.layers"):
        start("idm", tmp_path, tiny_blend, base_run, base_fp8="off")


def test_fingerprints_of_values_beside_the_model(context: ParallelContext) -> None:
    """Values given under the model's names count instead of its own, fused ones too; the twin is one element off."""
    config = tiny_recipe("idm", Path("run"), Path("data"), Path("start"), training=PRECISION)
    model = ColaModel(config, context.groups, ("base", "idm"))
    own = model_fingerprints(model, model.parts)
    values = {name: value.data.clone() for name, value in sharded_weights(model, model.parts).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert model_fingerprints(model, model.parts) != own
    assert model_fingerprints(model, model.parts, values) == own
    values["base.decoder.layers.1.mlp.linear_fc1.weight"][-1, -1] += 1
    changed = model_fingerprints(model, model.parts, values)
    assert [name for name in own if own[name] != changed[name]] == [
        "base.decoder.layers.mlp.linear_fc1.weight[1]"
    ]
