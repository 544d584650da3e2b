"""A run goes on from its newest checkpoint that is still what was written, and never from a damaged one."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from data_prep.checksum_list import CHECKSUM_LIST
from data_prep.errors import IntegrityError, StoppedError
from pretrain.checkpoints import resume
from pretrain.checkpoints.checkpoint_folder import DESCRIPTION_FILE, find_checkpoints, step_folder
from pretrain.checkpoints.resume import newest_described, newest_whole
from pretrain.parallel import parallel_context
from pretrain.run_record.history import History, read_history
from pretrain.train_loop import TrainLoop
from tests.pretrain.tiny_runs import metrics, saved_tensors, tiny_recipe, train_in_process

TIMES = ("elapsed_seconds", "tokens_per_second", "tflops_per_second", "memory_gib")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """A run of six steps, saved at the third and the last."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train_in_process(tiny_recipe("base", run, tiny_blend))
    return run


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def stop_in_step(patch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Have this process get a signal in the middle of a step of the next run."""
    whole, count = TrainLoop.train_step, [0]

    def interrupted(self: TrainLoop, *arguments: Any) -> Any:
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), number)
        return whole(self, *arguments)

    patch.setattr(TrainLoop, "train_step", interrupted)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(content))
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip_a_bit,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "two bytes short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "gone": Path.unlink,
    "a stranger beside it": lambda path: path.with_name("stranger").write_bytes(b"1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_is_found(run: Path, damage: str) -> None:
    """File by file; the checkpoint is set aside, the one before is taken, and that is recorded."""
    newest = step_folder(run, 6)
    names = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(names) >= 9
    history = History(run)
    with parallel_context(tensor_parallel_size=1, seed=0) as context:
        for name in names:
            whole = run.parent / "whole"
            shutil.copytree(newest, whole)
            DAMAGES[damage](newest / name)
            assert newest_whole(run, context, history) == step_folder(run, 3), name
            assert not newest.exists()
            shutil.rmtree(newest.with_name(newest.name + ".damaged"))
            whole.rename(newest)
        assert newest_whole(run, context, history) == newest
    fell_back = [event["facts"] for event in read_history(run) if event["event"] == "fell_back"]
    assert [(facts["step"], facts["to_step"]) for facts in fell_back] == [(6, 3)] * len(names)


def test_the_run_goes_on_from_the_one_before_to_the_same_end(
    run: Path, straight: Path, tiny_blend: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, optimizer and every logged figure are those of the run that nothing happened to."""
    flip_a_bit(next((step_folder(run, 6) / "optimizer").glob("*.distcp")))
    train_in_process(tiny_recipe("base", run, tiny_blend), resume=True)
    assert (
        "step_00000006 is damaged: optimizer/__0_0.distcp is not what was written" in capsys.readouterr().out
    )
    ours, expected = saved_tensors(run), saved_tensors(straight)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
    lines = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(r)] for r in (run, straight)
    ]
    assert lines[0] == lines[1]
    starts = [event["facts"] for event in read_history(run) if event["event"] == "start"]
    assert [(facts["from_step"], facts["lost_steps"]) for facts in starts] == [(0, 0), (3, 3)]


def test_without_verification_damage_is_trained_on(
    run: Path, straight: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault twin: a bit of Adam's moments is flipped, and nobody notices."""
    shutil.rmtree(step_folder(run, 6))
    file = next((step_folder(run, 3) / "optimizer").glob("*.distcp"))
    moment = saved_tensors(step_folder(run, 3))["optimizer/optimizer.state.exp_avg.base.output_layer.weight"]
    content = bytearray(file.read_bytes())
    place = content.find(moment.numpy().tobytes())
    assert place >= 0
    content[place + 3] ^= 1  # the top byte of a float32
    file.write_bytes(content)
    monkeypatch.setattr(resume, "find_damage", lambda *_: None)
    train_in_process(tiny_recipe("base", run, tiny_blend), resume=True)
    ours, expected = saved_tensors(run), saved_tensors(straight)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] != []


