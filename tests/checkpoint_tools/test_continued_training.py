"""Training goes on from the published weights: what is frozen and what is trained begin as they were published."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.formats.opened_model import open_model
from checkpoint_tools.hf_to_megatron import ImportConfig, import_model
from data_prep.errors import UserError
from tests.checkpoint_tools.random_bases import published_folder
from tests.pretrain.tiny_runs import series, tiny_recipe, train_in_process


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """A run folder made of a folder in the published layout."""
    folder = tmp_path_factory.mktemp("published")
    import_model(
        ImportConfig(source=published_folder(folder / "hf", tiny_blend / "tokenizer"), output=folder / "run")
    )
    return folder / "run"


def continued(published: Path, blend: Path, run: Path, stage: str, **changes: Any) -> Path:
    """Two steps of `stage` from the imported weights, hardly any learning in the first."""
    model = vars(open_model(published).model)
    sections = {
        "model": model,
        "actions": {"num_actions": 64, "num_idm_layers": 2, "num_policy_layers": 2, "output": "reference"},
        "training": {"steps": 2},
        "optimizer": {"learning_rate": 1e-9, "min_learning_rate": 1e-9, "warmup_steps": 1},
        **changes,
    }
    config = tiny_recipe(stage, run, blend, published, **sections)
    from dataclasses import replace

    train_in_process(replace(config, init_from=published))
    return run


@pytest.mark.parametrize("stage", ["idm", "policy"])
def test_training_goes_on_from_the_published_weights(
    published: Path, tiny_blend: Path, tmp_path: Path, stage: str
) -> None:
    """After steps too small to move a weight by 1e-6 all parts are still the published ones, to that; Adam did step."""
    run = continued(published, tiny_blend, tmp_path / "run", stage)
    before, after = open_model(published).reader, open_model(run).reader
    common = after.facts.keys() & before.facts.keys()
    assert len(common) == len(after.facts) and len(series(run, "loss")) == 2
    moved = {name for name in common if not torch.equal(before.read(name), after.read(name))}
    names = {"idm": ("action_",), "policy": ("policy_",)}[stage]
    assert moved and all(any(mark in name for mark in names) for name in moved)
    for name in moved:
        torch.testing.assert_close(after.read(name), before.read(name), rtol=0, atol=1e-6)


def test_random_weights_would_show(published: Path, tiny_blend: Path, tmp_path: Path) -> None:
    """The twin: another model's weights are not the published ones."""
    other = published_folder(tmp_path / "other", tiny_blend / "tokenizer", seed=5)
    import_model(ImportConfig(source=other, output=tmp_path / "other_run", verify=False))
    run = continued(tmp_path / "other_run", tiny_blend, tmp_path / "run", "policy")
    name = "model.policy_layers.0.mlp.up_proj.weight"
    difference = open_model(run).reader.read(name) - open_model(published).reader.read(name)
    assert difference.abs().max() > 1e-2


def test_other_sizes_are_refused(published: Path, tiny_blend: Path, tmp_path: Path) -> None:
    """A recipe of another model does not take the weights."""
    with pytest.raises(UserError, match=r"model.ffn_hidden_size: 64, but .* was trained with 192"):
        continued(published, tiny_blend, tmp_path / "run", "policy", model={"ffn_hidden_size": 64})
