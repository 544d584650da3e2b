"""Every shipped recipe parses, fits the ranks it is meant for, and fits the recipes beside it."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.blend import check_config, read_config
from data_prep.errors import UserError
from pretrain.config import RunConfig
from pretrain.config_checks import find_problems
from pretrain.plan import find_plan_problems
from pretrain.planning.parameters import parameters_by_part
from pretrain.recipes import load_recipe
from pretrain.train import main
from tests.command_lines import run_here
from tests.repository_rules import ROOT, tracked_files

RECIPES = [path for path in tracked_files(".yaml") if path.parts[0] == "configs"]
BLENDS = [path for path in RECIPES if path.stem.startswith("blend_")]
TRAINING = [path for path in RECIPES if path not in BLENDS]
RANKS = {"demo": (1, 2), "llama31_8b": (8, 64), "qwen25": (8, 64), "llama31_70b": (32, 512)}
# Bases converted from released models: they have no recipe.
CONVERTED_BASES = {Path("runs", name, "base") for name in ("llama31_8b", "llama31_70b", "qwen25_math_1_5b")}


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


@pytest.mark.parametrize("path", TRAINING, ids=_name)
def test_a_training_recipe_fits_the_gpus_it_names(path: Path) -> None:
    """80 GB each, by the plan, on the fewest ranks and on the most."""
    config = load_recipe(ROOT / path, [])
    (ranks,) = [ranks for key, ranks in RANKS.items() if key in path.stem]
    assert [p for count in ranks for p in find_plan_problems(config, count, 80e9 / 2**30, "80 GB")] == []
    assert find_plan_problems(config, ranks[0], 1.0, "1 GiB")  # the fault twin: a GPU of that size does not


def _commented_overrides(path: Path) -> list[list[str]]:
    """The command-line options in the comments above a recipe, a list for each line that has some."""
    comments = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("#")]
    found = [re.findall(r"--(?:training|parallel)\.[a-z0-9-]+(?: [a-z0-9]+)?", line) for line in comments]
    return [[word for option in options for word in option.split()] for options in found if options]


@pytest.mark.parametrize("name", ["idm_llama31_8b", "policy_llama31_8b"])
def test_the_options_in_a_recipes_comments_work(name: str) -> None:
    """Each line of them on its own, and FP8 with either layout; each changes the recipe."""
    path = Path("configs", f"{name}.yaml")
    options = _commented_overrides(path)
    tensor, pipeline, fp8 = options
    assert (tensor[0], pipeline[0], fp8[0]) == (
        "--parallel.tensor-parallel-size",
        "--parallel.pipeline-parallel-size",
        "--training.fp8",
    )
    for chosen in (*options, tensor + fp8, pipeline + fp8):
        config = load_recipe(ROOT / path, chosen)
        assert config != _load(name)
        assert [problem for count in (8, 64) for problem in find_problems(config, count)] == []


def test_the_larger_and_the_smaller_base_are_as_published() -> None:
    """Parameters of Llama-3.1-70B and Qwen2.5-Math-1.5B, by their model cards' shapes."""
    for name, count in (("llama31_70b", 70_553_706_496), ("qwen25_math_1_5b", 1_543_714_304)):
        idm, policy = _load(f"idm_{name}"), _load(f"policy_{name}")
        assert parameters_by_part(idm)["base"] == parameters_by_part(policy)["base"] == count
        assert idm.actions == policy.actions == _load("idm_llama31_8b").actions


@pytest.mark.parametrize("path", BLENDS, ids=_name)
def test_a_blend_recipe_is_right(path: Path, tmp_path: Path) -> None:
    check_config(replace(read_config(ROOT / path), output=tmp_path / "new"))


@pytest.mark.parametrize("path", TRAINING, ids=_name)
def test_a_stage_has_the_model_of_the_stage_before(path: Path) -> None:
    config = load_recipe(ROOT / path, [])
    before = [other for p in TRAINING if (other := load_recipe(ROOT / p, [])).run_folder == config.start_from]
    if config.stage == "base" or config.start_from in CONVERTED_BASES:
        return
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


def _run_trainer(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The demo's first recipe through the entry point, without its data."""
    overrides = ["--data.path", str(folder / "nothing"), "--run-folder", str(folder / "run"), *arguments]
    return run_here(main, "configs/demo_base.yaml", *overrides)


def test_the_command_line_names_what_keeps_a_recipe_from_running(tmp_path: Path) -> None:
    run = _run_trainer(tmp_path)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("error: 1 problem(s) in this run: data.path")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_plan_before_there_is_data(tmp_path: Path) -> None:
    """And refuses a recipe that could not run."""
    dry_run = _run_trainer(tmp_path, "--dry-run")
    assert dry_run.returncode == 0
    assert "450 steps x 2,048 tokens = 921,600 tokens" in dry_run.stdout
    assert "not there yet: data.path" in dry_run.stdout
    refused = _run_trainer(tmp_path, "--dry-run", "--training.micro-batch-size", "3")
    assert refused.returncode == 2
    assert "training.global_batch_size: 16 is not divisible" in refused.stderr
    assert not (tmp_path / "run").exists()
