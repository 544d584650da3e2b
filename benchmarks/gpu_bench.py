"""How fast the stages train on one GPU, beside full training of the same base and the best of its matrix products.

    python benchmarks/gpu_bench.py     (make bench-gpu)

First the ceiling: products of the sizes of the model's own layers, in BF16 and, where the machine has it, FP8. Then
stages `idm` and `policy` on Llama-3.1-8B by the trainer's own loop, random weights and random tokens, in BF16 and with
FP8 in base and trained parts. Then, in BF16, full training of the base (stage `base`) and both stages at half the
depth, since a single GPU does not hold the gradients and moments of 8 billion weights: what freezing the base saves,
measured and by FLOPs. Each in a process of its own; what does not fit by the planner is left out and said. Prints a
table and writes `runs/bench/gpu.json`. TFLOP/s count what the method needs (pretrain/flops.py). Without a CUDA device
it ends with exit code 2.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
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
from pretrain.planning.memory import GIB, GROUPS_AHEAD, fullest_stage_memory
from pretrain.recipes import recipe_from_fields

FP8_RECIPE = "tensorwise"


@dataclass(frozen=True, kw_only=True)
class GpuBenchConfig:
    """Time the stages on one GPU; the sizes are Llama-3.1-8B's."""

    folder: Path = Path("runs/bench")
    """Folder for everything that is written; the figures go to gpu.json in it."""
    num_layers: int = 32
    """Decoder blocks of the base."""
    full_training_num_layers: int = 16
    """The same where the base is also trained itself, for comparison; 16 need a GPU of 141 GB."""
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
    base_micro_batch_size: int = 16
    """Sequences that go through the frozen base at once."""
    global_batch_size: int = 16
    """Sequences a step."""
    steps: int = 7
    """Optimizer steps of each run."""
    warmup_steps: int = 2
    """First steps that are not timed: kernels are chosen and memory is fetched in them."""
    product_seconds: float = 1.0
    """Least time that each matrix product is repeated for."""

    @property
    def steps_with_spare(self) -> int:
        """Enough that the base has as much to run ahead of the last timed step as of the others."""
        return self.steps + GROUPS_AHEAD


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run to measure."""

    stage: str
    """`base` is full training of the base."""
    num_layers: int
    """Decoder blocks of the base."""
    precision: str = "bf16"
    """Of what is trained: `bf16`; on a CPU `fp32`."""
    fp8: str = "off"
    """FP8 recipe of base and trained parts."""

    @property
    def name(self) -> str:
        """For the table."""
        stage = "full training" if self.stage == "base" else self.stage
        return f"{stage}, {self.num_layers} blocks, {self.precision if self.fp8 == 'off' else 'fp8'}"


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
    flops_per_token: float
    """What the method needs."""


def bench_recipe(config: GpuBenchConfig, run: Run, blend: Path) -> RunConfig:
    """The recipe of one run: for 32 blocks of the base an IDM of 4, merge of 2, policy of 8 layers, as in configs/."""
    heads = config.hidden_size // 128
    frozen = {"base_fp8": run.fp8, "base_micro_batch_size": config.base_micro_batch_size}
    return recipe_from_fields(
        {
            "stage": run.stage,
            "run_folder": str(config.folder / "gpu" / "runs"),
            "model": {
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "ffn_hidden_size": config.ffn_hidden_size,
                "num_layers": run.num_layers,
                "num_attention_heads": heads,
                "num_key_value_heads": max(heads // 4, 1),
                "head_size": 128,
                "rope_scaling_factor": 8.0,
            },
            "actions": {
                "num_idm_layers": max(run.num_layers // 8, 1),
                "num_merge_layers": max(run.num_layers // 16, 1),
                "num_policy_layers": max(run.num_layers // 4, 1),
            },
            "data": {"path": str(blend), "sequence_length": config.sequence_length},
            "training": {
                "steps": config.steps_with_spare,
                "global_batch_size": config.global_batch_size,
                "micro_batch_size": config.micro_batch_size,
                "precision": run.precision,
                "fp8": run.fp8,
                **(frozen if run.stage != "base" else {}),
            },
            "optimizer": {"warmup_steps": 0, "decay_steps": config.steps_with_spare},
            "validation": {"steps": 1},
            "logging": {"wandb": "off"},
        },
        "benchmark",
    )


def measure_run(recipe: RunConfig, steps: int, warmup_steps: int) -> RunFigures:
    """Build the stage with random weights and time `steps`, without validation, logging or checkpoints."""
    cpu_redirects.apply()  # before the imports below, which load Megatron
    from data_prep.blended_data import open_blend
    from pretrain.faults.hang_watch import HangWatch
    from pretrain.flops import flops_per_token
    from pretrain.metrics import MeanOfSteps, peak_memory_gib
    from pretrain.parallel import parallel_context
    from pretrain.run import build_loop
    from pretrain.run_record.history import History
    from pretrain.train_loop import ready_for_steps

    seconds = []
    with parallel_context(recipe.parallel.tensor_parallel_size, recipe.seed) as context:
        history = History(recipe.run_folder, active=False)
        loop = build_loop(
            recipe, context, open_blend(recipe.data.path), newest=None, history=history, watch=HangWatch(60)
        )
        batches, means = loop.training_batches(), MeanOfSteps(context)
        with ready_for_steps():
            for _ in range(steps):
                _synchronize(context.device)
                started = time.perf_counter()
                loop.train_step(batches, means)
                _synchronize(context.device)
                seconds.append(time.perf_counter() - started)
        memory_gib = peak_memory_gib(context)
    median = statistics.median(seconds[warmup_steps:])
    rate, flops = recipe.tokens_per_step / median, sum(flops_per_token(recipe).values())
    return RunFigures(
        tokens_per_second=rate,
        tflops_per_second=rate * flops / 1e12,
        memory_gib=memory_gib,
        seconds_per_step=median,
        flops_per_token=flops,
    )


def measure_products(config: GpuBenchConfig, precisions: tuple[str, ...]) -> dict[str, float]:
    """By precision, `bf16` or `fp8`, TFLOP/s of the fastest of the model's own products of a micro-batch's tokens."""
    device = cpu_redirects.training_device()
    tokens = config.micro_batch_size * config.sequence_length
    wide, narrow = 2 * config.ffn_hidden_size, config.hidden_size
    sizes = [(tokens, wide, narrow), (tokens, narrow, wide // 2), (tokens, narrow, narrow)]
    return {
        precision: max(_time_product(*size, precision, device, config.product_seconds) for size in sizes)
        for precision in precisions
    }


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


def runs_to_measure(config: GpuBenchConfig, fp8: bool) -> list[Run]:
    """Both stages at the model's depth in every precision, then full training, and they at its depth."""
    recipes = ("off", FP8_RECIPE) if fp8 else ("off",)
    depth = config.full_training_num_layers
    return [
        *(Run(stage=s, num_layers=config.num_layers, fp8=f) for f in recipes for s in ("idm", "policy")),
        *(Run(stage=stage, num_layers=depth) for stage in ("base", "idm", "policy")),
    ]


