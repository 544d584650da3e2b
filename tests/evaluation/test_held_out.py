"""The held-out command writes what it measured, prints it, and refuses bad flags all at once."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.errors import USER_ERROR_EXIT_CODE, UserError, run_cli
from evaluation.held_out import HeldOutConfig, held_out_table, main, run, targets
from evaluation.held_out_figures import HeldOutFigures
from evaluation.report import read_held_out

SUMMARY_KEYS = {
    "base_loss",
    "idm_loss",
    "mixture_loss",
    "random_loss",
    "alive_actions",
    "kl_mixture_base",
    "kl_base_mixture",
    "policy_action_loss",
    "policy_action_accuracy",
    "greedy_accuracy",
    "base_accuracy",
}


@pytest.fixture(scope="module")
def config(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> HeldOutConfig:
    return HeldOutConfig(
        model=demo_folder / "hf",
        data=demo_folder / "data",
        output=tmp_path_factory.mktemp("held_out") / "held_out.json",
        tokens=400,
        sequence_length=20,
    )


@pytest.fixture(scope="module")
def figures(config: HeldOutConfig) -> HeldOutFigures:
    return run(config)


def test_json_holds_what_was_measured(config: HeldOutConfig, figures: HeldOutFigures) -> None:
    written = json.loads(config.output.read_text())
    assert written.keys() >= SUMMARY_KEYS
    assert written["tokens"] == 20 * 19
    assert read_held_out(config.output) == figures


def test_table_shows_every_loss(figures: HeldOutFigures) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(held_out_table(figures))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for name in ("base_loss", "idm_loss", "mixture_loss", "greedy_loss", "random_loss"):
        assert f"{getattr(figures, name):.3f}" in text
    assert f"{figures.alive_actions} of {figures.num_actions}" in text


def test_an_output_is_not_overwritten_unasked(config: HeldOutConfig, figures: HeldOutFigures) -> None:
    before = config.output.read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        run(replace(config, seed=1))
    assert config.output.read_bytes() == before
    assert run(replace(config, overwrite=True)) == figures


def test_all_bad_flags_are_told_at_once(config: HeldOutConfig, tmp_path: Path) -> None:
    bad = replace(config, output=tmp_path, tokens=0, sequence_length=1, chunk_gib=0.0)
    with pytest.raises(UserError) as caught:
        run(bad)
    for flag in ("--output", "--tokens", "--sequence-length", "--chunk-gib"):
        assert flag in str(caught.value)


def test_command_line_fails_in_one_line(
    config: HeldOutConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "held_out.json"
    flags = ["--model", str(tmp_path), "--data", str(config.data), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["held_out.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert stopped.value.code == USER_ERROR_EXIT_CODE
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path}: no config.json")
    assert told.count("\n") == 1
    assert not output.exists()


def test_targets_tell_a_good_model_from_a_bad_one(figures: HeldOutFigures) -> None:
    good = replace(
        figures,
        base_loss=2.0,
        idm_loss=1.2,
        mixture_loss=2.04,
        alive_actions=figures.num_actions,
        policy_action_loss=1.0,
        greedy_accuracy=0.5,
        base_accuracy=0.5,
    )
    assert all(target.reached for target in targets(good))
    for change in (
        {"idm_loss": 1.21},
        {"mixture_loss": 2.05},
        {"alive_actions": figures.num_actions - 1},
        {"policy_action_loss": 3.0},
        {"greedy_accuracy": 0.49},
    ):
        assert [target.reached for target in targets(replace(good, **change))].count(False) == 1, change
