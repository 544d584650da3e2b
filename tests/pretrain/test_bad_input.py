"""Bad input gets one clear error that names the field and the remedy, before anything is written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.output_files import write_sealed_json
from pretrain.recipes import dump_recipe
from tests.pretrain.tiny_runs import tiny_recipe, train_in_process


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    folder = tmp_path_factory.mktemp("bad_input") / "base"
    train_in_process(tiny_recipe("base", folder, tiny_blend, training={"steps": 1}))
    return folder


def refuse(folder: Path, match: str, *arguments, **sections) -> str:  # type: ignore[no-untyped-def]
    """Train must raise a UserError that matches, and leave no run folder behind."""
    with pytest.raises(UserError, match=match) as caught:
        train_in_process(tiny_recipe(*arguments, **sections))
    assert "\n" not in str(caught.value)
    assert not (folder / "config.yaml").exists()
    assert not (folder / "checkpoints").exists()
    return str(caught.value)


def test_missing_data(tmp_path: Path) -> None:
    refuse(
        tmp_path / "run",
        r"data\.path: .*not a finished blend",
        "base",
        tmp_path / "run",
        tmp_path / "nowhere",
    )


@pytest.mark.parametrize(
    ("match", "section", "changes"),
    [
        (r"model\.vocab_size: 512 is smaller than the 1024 tokens", "model", {"vocab_size": 512}),
        (r"data\.sequence_length: 7000 tokens is more than .* hold", "data", {"sequence_length": 7000}),
        (r"training\.steps: 9999 steps need .* samples .* holds", "training", {"steps": 9999}),
        (
            r"tensor_parallel_size: 3 x .* does not divide the 1 ranks",
            "parallel",
            {"tensor_parallel_size": 3},
        ),
        (r"global_batch_size: 8 is not divisible by", "training", {"micro_batch_size": 3}),
    ],
)
def test_recipe_that_does_not_fit(
    tmp_path: Path, tiny_blend: Path, match: str, section: str, changes: dict[str, int]
) -> None:
    """A vocabulary, length or number of samples the data do not have; a layout that does not divide."""
    refuse(tmp_path / "run", match, "base", tmp_path / "run", tiny_blend, **{section: changes})


def test_checkpoint_of_another_stage(tmp_path: Path, tiny_blend: Path, base_run: Path) -> None:
    refuse(
        tmp_path / "run",
        r"start_from: .* is of stage 'base', stage 'policy' needs 'idm'",
        "policy",
        tmp_path / "run",
        tiny_blend,
        base_run,
    )


def test_checkpoint_of_another_shape(tmp_path: Path, tiny_blend: Path, base_run: Path) -> None:
    refuse(
        tmp_path / "run",
        r"model\.num_layers: 3, but .* was trained with 2",
        "idm",
        tmp_path / "run",
        tiny_blend,
        base_run,
        model={"num_layers": 3},
    )


def test_start_that_does_not_exist(tmp_path: Path, tiny_blend: Path) -> None:
    refuse(
        tmp_path / "run",
        r"start_from: .*nowhere: holds no complete checkpoint",
        "idm",
        tmp_path / "run",
        tiny_blend,
        tmp_path / "nowhere",
    )


def test_data_of_another_tokenizer(tmp_path: Path, tiny_blend: Path, base_run: Path) -> None:
    """Same vocabulary size, other tokens: the base would read nonsense."""
    other = tmp_path / "blend"
    shutil.copytree(tiny_blend, other)
    manifest = json.loads((other / "blend.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    write_sealed_json(other / "blend.json", manifest)
    refuse(tmp_path / "run", r"made with another tokenizer", "idm", tmp_path / "run", other, base_run)


def test_truncated_shard(tmp_path: Path, tiny_blend: Path) -> None:
    """Megatron's own reader opens it and fails, or worse, later."""
    other = tmp_path / "blend"
    shutil.copytree(tiny_blend, other)
    shard = next((other / "train").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    refuse(tmp_path / "run", r"data\.path: .*shard_00000", "base", tmp_path / "run", other)


def test_every_problem_in_one_error(tmp_path: Path) -> None:
    """Five mistakes of different kinds, one message."""
    message = refuse(
        tmp_path / "run",
        r"5 problem\(s\) in this run",
        "idm",
        tmp_path / "run",
        tmp_path / "nowhere",
        model={"num_key_value_heads": 3, "head_size": 7},
        training={"micro_batch_size": 3},
    )
    for name in ("data.path", "start_from", "num_attention_heads", "head_size", "global_batch_size"):
        assert name in message


def test_run_folder_in_use(base_run: Path, tiny_blend: Path) -> None:
    with pytest.raises(UserError, match=r"already holds a run; pass --resume or --overwrite"):
        train_in_process(tiny_recipe("base", base_run, tiny_blend))


def test_folder_of_something_else(tmp_path: Path, tiny_blend: Path) -> None:
    (tmp_path / "thesis.txt").write_text("keep me")
    from pretrain.run import train

    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(UserError, match=r"holds other files and no config\.yaml"):
            train(tiny_recipe("base", tmp_path, tiny_blend), resume=resume, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "keep me"


def test_the_command_exits_with_2_and_one_line(tmp_path: Path) -> None:
    """On the terminal: no traceback, one line on stderr, exit code 2."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny_recipe("base", tmp_path / "run", tmp_path / "nowhere")))
    command = [sys.executable, "-m", "pretrain.train", str(recipe), "--training.steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 problem(s) in this run: data.path:")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
