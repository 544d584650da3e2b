"""How fast both stages train on one GPU, beside what its matrix products reach at best.

    python benchmarks/gpu_bench.py     (make bench-gpu)

First the ceiling: products of the sizes of the model's own layers, in BF16 and, where the machine has it, FP8. Then
stages `idm` and `policy` by the trainer's own loop, random weights and random tokens, in BF16 and with FP8 in base and
trained parts; each in a process of its own. The layers are Llama-3.1-8B's; the base has fewer of them by default, so
that one GPU of 80 GB holds it. Prints a table and writes `runs/bench/gpu.json`. TFLOP/s count what the method needs
(pretrain/flops.py). Without a CUDA device it ends with exit code 2.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.synthetic_blend import write_synthetic_blend
from data_prep.errors import UserError, run_cli
from data_prep.output_files import write_json_whole
from pretrain import cpu_redirects
from pretrain.backends import Backends, find_backends
from pretrain.config import RunConfig
from pretrain.recipes import recipe_from_fields

STAGES = ("idm", "policy")
FP8_RECIPE = "tensorwise"


@dataclass(frozen=True, kw_only=True)
class GpuBenchConfig:
    """Time both stages on one GPU; the sizes are Llama-3.1-8B's, but for the depth of the base."""

    folder: Path = Path("runs/bench")
    """Folder for everything that is written; the figures go to gpu.json in it."""
    num_layers: int = 16
    """Decoder blocks of the base (Llama-3.1-8B has 32)."""
    hidden_size: int = 4096
    """Width of the residual stream; heads are 128 wide, with a key/value head for every four query heads."""
    ffn_hidden_size: int = 14336
    """Width of the MLPs."""
    vocab_size: int = 128256
    """Tokens of the vocabulary."""
    sequence_length: int = 2048
    """Tokens a sample."""
    micro_batch_size: int = 4
    """Sequences at once."""
    global_batch_size: int = 16
    """Sequences a step."""
    steps: int = 12
    """Optimizer steps of each run."""
    warmup_steps: int = 4
    """First steps that are not timed: kernels are chosen and memory is fetched in them."""
    product_seconds: float = 2.0
    """Least time that each matrix product is repeated for."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """What one run reached."""

    tokens_per_second: float
    """Of the median step."""
    tflops_per_second: float
    """By the convention of pretrain/flops.py."""
    memory_gib: float
    """Peak, as torch counts it."""
    seconds_per_step: float
    """Of the median step."""


def bench_recipe(config: GpuBenchConfig, stage: str, precision: str, fp8: str, blend: Path) -> RunConfig:
    """The recipe of one run: IDM of 4, merge of 2 and policy of 8 layers, as in configs/."""
    heads = config.hidden_size // 128
    return recipe_from_fields(
        {
            "stage": stage,
            "run_folder": str(config.folder / "gpu" / f"{stage}_{precision}_{fp8}"),
            "model": {
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "ffn_hidden_size": config.ffn_hidden_size,
                "num_layers": config.num_layers,
                "num_attention_heads": heads,
                "num_key_value_heads": max(heads // 4, 1),
                "head_size": 128,
                "rope_scaling_factor": 8.0,
            },
            "data": {"path": str(blend), "sequence_length": config.sequence_length},
            "training": {
                "steps": config.steps,
                "global_batch_size": config.global_batch_size,
                "micro_batch_size": config.micro_batch_size,
                "precision": precision,
                "fp8": fp8,
                "base_fp8": fp8,
            },
            "optimizer": {"warmup_steps": 0, "decay_steps": config.steps},
            "validation": {"steps": 1},
            "logging": {"wandb": "off"},
        },
        "benchmark",
    )


def measure_run(recipe: RunConfig, warmup_steps: int) -> RunFigures:
    """Build the stage with random weights and time its steps, without validation, logging or checkpoints."""
    cpu_redirects.apply()  # before the imports below, which load Megatron
    from data_prep.blended_data import open_blend
    from pretrain.faults.hang_watch import HangWatch
    from pretrain.flops import flops_per_token
    from pretrain.metrics import MeanOfSteps, peak_memory_gib
    from pretrain.parallel import parallel_context
    from pretrain.run import build_loop
    from pretrain.run_record.history import History

    seconds = []
    with parallel_context(recipe.parallel.tensor_parallel_size, recipe.seed) as context:
        history = History(recipe.run_folder, active=False)
        loop = build_loop(
            recipe, context, open_blend(recipe.data.path), newest=None, history=history, watch=HangWatch(60)
        )
        batches, means = loop.training_batches(), MeanOfSteps(context)
        for _ in range(recipe.training.steps):
            _synchronize(context.device)
            started = time.perf_counter()
            loop.train_step(batches, means)
            _synchronize(context.device)
            seconds.append(time.perf_counter() - started)
        memory_gib = peak_memory_gib(context)
    median = statistics.median(seconds[warmup_steps:])
    rate = recipe.tokens_per_step / median
    return RunFigures(
        tokens_per_second=rate,
        tflops_per_second=rate * sum(flops_per_token(recipe).values()) / 1e12,
        memory_gib=memory_gib,
        seconds_per_step=median,
    )


def measure_products(config: GpuBenchConfig, precision: str) -> float:
    """TFLOP/s of the fastest `bf16` or `fp8` product among the model's own, each of a micro-batch's tokens."""
    device = cpu_redirects.training_device()
    tokens = config.micro_batch_size * config.sequence_length
    wide, narrow = 2 * config.ffn_hidden_size, config.hidden_size
    sizes = [(tokens, wide, narrow), (tokens, narrow, wide // 2), (tokens, narrow, narrow)]
    return max(_time_product(*size, precision, device, config.product_seconds) for size in sizes)


def _time_product(
    rows: int, columns: int, inner: int, precision: str, device: torch.device, least_seconds: float
) -> float:
    left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    right = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
    product = _fp8_product(left, right) if precision == "fp8" else lambda: left @ right.t()
    for _ in range(3):
        product()
    repeats, seconds = 0, 0.0
    while seconds < least_seconds:
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(10):
            product()
        _synchronize(device)
        seconds += time.perf_counter() - started
        repeats += 10
    return 2 * rows * columns * inner * repeats / seconds / 1e12


def _fp8_product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    """left [M, K] times right [N, K] transposed, both in E4M3 with one scale a tensor, result in BF16."""
    functional = torch.nn.functional
    left_fp8, right_fp8 = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    scale = torch.ones((), device=left.device)
    whole = functional.ScalingType.TensorWise
    return lambda: functional.scaled_mm(
        left_fp8, right_fp8.t(), scale, whole, scale, whole, output_dtype=torch.bfloat16, use_fast_accum=True
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def results_table(runs: dict[str, RunFigures], ceilings: dict[str, float], title: str) -> Table:
    """A row a run; a run with FP8 is held against the FP8 ceiling, though attention and head stay in BF16."""
    table = Table("run", "tokens/s", "TFLOP/s", "of ceiling", "GiB", "s/step", title=title)
    for name, figures in runs.items():
        ceiling = ceilings["bf16" if name.endswith("bf16") else "fp8"]
        table.add_row(
            name,
            f"{figures.tokens_per_second:,.0f}",
            f"{figures.tflops_per_second:.1f}",
            f"{figures.tflops_per_second / ceiling:.1%}",
            f"{figures.memory_gib:.1f}",
            f"{figures.seconds_per_step:.3f}",
        )
    return table


def run_all(config: GpuBenchConfig, backends: Backends) -> tuple[dict[str, float], dict[str, RunFigures]]:
    """Ceilings by precision, and figures by run; every measurement in a process of its own."""
    precisions = ("bf16", "fp8") if FP8_RECIPE in backends.fp8_recipes else ("bf16",)
    blend = config.folder / "gpu" / "random_tokens"
    tokens = (config.steps * config.global_batch_size + 1) * config.sequence_length
    validation_tokens = (config.global_batch_size + 1) * config.sequence_length
    write_synthetic_blend(blend, config.vocab_size, tokens, validation_tokens)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        ceilings = {
            precision: pool.submit(measure_products, config, precision).result() for precision in precisions
        }
        runs = {}
        for stage in STAGES:
            for precision in precisions:
                fp8 = FP8_RECIPE if precision == "fp8" else "off"
                recipe = bench_recipe(config, stage, "bf16", fp8, blend)
                try:
                    figures = pool.submit(measure_run, recipe, config.warmup_steps).result()
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"--num-layers {config.num_layers}, --micro-batch-size {config.micro_batch_size}: "
                        f"stage {stage} does not fit into {backends.device_memory_gib} GiB; lower one of them"
                    ) from error
                runs[f"{stage} {precision}"] = figures
    return ceilings, runs


def main() -> None:
    """Entry point."""
    config = tyro.cli(GpuBenchConfig, description=__doc__)
    backends = find_backends()
    if not backends.cuda:
        raise UserError(
            "this benchmark needs a CUDA device and torch sees none; `python -m pretrain.doctor` says why"
        )
    if config.warmup_steps >= config.steps:
        raise UserError(
            f"--warmup-steps {config.warmup_steps}: leaves none of --steps {config.steps} to time"
        )
    ceilings, runs = run_all(config, backends)
    console = Console()
    console.print(
        results_table(runs, ceilings, f"{backends.device_name}, base of {config.num_layers} layers")
    )
    for name, tflops in ceilings.items():
        console.print(f"ceiling of {name} matrix products: {tflops:.0f} TFLOP/s")
    if "fp8" not in ceilings:
        console.print("no FP8 here: it needs a GPU of compute capability 9.0 and Transformer Engine")
    content = {
        "machine": describe_machine() | {"torch": torch.__version__, **asdict(backends)},
        "settings": {name: value for name, value in asdict(config).items() if name != "folder"},
        "ceiling_tflops": ceilings,
        "runs": {name: asdict(figures) for name, figures in runs.items()},
    }
    write_json_whole(config.folder / "gpu.json", content)


if __name__ == "__main__":
    run_cli(main)
