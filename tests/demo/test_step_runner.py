"""The step runner skips what is finished, resumes what was interrupted, and never calls a failure success."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.errors import UserError
from demo.progress import ProgressDisplay
from demo.step_runner import StepFailedError, log_file, run_steps
from demo.step_state import Step, StepState, read_records

# Stands for a command of the project: writes its flags into its output, unless told to fail.
SCRIPT = """
import pathlib, sys
out, text, *flags = sys.argv[1:]
pathlib.Path(out).write_text(text + " " + " ".join(flags))
print("wrote", out)
"""
PROJECT = str(Path(__file__).resolve().parents[2])


def _step(folder: Path, name: str, text: str = "x", **changes: object) -> Step:
    output = folder / f"{name}.out"
    step = Step(name=name, command=("-c", SCRIPT, str(output), text), target=output, outputs=(output.name,))
    return replace(step, **changes)  # type: ignore[arg-type]


def _run(folder: Path, *steps: Step) -> str:
    shown = io.StringIO()
    run_steps(folder, steps, ProgressDisplay(shown))
    return shown.getvalue()


def _actions(folder: Path, *steps: Step) -> list[str]:
    return [planned.action for planned in StepState(folder).plan(steps)]


def _text(step: Step) -> str:
    return step.target.read_text().strip()


def test_every_step_runs_once_and_prints_one_line(tmp_path: Path) -> None:
    steps = [_step(tmp_path, "one"), _step(tmp_path, "two words")]
    first = _run(tmp_path, *steps).splitlines()
    assert [line.split(":")[0] for line in first] == ["[ 1/2] one", "[ 2/2] two words"]
    assert all(line.endswith(" s") for line in first)
    second = _run(tmp_path, *steps).splitlines()
    assert [line.endswith("skipped") for line in second] == [True, True]
    assert log_file(tmp_path, steps[1]).read_text().splitlines()[-1].startswith("wrote")
    records = read_records(tmp_path / "steps.json")
    assert [(r.name, r.status) for r in records] == [("one", "finished"), ("two words", "finished")]
    assert all(record.seconds > 0 for record in records)


def test_a_changed_command_runs_it_and_all_after_it_anew(tmp_path: Path) -> None:
    steps = [_step(tmp_path, name) for name in ("one", "two", "three")]
    _run(tmp_path, *steps)
    steps[1] = _step(tmp_path, "two", text="y")
    assert _actions(tmp_path, *steps) == ["skip", "run anew", "run anew"]
    _run(tmp_path, *steps)
    assert [_text(step) for step in steps] == ["x", "y --overwrite", "x --overwrite"]


def test_a_changed_recipe_runs_it_and_all_after_it_anew(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 1")
    steps = [_step(tmp_path, "one"), _step(tmp_path, "two", recipes=(recipe,)), _step(tmp_path, "three")]
    _run(tmp_path, *steps)
    recipe.write_text("steps: 2")
    assert _actions(tmp_path, *steps) == ["skip", "run anew", "run anew"]
    recipe.write_text("steps: 1")
    assert _actions(tmp_path, *steps) == ["skip", "skip", "skip"]


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_a_result_that_is_not_what_was_left_is_made_anew(tmp_path: Path, damage: str) -> None:
    steps = [_step(tmp_path, "one"), _step(tmp_path, "two")]
    _run(tmp_path, *steps)
    output = steps[0].target
    output.unlink() if damage == "removed" else output.write_text("by another hand")
    assert _actions(tmp_path, *steps) == ["run" if damage == "removed" else "run anew", "run anew"]
    _run(tmp_path, *steps)
    assert _actions(tmp_path, *steps) == ["skip", "skip"]


def test_a_step_that_ran_anew_makes_later_results_stale_even_after_a_failure(tmp_path: Path) -> None:
    steps = [_step(tmp_path, "one"), _step(tmp_path, "two")]
    _run(tmp_path, *steps)
    changed = _step(tmp_path, "one", command=("-c", "raise SystemExit(3)"))
    with pytest.raises(StepFailedError):
        _run(tmp_path, changed, steps[1])
    # Back to the first recipe: "two" was made from a "one" that is gone.
    assert _actions(tmp_path, *steps) == ["run anew", "run anew"]


def test_a_failure_stops_with_the_end_of_the_log(tmp_path: Path) -> None:
    failing = _step(
        tmp_path, "bad", command=("-c", "for i in range(50): print('line', i)\nraise SystemExit(7)")
    )
    with pytest.raises(StepFailedError) as failure:
        _run(tmp_path, _step(tmp_path, "one"), failing, _step(tmp_path, "three"))
    message = str(failure.value).splitlines()
    assert message[-2].strip() == "line 49"
    assert "step 'bad' failed (exit code 7)" in message[-1]
    assert str(log_file(tmp_path, failing)) in message[-1]
    assert len(message) == 21
    assert not (tmp_path / "three.out").exists()
    assert _actions(tmp_path, failing) == ["run"]


def test_the_reason_is_shown_even_far_above_the_end(tmp_path: Path) -> None:
    code = "print('error: no corpus'); print('[rank1]: ValueError: bad'); print('noise\\n' * 60); exit(1)"
    with pytest.raises(StepFailedError) as failure:
        _run(tmp_path, _step(tmp_path, "bad", command=("-c", code)))
    assert [line.strip() for line in str(failure.value).splitlines()[-3:-1]] == [
        "error: no corpus",
        "[rank1]: ValueError: bad",
    ]


def test_exit_code_zero_without_the_output_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(StepFailedError, match=r"exit code 0, but no .*silent\.out"):
        _run(tmp_path, _step(tmp_path, "silent", command=("-c", "pass")))


def test_every_file_that_a_pattern_matches_counts(tmp_path: Path) -> None:
    code = "import pathlib, sys; [pathlib.Path(sys.argv[1] + name).write_text(name) for name in 'ab']"
    step = _step(tmp_path, "many", command=("-c", code, str(tmp_path / "part_")), outputs=("part_*",))
    _run(tmp_path, step)
    assert _actions(tmp_path, step) == ["skip"]
    (tmp_path / "part_b").unlink()
    assert _actions(tmp_path, step) == ["run"]


def test_a_result_without_a_record_is_not_taken_over(tmp_path: Path) -> None:
    step = _step(tmp_path, "one")
    step.target.write_text("from somewhere else")
    assert _actions(tmp_path, step) == ["run anew"]


def test_an_unreadable_state_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text('{"format": 1, "steps": [{"na')
    with pytest.raises(UserError, match=r"steps\.json: not readable"):
        StepState(tmp_path)


def test_progress_bars_become_lines_of_the_log(tmp_path: Path) -> None:
    code = r"print('a\r 10%|# | 1/10\r 20%|## | 2/10', end=''); open('OUT', 'w')"
    step = _step(tmp_path, "bar", command=("-c", code.replace("OUT", str(tmp_path / "bar.out"))))
    _run(tmp_path, step)
    assert log_file(tmp_path, step).read_text().splitlines()[1:] == ["a", " 10%|# | 1/10", " 20%|## | 2/10"]


def test_a_bar_replaces_itself_on_a_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    code = r"import time; time.sleep(0.3); print(' 50%|## | 5/10', end='\r'); open('OUT', 'w')"
    step = _step(tmp_path, "bar", command=("-c", code.replace("OUT", str(tmp_path / "bar.out"))))
    run_steps(tmp_path, [step], ProgressDisplay(terminal))
    assert "\r\x1b[K[ 1/1] bar  50%|## | 5/10\r\x1b[K[ 1/1] bar: " in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 1


# A step that counts to three in a file, a count each 0.2 s, going on where it was with --resume.
COUNTER = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[1])
position = out.with_suffix(".position")
count = int(position.read_text()) if "--resume" in sys.argv else 0
first = count
while count < 3:
    count += 1
    position.write_text(str(count))
    time.sleep(0.2 if count < 3 or first else 60)
out.write_text(f"{first} {' '.join(sys.argv[2:])}")
"""
RUNNER = """
import sys, pathlib
from demo.progress import ProgressDisplay
from demo.step_runner import run_steps
from demo.step_state import Step
folder = pathlib.Path(sys.argv[1])
out = folder / "count.out"
step = Step(name="count", command=("-c", sys.argv[2], str(out)), target=out.with_suffix(".position"),
            outputs=("count.out",), resumable=True)
run_steps(folder, [step], ProgressDisplay(sys.stdout))
"""


