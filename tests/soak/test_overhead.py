"""The overhead benchmark reads times of steps as they passed."""

import json
from pathlib import Path

import pytest

from pretrain.config import METRICS_FILE
from soak.overhead import figures, step_times


def test_step_times_hold_all_that_lies_between(tmp_path: Path) -> None:
    ends = [(1, "train", 2.0), (2, "train", 3.5), (2, "validation", 4.0), (3, "train", 6.0)]
    lines = [json.dumps({"step": s, "split": split, "elapsed_seconds": t}) + "\n" for s, split, t in ends]
    (tmp_path / METRICS_FILE).write_text("".join(lines))
    assert step_times(tmp_path) == [1.5, 2.5]


def test_figures() -> None:
    assert figures([1.0, 2.0, 6.0]) == pytest.approx({"mean": 3.0, "median": 2.0, "most": 6.0})