@pytest.mark.parametrize("how", ["damaged", "deleted"])
def test_a_run_that_was_saved_does_not_begin_anew_by_itself(run: Path, tiny_blend: Path, how: str) -> None:
    for checkpoint in find_checkpoints(run):
        if how == "damaged":
            flip_a_bit(checkpoint / "weights" / ".metadata")
        else:
            shutil.rmtree(checkpoint)
    with pytest.raises(IntegrityError, match=r"no checkpoint is whole any more; .*--overwrite"):
        train_in_process(tiny_recipe("base", run, tiny_blend), resume=True)
    assert (run / "metrics.jsonl").exists()


def test_a_run_that_was_never_saved_begins(tmp_path: Path, tiny_blend: Path) -> None:
    """Killed before its first checkpoint, it does the same steps again."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train_loop.TrainLoop.describe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_in_process(tiny_recipe("base", run, tiny_blend))
    train_in_process(tiny_recipe("base", run, tiny_blend), resume=True)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    ends = [event["facts"] for event in read_history(run) if event["event"] == "end"]
    assert [facts["exit_code"] for facts in ends] == [1, 0]


def test_a_damaged_description_is_not_believed(run: Path) -> None:
    """Not even where it can still be read."""
    file = step_folder(run, 6) / DESCRIPTION_FILE
    file.write_text(file.read_text().replace('"seed": 42', '"seed": 43'))
    assert newest_described(run) == step_folder(run, 3)
    (step_folder(run, 3) / CHECKSUM_LIST).unlink()
    assert newest_described(run) is None


def test_a_checkpoint_between_two_log_lines_continues_the_line(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage idm, logged every four steps, asked to stop after the second: means and counts are those of all four."""
    train_in_process(tiny_recipe("base", tmp_path / "base", tiny_blend, training={"steps": 1}))
    for name in ("straight", "resumed"):
        recipe = tiny_recipe(
            "idm",
            tmp_path / name,
            tiny_blend,
            tmp_path / "base",
            training={"steps": 4},
            logging={"interval_steps": 4},
        )
        if name == "resumed":
            with monkeypatch.context() as patch:
                stop_in_step(patch, 2, signal.SIGUSR1)
                with pytest.raises(StoppedError, match="after step 2"):
                    train_in_process(recipe)
        train_in_process(recipe, resume=True)
    lines = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(tmp_path / name)]
        for name in ("straight", "resumed")
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_asked_to_stop_saves_and_goes_on_as_if_it_had_not(
    straight: Path, tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 4, number)
        with pytest.raises(StoppedError, match="after step 4, which is saved") as stopped:
            train_in_process(tiny_recipe("base", run, tiny_blend))
    assert stopped.value.exit_code == 75
    assert signal.getsignal(number) == handler
    assert find_checkpoints(run)[-1] == step_folder(run, 4)
    train_in_process(tiny_recipe("base", run, tiny_blend), resume=True)
    ours, expected = saved_tensors(run), saved_tensors(straight)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
    ends = [event["facts"]["exit_code"] for event in read_history(run) if event["event"] == "end"]
    assert ends == [75, 0]


def test_loader_processes_outlive_a_signal_to_all(
    tmp_path: Path, tiny_blend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler signals them too: the run still saves, and is still told to go on later."""
    whole, count = TrainLoop.train_step, [0]

    def interrupted(self: TrainLoop, *arguments: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            for process in psutil.Process().children():
                process.send_signal(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return whole(self, *arguments)

    monkeypatch.setattr(TrainLoop, "train_step", interrupted)
    with pytest.raises(StoppedError, match="after step 2"):
        train_in_process(tiny_recipe("base", tmp_path / "run", tiny_blend, data={"loader_workers": 1}))
    assert find_checkpoints(tmp_path / "run") == [step_folder(tmp_path / "run", 2)]
