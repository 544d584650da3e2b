"""Means over micro-batches and steps, how actions are used, and the lines of metrics.jsonl.

Shapes: A actions.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import RunConfig
from pretrain.metrics import (
    WANDB_ID_FILE,
    MeanOfSteps,
    MetricsWriter,
    action_usage,
    drop_lines_after,
    peak_memory_gib,
)
from pretrain.parallel import ParallelContext
from pretrain.stages.contract import StageLoss
from tests.pretrain.tiny_runs import tiny_recipe


def micro_batch(loss: float, counts: list[int] | None = None) -> StageLoss:
    """What a stage reports: `regulariser` is a tenth of the loss."""
    means = {"loss": torch.tensor(loss), "regulariser": torch.tensor(loss / 10)}
    counts_A = None if counts is None else torch.tensor(counts).float()
    return StageLoss(torch.tensor(loss), means, counts_A)


def test_a_step_is_the_mean_of_its_micro_batches_and_a_line_that_of_its_steps(
    context: ParallelContext,
) -> None:
    means = MeanOfSteps(context)
    means.add_step([micro_batch(1.0), micro_batch(4.0)])
    assert means.summary() == pytest.approx({"loss": 2.5, "regulariser": 0.25})
    means.add_step([micro_batch(5.0), micro_batch(6.0)])
    assert means.summary() == pytest.approx({"loss": 4.0, "regulariser": 0.4})


def test_action_counts_are_those_of_all_micro_batches_and_steps(context: ParallelContext) -> None:
    """Not those of the last micro-batch, in which only one action is alive."""
    means = MeanOfSteps(context)
    means.add_step([micro_batch(1.0, [3, 0, 0, 0]), micro_batch(1.0, [0, 1, 0, 0])])
    means.add_step([micro_batch(1.0, [0, 3, 0, 0]), micro_batch(1.0, [0, 0, 1, 0])])
    summary = means.summary()
    assert summary["action_fractions"] == [0.375, 0.5, 0.125, 0.0]
    assert (summary["alive_actions"], summary["most_used_action"]) == (3, 1)
    assert means.steps == 2


def test_a_stage_without_actions_has_none_in_its_line(context: ParallelContext) -> None:
    means = MeanOfSteps(context)
    means.add_step([micro_batch(1.0)])
    assert means.summary().keys() == {"loss", "regulariser"}


@pytest.mark.parametrize(
    ("counts", "alive", "perplexity", "most_used", "fraction"),
    [
        ([4, 4, 4, 4], 4, 4.0, 0, 0.25),
        ([0, 7, 0, 0], 1, 1.0, 1, 1.0),
        ([0, 0, 5, 5], 2, 2.0, 2, 0.5),
        ([1, 0, 0, 3], 2, math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)), 3, 0.75),
    ],
)
def test_usage_of_hand_made_counts(
    counts: list[int], alive: int, perplexity: float, most_used: int, fraction: float
) -> None:
    assert action_usage(torch.tensor(counts).float()) == {
        "alive_actions": alive,
        "action_perplexity": pytest.approx(perplexity),
        "most_used_action": most_used,
        "most_used_action_fraction": fraction,
        "action_fractions": [count / sum(counts) for count in counts],
    }


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=64).filter(any), st.integers(1, 8))
def test_usage_is_of_shares_and_perplexity_lies_between_one_and_the_alive(
    counts: list[int], ranks: int
) -> None:
    """Counts averaged over ranks give the same as counts summed."""
    usage = action_usage(torch.tensor(counts).double())
    averaged = action_usage(torch.tensor(counts).double() / ranks)
    assert averaged["alive_actions"] == usage["alive_actions"] == sum(count > 0 for count in counts)
    assert averaged["action_perplexity"] == pytest.approx(usage["action_perplexity"])
    perplexity, alive = usage["action_perplexity"], usage["alive_actions"]
    assert isinstance(perplexity, float) and isinstance(alive, int)
    assert 1 - 1e-6 <= perplexity <= alive + 1e-6


def lines_of(path: Path) -> list[dict[str, object]]:
    """All lines, each of which must be whole."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    """Of either split; a run that resumes from step 20 has never been further."""
    path = tmp_path / "metrics.jsonl"
    written = [{"step": step, "split": split} for step in (10, 20, 30) for split in ("train", "validation")]
    path.write_text("".join(json.dumps(line) + "\n" for line in written))
    drop_lines_after(path, 20)
    assert lines_of(path) == [line for line in written if line["step"] in (10, 20)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(0, 200), step=st.integers(0, 5))
def test_a_file_cut_anywhere_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int, step: int
) -> None:
    """A crash cuts the file at any byte; what remains is whole lines, each as it was, newline and all."""
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    whole = "".join(json.dumps({"step": n, "loss": 1.5 * n, "split": "train"}) + "\n" for n in range(1, 6))
    path.write_text(whole[:cut])
    drop_lines_after(path, step)
    assert path.read_text() == "" or path.read_text().endswith("\n")
    for line in path.read_text().splitlines():
        assert f"{line}\n" in whole and json.loads(line)["step"] <= step
    complete = [line for line in whole[:cut].splitlines() if line.endswith("}")]
    assert len(lines_of(path)) == min(len(complete), step)


def test_no_file_is_no_error_and_none_is_made(tmp_path: Path) -> None:
    drop_lines_after(tmp_path / "metrics.jsonl", 10)
    assert list(tmp_path.iterdir()) == []


def recipe(folder: Path) -> RunConfig:
    """A run whose folder exists and that has no wandb."""
    return tiny_recipe("base", folder, Path("data"))


def test_the_writer_appends_lines_and_resumes_after_the_checkpoint(
    tmp_path: Path, context: ParallelContext
) -> None:
    for first_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with MetricsWriter(recipe(tmp_path), context, first_step) as writer:
            for step in steps:
                writer.step_done()
                writer.write({"step": step, "split": "train", "loss": first_step + 0.5})
    lines = lines_of(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.5), (3, 2.5), (4, 2.5)]


def test_without_a_login_wandb_keeps_the_run_on_disk(
    tmp_path: Path, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` asks nobody and reaches nothing; with `off` there is no folder at all."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for mode, runs in (("off", 0), ("auto", 1)):
        config = tiny_recipe("base", tmp_path, Path("data"), logging={"wandb": mode})
        with MetricsWriter(config, context, 0) as writer:
            writer.write({"step": 1, "split": "train", "loss": 1.0})
        assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == runs


def test_wandb_has_one_run_over_all_starts(tmp_path: Path, context: ParallelContext) -> None:
    """Its id lies in the run folder: where it is taken away, as with --overwrite, another run begins."""
    config = tiny_recipe("base", tmp_path, Path("data"), logging={"wandb": "offline"})
    ids = []
    for start in range(3):
        if start == 2:
            (tmp_path / WANDB_ID_FILE).unlink()
        with MetricsWriter(config, context, 0) as writer:
            assert writer.wandb_run is not None
            ids.append(writer.wandb_run.id)
    assert ids[0] == ids[1] != ids[2]
    assert (tmp_path / WANDB_ID_FILE).read_text() == f"{ids[2]}\n"


def test_only_the_first_rank_writes(tmp_path: Path, context: ParallelContext) -> None:
    second_rank = dataclasses.replace(context, rank=1)
    with MetricsWriter(recipe(tmp_path), second_rank, 0) as writer:
        writer.step_done()
        writer.write({"step": 1, "split": "train", "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_memory_is_the_peak_of_this_process(context: ParallelContext) -> None:
    """In GiB, as the kernel reports it in KiB."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    assert peak_memory_gib(context) == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)