def _start_counting(folder: Path) -> subprocess.Popen[bytes]:
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(folder), COUNTER],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    position = folder / "count.position"
    deadline = time.monotonic() + 30
    while not (position.exists() and position.read_text() == "3"):
        assert runner.poll() is None, runner.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return runner


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_step_resumes(tmp_path: Path, stop: signal.Signals) -> None:
    runner = _start_counting(tmp_path)
    runner.send_signal(stop)
    runner.communicate(timeout=20)
    assert runner.returncode != 0
    (record,) = read_records(tmp_path / "steps.json")
    assert record.status == ("running" if stop == signal.SIGKILL else "interrupted")
    if stop == signal.SIGKILL:
        _check_that_the_orphan_guards_the_folder(tmp_path)
    again = subprocess.run(
        [sys.executable, "-c", RUNNER, str(tmp_path), COUNTER], cwd=PROJECT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip().endswith("resumed")
    assert (tmp_path / "count.out").read_text() == "3 --resume"


def _check_that_the_orphan_guards_the_folder(folder: Path) -> None:
    """A runner killed outright leaves its command behind, which must not work beside a second one."""
    out = folder / "count.out"
    step = Step(name="count", command=("-c", "pass"), target=out, outputs=("count.out",), resumable=True)
    with pytest.raises(UserError, match="another run works in this folder"):
        _run(folder, step)
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and str(out).encode() in _command_line(process):
            os.kill(int(process.name), signal.SIGKILL)
    time.sleep(0.2)


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_the_state_file_holds_what_the_report_needs(tmp_path: Path) -> None:
    _run(tmp_path, _step(tmp_path, "one"))
    state = json.loads((tmp_path / "steps.json").read_text())
    assert set(state) == {"format", "steps"}
    assert {"name", "seconds", "status", "command"} <= set(state["steps"][0])
