"""Every shipped recipe parses, fits the ranks it is meant for, and fits the recipes beside it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.blend import check_config, read_config
from data_prep.errors import UserError
from pretrain.config import RunConfig
from pretrain.config_checks import find_problems
from pretrain.recipes import load_recipe
from tests.repository_rules import ROOT, tracked_files

RECIPES = [path for path in tracked_files(".yaml") if path.parts[0] == "configs"]
BLENDS = [path for path in RECIPES if path.stem.startswith("blend_")]
TRAINING = [path for path in RECIPES if path not in BLENDS]
RANKS = {"demo": (1, 2), "llama31_8b": (8, 64)}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def _name(path: Path) -> str:
    return path.stem


def _load(name: str) -> RunConfig:
    return load_recipe(ROOT / "configs" / f"{name}.yaml", [])


def test_there_are_recipes_of_both_kinds() -> None:
    assert {"demo_base", "demo_idm", "demo_policy", "idm_llama31_8b"} <= {path.stem for path in TRAINING}
    assert {"blend_demo", "blend_200g"} <= {path.stem for path in BLENDS}


@pytest.mark.parametrize("path", TRAINING, ids=_name)
def test_a_training_recipe_is_right_for_its_ranks(path: Path) -> None:
    config = load_recipe(ROOT / path, [])
    (ranks,) = [ranks for key, ranks in RANKS.items() if key in path.stem]
    assert [problem for count in ranks for problem in find_problems(config, count)] == []


@pytest.mark.parametrize("path", BLENDS, ids=_name)
def test_a_blend_recipe_is_right(path: Path, tmp_path: Path) -> None:
    check_config(replace(read_config(ROOT / path), output=tmp_path / "new"))


@pytest.mark.parametrize("path", TRAINING, ids=_name)
def test_a_stage_has_the_model_of_the_stage_before(path: Path) -> None:
    config = load_recipe(ROOT / path, [])
    before = [other for p in TRAINING if (other := load_recipe(ROOT / p, [])).run_folder == config.start_from]
    if config.stage == "base" or config.start_from == Path("runs/llama31_8b/base"):
        return  # the converted Llama has no recipe
    (start,) = before
    assert start.model == config.model
    assert config.stage == "idm" or start.actions == config.actions


def test_the_papers_recipes_keep_the_papers_choices() -> None:
    for stage in ("idm", "policy"):
        actions = _load(f"{stage}_llama31_8b_paper").actions
        assert (actions.output, actions.regulariser, actions.regulariser_coefficient) == (
            "reference",
            "token",
            0.001,
        )
        assert (actions.num_actions, actions.temperature) == (64, 2.0)
        recommended = _load(f"{stage}_llama31_8b").actions
        assert (recommended.output, recommended.regulariser) == ("residual", "usage")


def test_the_blend_recipes_feed_the_training_recipes() -> None:
    for blend, runs in (("blend_demo", "demo_idm"), ("blend_200g", "idm_llama31_8b")):
        tokens = read_config(ROOT / "configs" / f"{blend}.yaml")
        config = _load(runs)
        assert config.data.path == tokens.output
        assert config.training.steps * config.tokens_per_step <= tokens.total_tokens


def test_a_misspelt_field_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "configs/demo_idm.yaml").read_text()
    bad = tmp_path / "demo_idm.yaml"
    bad.write_text(text.replace("learning_rate:", "learning_rat:"))
    with pytest.raises(UserError, match=r"optimizer\.learning_rat"):
        load_recipe(bad, [])


def test_the_command_line_names_what_keeps_a_recipe_from_running(tmp_path: Path) -> None:
    """The demo's recipe through the real entry point: all that is missing is its data."""
    overrides = ["--data.path", str(tmp_path / "nothing"), "--run-folder", str(tmp_path / "run")]
    command = [sys.executable, "-m", "pretrain.train", "configs/demo_base.yaml", *overrides, "--dry-run"]
    dry_run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert dry_run.returncode == 2
    assert dry_run.stderr.strip().splitlines()[-1].startswith("error: 1 problem(s) in this run: data.path")
    assert not (tmp_path / "run").exists()
