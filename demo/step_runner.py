"""Runs a list of commands as steps: skips what is finished, resumes what was interrupted, stops at a failure.

Each step's terminal output goes to `logs/<step>.log` in the working folder, what is known about it to
`steps.json` there (`demo.step_state`). The runner knows nothing about what the commands do.
"""

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import IO

from data_prep.errors import UserError
from data_prep.progress import INTERVAL_VARIABLE
from demo.progress import ProgressDisplay, copy_output
from demo.step_state import PlannedStep, Step, StepRecord, StepState, hash_outputs, missing_outputs

LOG_TAIL_LINES = 20
STOP_GRACE_SECONDS = 60.0  # in which training saves
_REASON = re.compile(r"(\[rank\d+\]: )?(error: |[\w.]*(Error|Exception): )")
_FLAGS = {"run": [], "run anew": ["--overwrite"], "resume": ["--resume"]}


class StepFailedError(Exception):
    """A step's command failed; the message is ready to be shown."""


class RunInterruptedError(Exception):
    """The run was asked to stop; the message is the signal's name."""


def run_steps(folder: Path, steps: Sequence[Step], display: ProgressDisplay) -> float:
    """Bring every step to its finished state; returns the seconds of all steps together.

    Raises:
        StepFailedError: at the first command that fails, with the end of its log.
        RunInterruptedError: on Ctrl-C, SIGTERM or SIGHUP, after the command at work has been stopped.
        UserError: if another process works in the same folder.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with _folder_lock(folder) as lock, _stop_signals_raise():
        state = StepState(folder)
        for index, planned in enumerate(state.plan(steps)):
            label = f"[{index + 1:2d}/{len(steps)}] {planned.step.name}"
            if planned.action == "skip":
                display.finish(f"{label}: finished earlier ({planned.seconds:.1f} s), skipped")
                continue
            state.forget_from(index, steps)
            display.start(label)
            seconds = _run_step(planned, folder, state, display, lock)
            display.finish(f"{label}: {seconds:.1f} s{', resumed' if planned.action == 'resume' else ''}")
    return state.total_seconds


def log_file(folder: Path, step: Step) -> Path:
    """Where the terminal output of `step` goes."""
    return folder / "logs" / f"{step.name.replace(' ', '_')}.log"


def _run_step(
    planned: PlannedStep, folder: Path, state: StepState, display: ProgressDisplay, lock: IO[str]
) -> float:
    step = planned.step
    arguments = [*step.command, *_FLAGS[planned.action]]
    record = StepRecord(
        name=step.name,
        status="running",
        fingerprint=planned.fingerprint,
        seconds=planned.seconds,
        command=shlex.join(["python", *arguments]),
    )
    state.save(record)
    started = time.monotonic()

    def save_ended(**changes: object) -> float:
        seconds = round(planned.seconds + time.monotonic() - started, 3)
        state.save(replace(record, seconds=seconds, **changes))  # type: ignore[arg-type]
        return seconds

    log_path = log_file(folder, step)
    try:
        with log_path.open("ab" if planned.action == "resume" else "wb") as log:
            log.write(f"$ {record.command}\n".encode())
            log.flush()
            exit_code = _run_command(arguments, step, log, display, lock)
    except RunInterruptedError:
        save_ended(status="interrupted")
        raise
    missing = missing_outputs(folder, step)
    if exit_code or missing:
        save_ended(status="failed")
        why = f"exit code {exit_code}" if exit_code else f"exit code 0, but no {folder / missing[0]}"
        raise StepFailedError(_failure_message(step, why, log_path))
    return save_ended(status="finished", outputs=hash_outputs(folder, step))


def _environment(step: Step) -> dict[str, str]:
    # Threads that spin while they wait cost minutes where something else uses the cores as well.
    threads = {"OMP_NUM_THREADS": str(step.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    shown_as_it_comes = {"PYTHONUNBUFFERED": "1", INTERVAL_VARIABLE: "1"}
    return threads | shown_as_it_comes


def _run_command(
    arguments: Sequence[str], step: Step, log: IO[bytes], display: ProgressDisplay, lock: IO[str]
) -> int:
    """Run to the end, output to `log` and `display`; when interrupted, stop the command before going on."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | _environment(step),
        # A session of its own: Ctrl-C reaches only the runner, which stops the command in an orderly way.
        start_new_session=True,
        # The command holds the lock too: one that outlives a killed runner still guards the folder.
        pass_fds=(lock.fileno(),),
    )
    assert process.stdout is not None, "stdout is a pipe"
    copier = threading.Thread(target=copy_output, args=(process.stdout, log, display), daemon=True)
    copier.start()
    try:
        return process.wait()
    except RunInterruptedError:
        _stop(process)
        raise
    finally:
        # A grandchild may hold the pipe open after the command has ended: do not wait for it for ever.
        copier.join(timeout=5.0)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _folder_lock(folder: Path) -> Iterator[IO[str]]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another run works in this folder (or a step that it left behind still does); "
                "wait for it, or choose another --folder"
            ) from None
        yield lock


@contextmanager
def _stop_signals_raise() -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into `RunInterruptedError` for as long as steps run."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        for number in signals:  # once is enough: a second signal must not break the orderly stop
            signal.signal(number, signal.SIG_IGN)
        raise RunInterruptedError(signal.Signals(signal_number).name)

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure_message(step: Step, why: str, log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").splitlines()
    tail = lines[-LOG_TAIL_LINES:]
    # A page of warnings may follow what went wrong.
    reasons = [line for line in dict.fromkeys(lines) if _REASON.match(line) and line not in tail]
    shown = "\n".join(f"    {line}" for line in [*tail, *reasons[-LOG_TAIL_LINES:]])
    return f"{shown}\nerror: step '{step.name}' failed ({why}); its whole output: {log_path}"
