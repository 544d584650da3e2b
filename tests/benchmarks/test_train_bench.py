"""The training benchmark measures real runs, of the same losses; its ratios are what their names say."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.train_bench import WAYS, TrainBenchConfig, run
from benchmarks.train_bench_figures import (
    comparison_table,
    figures_of,
    ideal_ratio,
    largest_difference,
    ways_table,
)
from benchmarks.train_bench_setup import (
    DEFAULT_SIZES,
    SMALL_SIZES,
    bench_recipe,
    make_data,
    make_starts,
    start_name,
)
from benchmarks.train_bench_worker import TimedReader, WorkerConfig, memory_gib, train_plain
from pretrain.config import RunConfig, StageName
from pretrain.flops import block_flops, block_product_flops
from pretrain.recipes import load_recipe
from tests.repository_rules import ROOT

SAME_LOSS = 1e-6
STEPS, WARMUP_STEPS = 2, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train_bench")


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    """What the benchmark finds at small sizes; every process of it is real."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run(
            TrainBenchConfig(folder=folder, rounds=1, steps=STEPS, warmup_steps=WARMUP_STEPS, small=True)
        )


def test_every_way_trains_as_many_steps_as_asked(content: dict[str, Any]) -> None:
    assert set(content["reports"]) == {way.name for way in WAYS}
    for (report,) in content["reports"].values():
        assert len(report["seconds"]) == len(report["losses"]) == len(report["peak_gib"]) == STEPS + 1
        assert 0 < report["libraries_gib"] < report["peak_gib"][-1]
        assert report["threads"] == 1  # small sizes take one core


def test_plain_training_has_the_same_losses(content: dict[str, Any]) -> None:
    assert set(content["loss_difference"]) == {"idm", "policy"}
    assert max(content["loss_difference"].values()) < SAME_LOSS


def test_with_other_noise_it_has_not(folder: Path, content: dict[str, Any]) -> None:
    work, ours = folder / "train_small", content["reports"]["idm"][0]["losses"]
    config = WorkerConfig(
        program="plain",
        recipe=work / "idm.yaml",
        steps=STEPS + WARMUP_STEPS,
        inputs=work / "inputs_idm.pt",
        our_noise=True,
    )
    recipe = load_recipe(config.recipe, [])
    assert largest_difference(ours, train_plain(config, recipe).losses) < SAME_LOSS
    other = train_plain(config, dataclasses.replace(recipe, seed=1))
    assert largest_difference(ours, other.losses) > 10 * SAME_LOSS


def test_waiting_for_data_is_a_part_of_the_step(content: dict[str, Any]) -> None:
    assert 0 < content["data_stall"] < 1
    report = content["reports"]["idm"][0]
    for reading, whole in zip(report["reading_seconds"], report["seconds"], strict=True):
        assert 0 < reading < whole
    assert {name: len(seconds) for name, seconds in content["stall_seconds"].items()} == {
        "loader": STEPS + 1,
        "memory": STEPS + 1,
    }


def test_tables_show_every_way_and_bar(content: dict[str, Any]) -> None:
    assert list(ways_table(content).columns[0].cells) == [way.name for way in WAYS]
    bars = [cell for cell in comparison_table(content).columns[2].cells if cell]
    assert bars[:3] == [">= 1.65", ">= 90%", ">= 1.0"]


def test_data_and_starts_are_kept(folder: Path, content: dict[str, Any]) -> None:
    work = folder / "train_small"
    kept = [work / start_name(stage) / "config.yaml" for stage in ("base", "idm")]
    before = [path.stat().st_mtime_ns for path in kept]
    make_data(SMALL_SIZES, work)
    make_starts(SMALL_SIZES, work, work / "log.txt")
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_another_start_is_not_kept(folder: Path, content: dict[str, Any]) -> None:
    """Were the recipe not compared, stages would start from a run of other settings."""
    work = folder / "train_small"
    saved = work / start_name("idm") / "config.yaml"
    right = saved.read_text()
    saved.write_text(right.replace("seed: 42", "seed: 43"))
    make_starts(SMALL_SIZES, work, work / "log.txt")
    assert saved.read_text() == right