def results_table(figures: dict[Run, RunFigures], ceilings: dict[str, float], title: str) -> Table:
    """A row a run; a run with FP8 is held against the FP8 ceiling, though attention and head stay in BF16."""
    table = Table("run", "tokens/s", "TFLOP/s", "of ceiling", "GiB", "s/step", title=title)
    for run, reached in figures.items():
        ceiling = ceilings["bf16" if run.fp8 == "off" else "fp8"]
        table.add_row(
            run.name,
            f"{reached.tokens_per_second:,.0f}",
            f"{reached.tflops_per_second:.1f}",
            f"{reached.tflops_per_second / ceiling:.1%}",
            f"{reached.memory_gib:.1f}",
            f"{reached.seconds_per_step:.3f}",
        )
    return table


def times_full_training(figures: dict[Run, RunFigures]) -> dict[str, dict[str, float]]:
    """Of each run at whose depth and precision the base was trained as well: how often its rate, measured and ideal."""
    answer = {}
    for run, reached in figures.items():
        full = figures.get(replace(run, stage="base"))
        if run.stage != "base" and full is not None:
            answer[run.name] = {
                "measured": reached.tokens_per_second / full.tokens_per_second,
                "by_flops": full.flops_per_token / reached.flops_per_token,
            }
    return answer


@dataclass(kw_only=True)
class Figures:
    """What has been measured so far."""

    ceilings: dict[str, float] = field(default_factory=dict)
    """TFLOP/s by precision."""
    runs: dict[Run, RunFigures] = field(default_factory=dict)
    """By run."""

    def write(self, config: GpuBenchConfig, backends: Backends) -> None:
        """All of it to gpu.json."""
        content = {
            "machine": describe_machine() | {"torch": torch.__version__, **asdict(backends)},
            "settings": {name: value for name, value in asdict(config).items() if name != "folder"},
            "ceiling_tflops": self.ceilings,
            "runs": {run.name: asdict(reached) for run, reached in self.runs.items()},
            "times_full_training": times_full_training(self.runs),
        }
        write_json_whole(config.folder / "gpu.json", content)


def measure_all(config: GpuBenchConfig, backends: Backends, console: Console) -> Figures:
    """Every measurement in a process of its own, told and written as it comes: machines with GPUs are often short."""
    fp8, figures = FP8_RECIPE in backends.fp8_recipes, Figures()
    blend = config.folder / "gpu" / "random_tokens"
    tokens = (config.steps_with_spare * config.global_batch_size + 1) * config.sequence_length
    validation_tokens = (config.global_batch_size + 1) * config.sequence_length
    write_synthetic_blend(blend, config.vocab_size, tokens, validation_tokens)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        precisions = ("bf16", "fp8") if fp8 else ("bf16",)
        figures.ceilings = pool.submit(measure_products, config, precisions).result()
        for precision, tflops in figures.ceilings.items():
            console.print(f"ceiling of {precision} matrix products: {tflops:.0f} TFLOP/s")
        for run in runs_to_measure(config, fp8):
            recipe = bench_recipe(config, run, blend)
            needed_gib = sum(fullest_stage_memory(recipe, 1)[1].values()) / GIB
            if backends.device_memory_gib is not None and needed_gib > backends.device_memory_gib:
                console.print(f"{run.name}: left out, it needs {needed_gib:.0f} GiB by the planner")
                continue
            try:
                reached = pool.submit(measure_run, recipe, config.steps, config.warmup_steps).result()
            except torch.OutOfMemoryError:
                console.print(f"{run.name}: left out, it did not fit into {backends.device_memory_gib} GiB")
                continue
            figures.runs[run] = reached
            figures.write(config, backends)
            console.print(
                f"{run.name}: {reached.tokens_per_second:,.0f} tokens/s, {reached.memory_gib:.1f} GiB"
            )
    return figures


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
    console = Console()
    figures = measure_all(config, backends, console)
    console.print(results_table(figures.runs, figures.ceilings, str(backends.device_name)))
    for name, ratio in times_full_training(figures.runs).items():
        console.print(
            f"{name}: {ratio['measured']:.2f} times full training, by FLOPs {ratio['by_flops']:.2f}"
        )
    if "fp8" not in figures.ceilings:
        console.print("no FP8 here: it needs a GPU of compute capability 9.0 and Transformer Engine")


if __name__ == "__main__":
    run_cli(main)
