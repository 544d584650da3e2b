"""Checkpoints are written beside training, complete or not there; what fails is told and tried again."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.checksum_list import find_damage
from data_prep.errors import StorageError
from pretrain.checkpoints import checkpoint_saving, checkpoint_writer
from pretrain.checkpoints.checkpoint_folder import find_checkpoints, read_description, read_step
from pretrain.checkpoints.checkpoint_writer import FolderPlan, WriterProcess, Written
from pretrain.run_record.history import read_history
from pretrain.train_loop import TrainLoop
from tests.pretrain.tiny_runs import saved_tensors, tiny_recipe, train_in_process

EVERY_STEP = {"interval_steps": 1, "keep_last": 20}


def steps_of(run: Path) -> list[int]:
    """Of the checkpoints of a run."""
    return [read_step(checkpoint) for checkpoint in find_checkpoints(run)]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Facts of one kind of event in a run's history."""
    return [dict(event["facts"]) for event in read_history(run) if event["event"] == kind]


def break_writers(monkeypatch: pytest.MonkeyPatch, broken: set[int], how: Any) -> None:
    """Have the writer processes of the given saves, counted from 1, do `how` instead of writing."""
    whole, count = checkpoint_writer._write_plans, [0]
    start = WriterProcess.__init__

    def counted(self: WriterProcess, *arguments: Any) -> None:
        count[0] += 1
        start(self, *arguments)

    def write(plans: list[FolderPlan], checkpoint: Path) -> Written:
        if count[0] in broken:
            how(checkpoint)
        return whole(plans, checkpoint)

    monkeypatch.setattr(WriterProcess, "__init__", counted)
    monkeypatch.setattr(checkpoint_writer, "_write_plans", write)


def full_disk(checkpoint: Path) -> None:
    """What writing to a full disk says."""
    raise OSError(28, "No space left on device", str(checkpoint / "weights" / "__0_0.distcp"))


def test_a_checkpoint_holds_its_own_step_though_training_went_on(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written slowly, it equals that of a run which stops there; the next step's, the twin, does not."""
    train_in_process(tiny_recipe("base", tmp_path / "short", tiny_blend, training={"steps": 2}))
    break_writers(monkeypatch, {1}, lambda _: time.sleep(1))
    train_in_process(
        tiny_recipe("base", tmp_path / "long", tiny_blend, checkpoint={"interval_steps": 2, "keep_last": 9})
    )
    saved = events(tmp_path / "long", "saved")
    assert saved[0]["step"] == 2
    assert saved[0]["seconds"] > 1
    assert saved[0]["blocked_seconds"] < saved[0]["seconds"]
    first, *_, last = find_checkpoints(tmp_path / "long")
    short = read_description(find_checkpoints(tmp_path / "short")[-1])
    assert read_description(first).fingerprints == short.fingerprints != read_description(last).fingerprints
    ours, theirs = saved_tensors(first), saved_tensors(tmp_path / "short")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (full_disk, "rank 0: .*__0_0.distcp: No space left on device"),
        (lambda _: os.kill(os.getpid(), signal.SIGKILL), "rank 0: the writer process ended with -9"),
        (lambda _: time.sleep(60), "rank 0: writing took more than 1 s"),
    ],
    ids=["full disk", "killed", "hanging"],
)
def test_a_failed_save_is_told_and_tried_again(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch, how: Any, reason: str
) -> None:
    """Training goes on, nothing of it is left, and the next attempt holds a later step."""
    break_writers(monkeypatch, {2}, how)
    slow_steps(monkeypatch, 0.3)
    train_in_process(
        tiny_recipe(
            "base",
            tmp_path / "run",
            tiny_blend,
            training={"steps": 8, "micro_batch_size": 8},
            checkpoint={"interval_steps": 2, "keep_last": 9, "write_timeout_seconds": 1},
        )
    )
    (failed,) = events(tmp_path / "run", "save_failed")
    assert failed["step"] == 4
    assert re.match(reason, failed["reason"])
    assert 4 not in steps_of(tmp_path / "run")
    assert {2, 8} <= set(steps_of(tmp_path / "run"))
    assert list((tmp_path / "run" / "checkpoints").glob("*.partial")) == []


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have every step take at least so long."""
    whole = TrainLoop.train_step

    def step(self: TrainLoop, *arguments: Any) -> Any:
        time.sleep(seconds)
        return whole(self, *arguments)

    monkeypatch.setattr(TrainLoop, "train_step", step)


def test_the_last_checkpoint_is_waited_for(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two failures, then it is there."""
    monkeypatch.setattr(checkpoint_saving, "LAST_ATTEMPTS_AFTER_SECONDS", (0, 0))
    break_writers(monkeypatch, {1, 2}, full_disk)
    train_in_process(
        tiny_recipe(
            "base", tmp_path / "run", tiny_blend, training={"steps": 2}, checkpoint={"interval_steps": 9}
        )
    )
    assert steps_of(tmp_path / "run") == [2]


def test_a_last_checkpoint_that_cannot_be_written_ends_the_run(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the code of a full disk, the checkpoint before untouched."""
    monkeypatch.setattr(checkpoint_saving, "LAST_ATTEMPTS_AFTER_SECONDS", (0,))
    break_writers(monkeypatch, {2, 3}, full_disk)
    recipe = tiny_recipe(
        "base", tmp_path / "run", tiny_blend, training={"steps": 4}, checkpoint={"interval_steps": 3}
    )
    with pytest.raises(
        StorageError, match=r"step_00000004: could not be written .*No space left.*step_00000003"
    ):
        train_in_process(recipe)
    assert steps_of(tmp_path / "run") == [3]
    assert find_damage(find_checkpoints(tmp_path / "run")[-1]) is None
    assert events(tmp_path / "run", "end")[-1]["exit_code"] == 4


def test_a_save_that_is_due_waits_for_the_one_before(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two are never written at once; the steps in between have none, and this is said."""
    break_writers(monkeypatch, {1}, lambda _: time.sleep(2))
    train_in_process(tiny_recipe("base", tmp_path / "run", tiny_blend, checkpoint=EVERY_STEP))
    assert steps_of(tmp_path / "run")[0] == 1
    assert steps_of(tmp_path / "run")[-1] == 6
    assert "the checkpoint of step 1 is still being written" in capsys.readouterr().out


def test_old_checkpoints_go_but_for_those_kept_for_good(tmp_path: Path, tiny_blend: Path) -> None:
    """Of seven, the last two and the multiples of three."""
    config = tiny_recipe(
        "base",
        tmp_path / "run",
        tiny_blend,
        training={"steps": 7},
        checkpoint={"interval_steps": 1, "keep_last": 2, "keep_every_steps": 3},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TrainLoop, "save", lambda self, step: self.saver.save_and_wait(lambda: self.snapshot(step), step)
        )
        train_in_process(config)
    assert steps_of(tmp_path / "run") == [3, 6, 7]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path, tiny_blend: Path) -> None:
    """And it never counts as a checkpoint."""
    run = tmp_path / "run"
    train_in_process(tiny_recipe("base", run, tiny_blend, training={"steps": 2}))
    half = run / "checkpoints" / "step_00000005.partial"
    (half / "weights").mkdir(parents=True)
    assert steps_of(run) == [2]
    train_in_process(tiny_recipe("base", run, tiny_blend, training={"steps": 3}), resume=True)
    assert not half.exists()
