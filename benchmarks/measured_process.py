"""Run a command as a whole process on chosen cores, and account for it."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError

OUTPUT_TAIL_CHARACTERS = 2_000


@dataclass(frozen=True, kw_only=True)
class ProcessFigures:
    """What a finished command took."""

    wall_seconds: float
    cpu_seconds: float
    """User and system time of the process and its children."""
    peak_gib: float
    """Memory of the largest single process."""


def run_measured(command: list[str], cores: int, log: Path) -> ProcessFigures:
    """Run a Python command on the last `cores` cores, with one thread a library.

    Args:
        command: arguments after the interpreter.
        cores: how many cores it may use.
        log: file for what it prints.

    Raises:
        UserError: it failed; the message ends as its output did.
    """
    allowed = sorted(os.sched_getaffinity(0))[-cores:]
    environment = {
        **os.environ,
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("ab") as stream:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-OUTPUT_TAIL_CHARACTERS:]
        raise UserError(f"{' '.join(command)} ended with exit code {process.returncode}:\n{tail}")
    return ProcessFigures(
        wall_seconds=wall_seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_gib=usage.ru_maxrss / 2**20,
    )


def add_figures(parts: list[ProcessFigures]) -> ProcessFigures:
    """Figures of commands that ran one after another."""
    return ProcessFigures(
        wall_seconds=sum(part.wall_seconds for part in parts),
        cpu_seconds=sum(part.cpu_seconds for part in parts),
        peak_gib=max(part.peak_gib for part in parts),
    )
