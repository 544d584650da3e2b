"""From the seconds, losses and memory of each process to the figures of the training benchmark, and their tables."""

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from pretrain.config import RunConfig, StageName
from pretrain.flops import flops_per_token, full_training_flops
from pretrain.recipes import load_recipe

BARS = {
    "stage1_vs_full": 1.65,
    "stage2_vs_full": 1.55,
    "share_of_ideal": 0.9,
    "vs_plain": 1.0,
    "data_stall": 0.01,
}
STAGE_NUMBERS: dict[StageName, str] = {"idm": "stage1", "policy": "stage2"}
CONFIGS = Path(__file__).parents[1] / "configs"

Reports = dict[str, list[dict[str, Any]]]


def ideal_ratio(config: RunConfig) -> float:
    """How many times as fast as full training the stage is where every FLOP takes the same time."""
    return full_training_flops(config) / sum(flops_per_token(config).values())


def largest_difference(ours: list[float], other: list[float]) -> float:
    """Largest relative difference of two loss curves, step by step; ValueError if one is longer."""
    return max(abs(one - two) / abs(one) for one, two in zip(ours, other, strict=True))


def figures_of(
    reports: Reports, stall: dict[str, Any], recipes: Mapping[StageName, RunConfig], warmup_steps: int
) -> dict[str, Any]:
    """The ratios and what they are made of.

    Args:
        reports: of each way, a report of benchmarks/train_bench_worker.py a round.
        stall: seconds of steps with the loader and of steps with a batch in memory.
        recipes: of the two stages.
        warmup_steps: first steps of each process that do not count.
    """
    medians = {
        name: statistics.median(seconds_after(runs, "seconds", warmup_steps))
        for name, runs in reports.items()
    }
    reading = statistics.median(seconds_after(reports["idm"], "reading_seconds", warmup_steps))
    with_loader, from_memory = (
        statistics.median(stall[name][warmup_steps:]) for name in ("loader", "memory")
    )
    tokens_per_step = recipes["idm"].tokens_per_step
    figures: dict[str, Any] = {}
    for stage, number in STAGE_NUMBERS.items():
        figures[f"{number}_vs_full"] = medians["base"] / medians[stage]
        figures[f"{number}_ideal"] = ideal_ratio(recipes[stage])
        figures[f"{number}_vs_plain"] = medians[f"plain_{stage}"] / medians[stage]
        figures[f"{number}_ideal_llama31_8b"] = ideal_ratio(
            load_recipe(CONFIGS / f"{stage}_llama31_8b.yaml", [])
        )
    return figures | {
        "memory": {name: max(run["peak_gib"][-1] for run in runs) for name, runs in reports.items()},
        "memory_after_warmup": {
            name: max(run["peak_gib"][warmup_steps - 1] for run in runs) for name, runs in reports.items()
        },
        "memory_of_libraries": {
            name: max(run["libraries_gib"] for run in runs) for name, runs in reports.items()
        },
        "memory_above_libraries": {
            name: max(run["peak_gib"][-1] - run["libraries_gib"] for run in runs)
            for name, runs in reports.items()
        },
        "data_stall": reading / medians["idm"],
        "data_stall_beside_memory": with_loader / from_memory - 1,
        "seconds_per_step": medians,
        "tokens_per_second": {name: tokens_per_step / seconds for name, seconds in medians.items()},
    }


def seconds_after(runs: Iterable[dict[str, Any]], name: str, warmup_steps: int) -> list[float]:
    """The timed steps of all rounds."""
    return [seconds for run in runs for seconds in run[name][warmup_steps:]]


def ways_table(content: dict[str, Any]) -> Table:
    """A row a way: the median step, its rate, and memory."""
    sizes = content["sizes"]
    title = f"H {sizes['hidden_size']}, {sizes['num_layers']} layers, {content['machine']['threads']} threads"
    table = Table("way", "s/step", "tokens/s", "peak GiB", "of it libraries", title=title)
    for name, seconds in content["seconds_per_step"].items():
        table.add_row(
            name,
            f"{seconds:.3f}",
            f"{content['tokens_per_second'][name]:,.0f}",
            f"{content['memory'][name]:.3f}",
            f"{content['memory_of_libraries'][name]:.3f}",
        )
    return table


def comparison_table(content: dict[str, Any]) -> Table:
    """A row a comparison, beside its bar."""
    table = Table("figure", "value", "bar")
    for stage, number in STAGE_NUMBERS.items():
        ratio, ideal = content[f"{number}_vs_full"], content[f"{number}_ideal"]
        bar = content["bars"][f"{number}_vs_full"]
        table.add_row(f"{stage}: times full training", f"{ratio:.3f}", f">= {bar}")
        table.add_row("  by FLOPs at these sizes", f"{ideal:.3f}", "")
        table.add_row(
            "  reached of it", f"{ratio / ideal:.1%}", f">= {content['bars']['share_of_ideal']:.0%}"
        )
        table.add_row("  by FLOPs, 8B recipe", f"{content[f'{number}_ideal_llama31_8b']:.3f}", "")
        table.add_row(
            f"{stage}: times plain",
            f"{content[f'{number}_vs_plain']:.3f}",
            f">= {content['bars']['vs_plain']}",
        )
        for label, name in (("peak GiB", "memory"), ("of it above libraries", "memory_above_libraries")):
            memory = content[name]
            lowest = min(memory[f"plain_{stage}"], memory["base"])
            table.add_row(f"{stage}: {label}", f"{memory[stage]:.3f}", f"< {lowest:.3f}")
        table.add_row(f"{stage}: loss, relative", f"{content['loss_difference'][stage]:.1e}", "")
    table.add_row(
        "waiting for data", f"{content['data_stall']:.2%}", f"<= {content['bars']['data_stall']:.0%}"
    )
    table.add_row("steps beside a batch in memory", f"{content['data_stall_beside_memory']:+.2%}", "")
    return table
