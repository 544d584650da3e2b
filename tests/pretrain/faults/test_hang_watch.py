"""A process that stands still writes what its threads were doing and ends with a code of its own."""

import subprocess
import sys

import pytest

from data_prep.errors import HANG_EXIT_CODE
from pretrain.faults.hang_watch import HangWatch

SLEEPS = """
import threading, time
import pretrain.faults.hang_watch as watch
watch.GRACE_SECONDS, watch.START_LIMIT_SECONDS = 0.2, {start}
def a_function_that_hangs(): time.sleep(60)
with watch.HangWatch({limit}) as w:
    for _ in range({beats}):
        w.beat()
        time.sleep(0.2)
    {then}
"""
HOLDS_THE_INTERPRETER = (
    "import ctypes; ctypes.PyDLL(None).sleep(60)"  # as a C extension that never lets go of it
)


def run(limit: float, beats: int, then: str, start: float = 30) -> subprocess.CompletedProcess[str]:
    """A process that beats and then does something else."""
    code = SLEEPS.format(limit=limit, beats=beats, then=then, start=start)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50
    )


@pytest.mark.parametrize(("start", "beats"), [(30, 1), (1, 0)], ids=["after a step", "before the first"])
def test_a_hang_ends_the_process_and_shows_where_it_was(start: float, beats: int) -> None:
    ended = run(1, beats, "a_function_that_hangs()", start)
    assert ended.returncode == HANG_EXIT_CODE
    assert "no progress for" in ended.stderr
    assert "in a_function_that_hangs" in ended.stderr


def test_a_hang_that_lets_no_python_run_ends_too() -> None:
    ended = run(1, 1, HOLDS_THE_INTERPRETER)
    assert ended.returncode == 1
    assert "in <module>" in ended.stderr


def test_a_process_that_goes_on_is_left_alone() -> None:
    """Longer than the limit altogether; the twin, without beats in between, is the test above."""
    assert run(1, 8, "pass").returncode == 0


def test_it_watches_only_inside_its_block() -> None:
    with HangWatch(60) as watch:
        watch.beat()
    assert not watch._thread.is_alive()
