"""A measured command is accounted for, kept to its cores, and its failure is shown."""

from pathlib import Path

import pytest

from benchmarks.measured_process import add_figures, run_measured
from data_prep.errors import UserError


def test_time_and_memory_of_a_process(tmp_path: Path) -> None:
    busy = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.2: pass\nbytearray(200 << 20)"
    figures = run_measured(["-c", busy], 1, tmp_path / "log")
    assert 0.2 <= figures.cpu_seconds <= figures.wall_seconds + 0.1
    assert figures.peak_gib >= 200 / 1024
    both = add_figures([figures, figures])
    assert both.wall_seconds == 2 * figures.wall_seconds
    assert both.peak_gib == figures.peak_gib


def test_cores_are_limited(tmp_path: Path) -> None:
    run_measured(["-c", "import os; print(len(os.sched_getaffinity(0)))"], 1, tmp_path / "log")
    assert (tmp_path / "log").read_text().strip() == "1"


def test_a_failure_shows_the_end_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ended with exit code 3:\nthe reason"):
        run_measured(["-c", "print('the reason', flush=True); raise SystemExit(3)"], 1, tmp_path / "log")
