"""The plan of a run before it starts: parameters, FLOPs, layout, memory, and how long it would take on which GPUs.

Made from the recipe alone, in milliseconds, on any machine. Times are estimates at stated efficiencies.
"""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from pretrain.config import RunConfig
from pretrain.flops import CONVENTION, flops_per_token, fp8_flops_per_token, full_training_flops
from pretrain.placement import balance, place_layers, stage_costs
from pretrain.planning.memory import (
    GIB,
    data_parallel_size,
    fullest_stage_memory,
    micro_batches_a_step,
)
from pretrain.planning.parameters import parameters_by_part, trained_parts
from pretrain.planning.speed import EFFICIENCIES, GPUS, Gpu, estimate, pipeline_efficiency

LARGEST_GPU = max(GPUS, key=lambda gpu: gpu.memory_gb)


def find_plan_problems(
    config: RunConfig,
    gpus: int,
    memory_gib: float = LARGEST_GPU.memory_gib,
    device_name: str = LARGEST_GPU.name,
) -> list[str]:
    """What keeps a run without other problems from fitting `gpus` devices of `memory_gib`."""
    stage, memory = fullest_stage_memory(config, gpus)
    needed_gib = sum(memory.values()) / GIB
    if needed_gib <= memory_gib:
        return []
    kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in memory.items())
    return [
        f"parallel.tensor_parallel_size: pipeline stage {stage + 1} needs about {needed_gib:.1f} GiB a GPU, "
        f"{device_name} has {memory_gib:.1f} ({kinds}); raise parallel.tensor_parallel_size or "
        "parallel.pipeline_parallel_size, or lower training.micro_batch_size"
    ]


def print_plan(config: RunConfig, gpus: int, console: Console) -> None:
    """Print the plan of a run without problems on `gpus` ranks; 80 columns are enough."""
    for part in plan_parts(config, gpus):
        console.print(part, highlight=False)


def plan_parts(config: RunConfig, gpus: int) -> Iterator[Table | str]:
    """Tables and the lines above and below them."""
    yield f"\nParameters, stage {config.stage}"
    yield _parameter_table(config)
    yield f"\nFLOPs of training on a token: {CONVENTION}"
    yield _flops_table(config)
    total_flops = sum(flops_per_token(config).values())
    if config.stage != "base":
        gain = full_training_flops(config) / total_flops
        yield f"Training the base itself takes {gain:.2f} times as many: the most that freezing it can gain in speed."
    tokens = config.training.steps * config.tokens_per_step
    yield (
        f"{config.training.steps:,} steps x {config.tokens_per_step:,} tokens = {tokens:,} tokens, "
        f"{tokens * total_flops:.3g} FLOPs."
    )
    yield from _layout_parts(config, gpus)
    yield from _memory_parts(config, gpus)
    yield from _speed_parts(config, gpus)


def _table(*columns: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _parameter_table(config: RunConfig) -> Table:
    table = _table("part", "parameters", "trained")
    counts, trained = parameters_by_part(config), trained_parts(config)
    for part, count in counts.items():
        table.add_row(part, f"{count:,}", f"{count if part in trained else 0:,}")
    table.add_section()
    table.add_row("in all", f"{sum(counts.values()):,}", f"{sum(counts[part] for part in trained):,}")
    return table


def _flops_table(config: RunConfig) -> Table:
    flops, in_fp8 = flops_per_token(config), fp8_flops_per_token(config)
    total = sum(flops.values())
    table = _table("module", "MFLOP", "share", *(["of it in FP8"] if in_fp8 else []))
    for name, value in [*flops.items(), ("in all", total)]:
        if name == "in all":
            table.add_section()
        fp8 = sum(in_fp8.values()) if name == "in all" else in_fp8.get(name, 0.0)
        cells = [name, f"{value / 1e6:,.3f}", f"{value / total:.1%}"]
        table.add_row(*cells, *([f"{fp8 / value:.1%}"] if in_fp8 else []))
    return table


def _layout_parts(config: RunConfig, gpus: int) -> Iterator[Table | str]:
    parallel = config.parallel
    sizes = f"tensor {parallel.tensor_parallel_size} x pipeline {parallel.pipeline_parallel_size}"
    yield (
        f"\nLayout: {_gpus(gpus)} = {sizes} x data {data_parallel_size(config, gpus)}; "
        f"{micro_batches_a_step(config, gpus)} micro-batches of {config.training.micro_batch_size} sequences "
        "a step on each rank."
    )
    if parallel.pipeline_parallel_size == 1:
        return
    placement = place_layers(config)
    costs = stage_costs(config, placement)
    table = _table("pipeline stage", "layers", "MFLOP a token", "of the slowest")
    for number, (layers, cost) in enumerate(zip(placement.stages, costs, strict=True), start=1):
        table.add_row(str(number), str(layers), f"{cost / 1e6:,.3f}", f"{cost / max(costs):.1%}")
    yield table
    yield (
        f"Balance {balance(config, placement):.1%}; with filling and draining the pipeline, "
        f"{pipeline_efficiency(config, gpus):.1%} of the time is work."
    )


def _memory_parts(config: RunConfig, gpus: int) -> Iterator[Table | str]:
    stage, memory = fullest_stage_memory(config, gpus)
    needed_gib = sum(memory.values()) / GIB
    where = (
        f" of pipeline stage {stage + 1}, the fullest" if config.parallel.pipeline_parallel_size > 1 else ""
    )
    yield f"\nMemory of a GPU{where}: estimated, not measured"
    table = _table("kind", "GiB")
    for kind, size in memory.items():
        table.add_row(kind, _figure(size / GIB))
    table.add_section()
    table.add_row("in all", _figure(needed_gib))
    yield table
    fits = [f"{gpu.name} {gpu.memory_gb} GB" for gpu in GPUS if gpu.memory_gib >= needed_gib]
    yield f"Fits: {', '.join(fits) or 'none of the GPUs named below'}."


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def _figure(value: float) -> str:
    """Two decimals; two significant digits where those would be none."""
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def _speed_parts(config: RunConfig, gpus: int) -> Iterator[Table | str]:
    if config.training.precision != "bf16":
        yield "\nSpeed: no estimate for an fp32 run; the known peaks of GPUs are for BF16 and FP8."
        return
    yield f"\nSpeed on {_gpus(gpus)} at shares of their dense peaks: estimated, not measured"
    table = _table("GPU", "share of peak", "tokens/s a GPU", "tokens/s", "GPU-hours", "days")
    for gpu in GPUS:
        table.add_section()
        for row in _speed_rows(config, gpus, gpu):
            table.add_row(*row)
    yield table
    yield "Communication counts only as far as it is in these shares; tensor parallelism costs more."


def _speed_rows(config: RunConfig, gpus: int, gpu: Gpu) -> Iterator[list[str]]:
    for efficiency in EFFICIENCIES:
        found = estimate(config, gpus, gpu, efficiency)
        if found is not None:
            yield [
                gpu.name,
                efficiency.name,
                f"{found.tokens_per_second_a_gpu:,.0f}",
                f"{gpus * found.tokens_per_second_a_gpu:,.0f}",
                f"{found.gpu_hours:,.0f}",
                f"{found.gpu_hours / gpus / 24:,.1f}",
            ]
