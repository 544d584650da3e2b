"""Plans need no inputs but no nonsense either; trained parts can begin with another checkpoint's weights."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import UserError
from pretrain.train import main
from tests.command_lines import run_here
from tests.pretrain.tiny_runs import series, tiny_recipe, train_in_process
from tests.repository_rules import ROOT


def test_a_full_size_plan_needs_neither_data_nor_weights_nor_gpus() -> None:
    """Parameters, balance and GPU-hours are there, what is missing is named, and the exit code is 0."""
    command = ["-m", "pretrain.train", "configs/idm_llama31_70b.yaml", "--gpus", "64", "--dry-run"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for words in ("70,553,706,496", "Balance", "GPU-hours", "H100", "not there yet: data.path"):
        assert words in done.stdout, words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "many"), "--gpus: needs a number of ranks"),
        (("--gpus", "48"), "training.global_batch_size: 512 is not divisible"),
        (("--gpus", "8", "--parallel.pipeline-parallel-size", "3"), "does not divide the 8 ranks"),
        (
            (
                "--gpus",
                "8",
                "--parallel.pipeline-parallel-size",
                "2",
                "--parallel.pipeline-layout",
                "base*32 | idm*3",
            ),
            "parallel.pipeline_layout: places base*32 idm*3, the model has base*32 idm*4",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = run_here(main, "configs/idm_llama31_8b.yaml", *arguments, "--dry-run")
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_trained_parts_begin_with_another_runs_weights(tmp_path: Path, tiny_blend: Path) -> None:
    """The first loss is the one the other run stood at; without `init_from`, the twin, it is higher."""
    train_in_process(tiny_recipe("base", tmp_path / "base", tiny_blend, training={"steps": 3}))
    train_in_process(tiny_recipe("idm", tmp_path / "idm", tiny_blend, tmp_path / "base"))
    still = {"learning_rate": 1e-9, "min_learning_rate": 0.0}
    losses = {}
    for name, begin in (("on", tmp_path / "idm"), ("twin", None)):
        recipe = tiny_recipe(
            "idm", tmp_path / name, tiny_blend, tmp_path / "base", training={"steps": 1}, optimizer=still
        )
        train_in_process(type(recipe)(**(vars(recipe) | {"init_from": begin})))
        losses[name] = series(tmp_path / name, "loss", "validation")[-1]
    stood_at = series(tmp_path / "idm", "loss", "validation")[-1]
    assert abs(losses["on"] / stood_at - 1) < 1e-5
    assert abs(losses["twin"] / stood_at - 1) > 5e-3


def test_weights_that_are_not_there_are_refused(tmp_path: Path, tiny_blend: Path) -> None:
    """A base run has no IDM to begin with."""
    train_in_process(tiny_recipe("base", tmp_path / "base", tiny_blend, training={"steps": 1}))
    recipe = tiny_recipe("idm", tmp_path / "idm", tiny_blend, tmp_path / "base")
    with pytest.raises(UserError, match=r"init_from: .* needs 'idm': it has no idm, world_model"):
        train_in_process(type(recipe)(**(vars(recipe) | {"init_from": tmp_path / "base"})))
