"""The demo's list of steps fits the project's commands, and its exit codes tell success from failure."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from data_prep.errors import UserError
from demo import run_demo
from demo.run_demo import DemoOptions, demo_steps, run
from demo.step_state import Step, read_records
from tests.repository_rules import ROOT, config_fields


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def steps() -> list[Step]:
    return demo_steps(Path("somewhere"), ranks=2)


def _flags(step: Step) -> dict[str, str]:
    return {flag: value for flag, value in pairwise(step.command) if flag.startswith("--")}


def _script_steps(steps: list[Step]) -> list[Step]:
    return [step for step in steps if step.command[0].endswith(".py")]


def test_every_step_calls_something_that_is_there(steps: list[Step]) -> None:
    assert len({step.name for step in steps}) == len(steps)
    assert all((ROOT / step.command[0]).is_file() for step in _script_steps(steps))
    assert all((ROOT / recipe).is_file() for step in steps for recipe in step.recipes)


def test_scripts_know_the_flags_they_are_given(steps: list[Step]) -> None:
    for step in _script_steps(steps):
        fields = {name for _, name in config_fields((ROOT / step.command[0]).read_text())}
        wanted = {flag[2:].replace("-", "_") for flag in _flags(step)} | {"overwrite"}
        wanted |= {"resume"} if step.resumable else set()
        wanted -= {"config"}  # names the file that holds the fields
        assert wanted <= fields, f"{step.command[0]}: unknown flags {wanted - fields}"


def test_everything_stays_in_the_folder(steps: list[Step]) -> None:
    assert {step.target.parts[0] for step in steps} == {"somewhere"}
    assert not [word for step in steps for word in step.command if word.startswith("runs/")]


def test_each_step_reads_what_an_earlier_one_makes(steps: list[Step]) -> None:
    made: list[str] = []
    for step in steps:
        inputs = {flag: value for flag, value in _flags(step).items() if value.startswith("somewhere/")}
        for flag, value in inputs.items():
            if flag not in ("--output", "--run-folder"):
                assert any(value.startswith(path) or path.startswith(value) for path in made), (
                    f"{step.name}: {flag} {value}"
                )
        made.append(str(step.target))


def test_training_starts_from_the_stage_before(steps: list[Step]) -> None:
    training = {step.name: _flags(step) for step in steps if step.name.startswith("train ")}
    assert list(training) == ["train base", "train idm", "train policy"]
    assert "--start-from" not in training["train base"]
    assert training["train idm"]["--start-from"] == "somewhere/base"
    assert training["train policy"]["--start-from"] == "somewhere/idm"
    assert {flags["--ranks-per-node"] for flags in training.values()} == {"2"}


def test_a_training_step_is_finished_with_its_last_checkpoint(steps: list[Step]) -> None:
    outputs = [step.outputs for step in steps if step.name.startswith("train ")]
    assert all(re.fullmatch(r"\w+/checkpoints/step_\d{8}/cola\.json", path) for (path,) in outputs)


def _replace_steps(monkeypatch: pytest.MonkeyPatch, *steps: Step) -> None:
    monkeypatch.setattr(run_demo, "demo_steps", lambda folder, ranks: list(steps))
    monkeypatch.setattr(run_demo, "print_results", lambda folder, console: None)


def _small_step(folder: Path, code: str) -> Step:
    return Step(name="small", command=("-c", code, str(folder / "x")), target=folder / "x", outputs=("x",))


def test_success_is_zero_and_names_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _replace_steps(monkeypatch, _small_step(tmp_path, "import sys; open(sys.argv[1], 'w')"))
    run(DemoOptions(folder=tmp_path))
    printed = capsys.readouterr().out.replace("\n", "")
    assert "1 steps, 0 seconds" in printed
    assert "report.html" in printed


def test_failure_is_not_zero_and_shows_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _replace_steps(monkeypatch, _small_step(tmp_path, "raise SystemExit('no such corpus')"))
    with pytest.raises(SystemExit) as stopped:
        run(DemoOptions(folder=tmp_path))
    assert stopped.value.code == 1
    errors = capsys.readouterr().err
    assert "no such corpus" in errors
    assert "step 'small' failed (exit code 1)" in errors
    assert [record.status for record in read_records(tmp_path / "steps.json")] == ["failed"]


def test_a_dry_run_lists_the_steps_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(DemoOptions(folder=tmp_path / "new", dry_run=True))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("sample corpora", "train policy", "report"))
    assert not (tmp_path / "new").exists()


def test_no_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ranks 0: must be at least 1"):
        run(DemoOptions(folder=tmp_path, ranks=0))


def test_another_working_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run this from the repository's root"):
        run(DemoOptions(folder=tmp_path))