def report(
    seconds: float, reading: float = 0.0, peak: float = 1.0, libraries: float = 0.5
) -> dict[str, list[float] | float]:
    """A report whose warm-up step would spoil every figure."""
    return {
        "seconds": [1000.0, seconds],
        "reading_seconds": [1000.0, reading],
        "peak_gib": [peak / 2, peak],
        "libraries_gib": libraries,
    }


def recipes() -> dict[StageName, RunConfig]:
    stages: tuple[StageName, ...] = ("idm", "policy")
    return {stage: bench_recipe(DEFAULT_SIZES, Path("folder"), stage, 1, stage) for stage in stages}


def test_figures() -> None:
    reports = {
        "base": [report(12), report(20), report(16)],
        "idm": [report(8, 0.5, peak=3), report(7, 0.4, peak=2), report(9, 0.6)],
        "policy": [report(10)],
        "plain_idm": [report(10)],
        "plain_policy": [report(5)],
    }
    stall = {"loader": [0.0, 5.0, 6.0, 7.0], "memory": [99.0, 4.0, 6.0, 5.0]}
    found = figures_of(reports, stall, recipes(), warmup_steps=1)
    assert (found["stage1_vs_full"], found["stage2_vs_full"]) == (2.0, 1.6)
    assert (found["stage1_vs_plain"], found["stage2_vs_plain"]) == (1.25, 0.5)
    assert found["stage1_ideal"] == ideal_ratio(recipes()["idm"])
    assert found["memory"] == {"base": 1, "idm": 3, "policy": 1, "plain_idm": 1, "plain_policy": 1}
    assert found["memory_above_libraries"]["idm"] == 2.5
    assert found["memory_after_warmup"]["idm"] == 1.5
    assert found["data_stall"] == 0.5 / 8
    assert found["data_stall_beside_memory"] == pytest.approx(0.2)
    assert found["tokens_per_second"]["policy"] == 8 * 256 / 10


def test_largest_difference_is_relative_and_of_equally_long_curves() -> None:
    assert largest_difference([2.0, 4.0], [2.0, 5.0]) == 0.25
    with pytest.raises(ValueError, match="shorter"):
        largest_difference([1.0, 2.0], [1.0])


def test_sizes_are_in_the_proportions_of_llama_8b() -> None:
    """Work of head and of attention beside a block's, and depth of the action modules beside the base's."""
    llama = load_recipe(ROOT / "configs" / "idm_llama31_8b.yaml", [])
    ours = recipes()["idm"]
    for one, other in (
        (head_share(ours), head_share(llama)),
        (attention_share(ours), attention_share(llama)),
    ):
        assert one == pytest.approx(other, rel=0.1)
    assert ideal_ratio(ours) == pytest.approx(ideal_ratio(llama), rel=0.05)
    for part in ("num_idm_layers", "num_merge_layers", "num_policy_layers"):
        assert getattr(ours.actions, part) / ours.model.num_layers == pytest.approx(
            getattr(llama.actions, part) / llama.model.num_layers
        )


def head_share(config: RunConfig) -> float:
    """A head's work beside that of all blocks of the base."""
    blocks = config.model.num_layers * block_flops(config.model, config.data.sequence_length)
    return 2 * config.model.hidden_size * config.model.vocab_size / blocks


def attention_share(config: RunConfig) -> float:
    """Of scores and weighted values in a block's work."""
    return 1 - block_product_flops(config.model) / block_flops(config.model, config.data.sequence_length)


def test_the_clock_at_the_loader_counts_reading_only() -> None:
    def slow() -> Iterator[Any]:
        for number in range(2):
            time.sleep(0.05)
            yield number

    reader = TimedReader(slow())
    next(reader)
    once = reader.seconds
    time.sleep(0.05)
    assert 0.05 <= once == reader.seconds
    assert len(list(reader)) == 1
    assert reader.seconds >= once + 0.05


def test_memory_is_read_in_gib() -> None:
    before = memory_gib("RssAnon")
    block = bytearray(b"x") * (200 << 20)
    assert memory_gib("RssAnon") - before == pytest.approx(len(block) / 2**30, abs=0.02)


def test_nothing_to_time_is_refused(tmp_path: Path) -> None:
    command = ["benchmarks/train_bench.py", "--steps", "0", "--rounds", "0", "--folder", str(tmp_path)]
    answer = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr == "error: --rounds 0 must be at least 1; --steps 0 must be at least 1\n"
    assert not list(tmp_path.iterdir())
