"""Metrics are read as they were written; a line that is none is named."""

import json
from pathlib import Path

import pytest

from data_prep.errors import UserError
from evaluation.run_metrics import RunMetrics, read_metrics


def line(step: int, split: str = "train", stage: str = "idm", **figures: object) -> str:
    return json.dumps({"step": step, "stage": stage, "split": split, **figures})


def read(folder: Path, *lines: str) -> RunMetrics:
    path = folder / "metrics.jsonl"
    path.write_text("".join(text + "\n" for text in lines))
    return read_metrics(path)


def test_series_keep_step_and_split(tmp_path: Path) -> None:
    run = read(tmp_path, line(2, loss=3.0), line(1, loss=4.0), line(2, "validation", loss=5.0), line(3))
    assert run.series("loss").steps == [1, 2]
    assert run.series("loss").values == [4.0, 3.0]
    assert run.series("loss", "validation").values == [5.0]


def test_of_a_step_logged_twice_the_later_line_counts(tmp_path: Path) -> None:
    run = read(tmp_path, line(1, loss=4.0), line(2, loss=9.0), line(2, loss=3.0))
    assert run.series("loss").values == [4.0, 3.0]


def test_objective_leaves_out_the_regulariser_and_the_greedy_loss_of_the_policy(tmp_path: Path) -> None:
    assert read(tmp_path, line(1, loss=1.0, prediction_loss=2.0)).objective().values == [2.0]
    policy = read(
        tmp_path,
        line(1, stage="policy", loss=1.0),
        line(1, "validation", stage="policy", loss=1.5, prediction_loss=6.0),
    )
    assert policy.objective().values == [1.0]
    assert policy.objective("validation").values == [1.5]


def test_throughput_is_the_median_after_the_first_tenth(tmp_path: Path) -> None:
    speeds = [1.0, 1.0, *[100.0] * 8, 500.0, *[100.0] * 9]
    run = read(tmp_path, *(line(step, tokens_per_second=speed) for step, speed in enumerate(speeds)))
    assert run.median_tokens_per_second() == 100.0
    few = read(
        tmp_path, *(line(step, tokens_per_second=speed) for step, speed in enumerate([1.0, *range(10, 19)]))
    )
    assert few.median_tokens_per_second() == 14.0
    assert read(tmp_path, line(1)).median_tokens_per_second() is None


def test_action_fractions_by_time(tmp_path: Path) -> None:
    run = read(tmp_path, line(1, action_fractions=[0.5, 0.5]), line(2), line(3, action_fractions=[1.0, 0.0]))
    steps, fractions_TA = run.action_fractions()
    assert steps == [1, 3]
    assert fractions_TA.tolist() == [[0.5, 0.5], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "metrics.jsonl:1: the line: Invalid JSON"),
        ([line(1), line(2, loss="high")], "metrics.jsonl:2: loss: "),
        ([line(1), '{"step": 2}'], "metrics.jsonl:2: stage: Field required"),
        ([line(1, "validation")], "has no train line"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, *lines)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train the run first"):
        read_metrics(tmp_path / "metrics.jsonl")
