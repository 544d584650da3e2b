"""One way of the training benchmark, as a process of its own; benchmarks/train_bench.py starts it and says how.

    python benchmarks/train_bench_worker.py --program ours --recipe RECIPE.yaml --steps 6 --report REPORT.json

`ours` steps the trainer's own loop; `plain` the plain PyTorch trainer (benchmarks/plain_cola) from the weights and on
the micro-batches that `inputs` wrote; `stall` the trainer's loop, one step with its loader and one with a batch that
is in memory, in turn. All cores it may use. Shapes: B batch, S sequence, A actions.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro

from benchmarks.plain_cola.losses import PlainBatch
from benchmarks.plain_cola.model import PlainCola
from benchmarks.plain_cola.settings import PlainSizes
from benchmarks.plain_cola.trainer import PlainTrainer
from benchmarks.plain_cola.weights import load_from_megatron, method_of, optimizer_of, sizes_of
from data_prep.errors import run_cli
from data_prep.output_files import write_json_whole
from pretrain import cpu_redirects
from pretrain.actions import gumbel_noise
from pretrain.config import RunConfig
from pretrain.recipes import load_recipe

if TYPE_CHECKING:
    from pretrain.stages.contract import Batch
    from pretrain.train_loop import TrainLoop


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Measure one way of training, or write what the plain ways read."""

    program: Literal["ours", "plain", "stall", "inputs"]
    """What to run."""
    recipe: Path
    """Recipe of the run."""
    steps: int
    """Optimizer steps, warm-up included; `inputs`: steps to write micro-batches for; `stall`: of each kind."""
    inputs: Path | None = None
    """Weights and micro-batches: written by `inputs`, read by `plain`."""
    report: Path | None = None
    """JSON file for the figures."""
    activation_checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Plain way: compute the blocks' activations again in the backward pass, as the authors do."""
    our_noise: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Plain way: the trainer's action noise, so that both see the same losses."""


@dataclass(kw_only=True)
class WayReport:
    """What one process saw, a value a step."""

    libraries_gib: float
    """Resident memory before the model was built."""
    threads: int = 0
    """Of torch, in the steps."""
    seconds: list[float] = field(default_factory=list)
    """Wall time."""
    losses: list[float] = field(default_factory=list)
    """Mean over the micro-batches, nats."""
    reading_seconds: list[float] = field(default_factory=list)
    """Time of the wall time in which the loop waited for its loader; empty for the plain ways."""
    peak_gib: list[float] = field(default_factory=list)
    """Highest resident memory since the model was built, after each step."""

    def measure(self, step: Callable[[], float]) -> None:
        """Run a step that returns its loss, and note its time and memory."""
        started = time.perf_counter()
        loss = step()
        self.seconds.append(time.perf_counter() - started)
        self.threads = torch.get_num_threads()
        self.losses.append(loss)
        self.peak_gib.append(memory_gib("VmHWM"))


class TimedReader(Iterator["Batch"]):
    """The loader's micro-batches; adds up the time they take to come."""

    def __init__(self, batches: "Iterator[Batch]") -> None:
        self.batches, self.seconds = batches, 0.0

    def __next__(self) -> "Batch":
        started = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - started


def memory_gib(name: str) -> float:
    """A size of this process as Linux counts it: VmRSS now, VmHWM the highest since the start or the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kib) / 2**20


def forget_peak() -> None:
    """Count VmHWM anew from now on: loading a checkpoint is no part of a step."""
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def opened_loop(recipe: RunConfig) -> "Iterator[tuple[TrainLoop, float]]":
    """The trainer's loop at its first step, after all checks of a run; and memory before it was built, GiB."""
    cpu_redirects.apply()  # before the imports below, which load Megatron
    from pretrain.faults.hang_watch import HangWatch
    from pretrain.parallel import parallel_context
    from pretrain.run import build_loop
    from pretrain.run_checks import check
    from pretrain.run_record.history import History

    blend = check(recipe)
    with parallel_context(recipe.parallel.tensor_parallel_size, recipe.seed) as context:
        libraries_gib = memory_gib("VmRSS")
        history = History(recipe.run_folder, active=False)
        yield (
            build_loop(recipe, context, blend, newest=None, history=history, watch=HangWatch(60)),
            libraries_gib,
        )


def timed_batches(loop: "TrainLoop") -> "tuple[Iterator[Batch], TimedReader]":
    """What the loop's steps read, and the clock at its loader, which is inside where the base runs ahead."""
    batches = loop.training_batches()
    if loop.ahead is None:
        reader = TimedReader(batches)
        return reader, reader
    reader = TimedReader(loop.ahead.batches)
    loop.ahead.batches = reader
    return batches, reader


def step_loss(loop: "TrainLoop", batches: "Iterator[Batch]") -> float:
    """One optimizer step of the loop; its mean loss."""
    from pretrain.metrics import MeanOfSteps

    means = MeanOfSteps(loop.context)
    loop.train_step(batches, means)
    return means.sums["loss"]


def train_ours(config: WorkerConfig, recipe: RunConfig) -> WayReport:
    """The trainer's own steps."""
    with opened_loop(recipe) as (loop, libraries_gib):
        from pretrain.train_loop import ready_for_steps

        report = WayReport(libraries_gib=libraries_gib)
        batches, reader = timed_batches(loop)
        with ready_for_steps():
            forget_peak()
            for _ in range(config.steps):
                before = reader.seconds
                report.measure(lambda: step_loss(loop, batches))
                report.reading_seconds.append(reader.seconds - before)
    return report


def measure_stall(config: WorkerConfig, recipe: RunConfig) -> dict[str, list[float]]:
    """Seconds of the loop's steps with its loader, and with one micro-batch again and again from memory."""
    with opened_loop(recipe) as (loop, _):
        from pretrain.base_ahead import BaseAhead
        from pretrain.data import micro_batches
        from pretrain.train_loop import ready_for_steps

        loop.training_batches()
        assert loop.ahead is not None, "one rank, and the stage's base is frozen"
        batch = next(micro_batches(loop.train_samples, recipe, loop.context, 0, 1))
        repeated = BaseAhead(repeat(batch), loop.model.module, loop.ahead.group_size)
        kinds = {"loader": loop.ahead, "memory": repeated}
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        with ready_for_steps():
            for step in range(config.steps):
                for name in sorted(kinds, reverse=step % 2 == 1):  # neither kind always comes first
                    loop.ahead = kinds[name]
                    started = time.perf_counter()
                    step_loss(loop, kinds[name])
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def write_inputs(config: WorkerConfig, recipe: RunConfig) -> None:
    """Weights of the whole model under the plain model's names, and the run's first micro-batches."""
    with opened_loop(recipe) as (loop, _):
        from pretrain.data import micro_batches

        parts = (*loop.stage.frozen_parts, *loop.stage.trained_parts)
        plain = PlainCola(sizes_of(recipe), method_of(recipe), parts)
        load_from_megatron(plain, recipe, dict(loop.model.module.named_parameters()))
        batches = list(micro_batches(loop.train_samples, recipe, loop.context, 0, config.steps))
        assert config.inputs is not None
        torch.save(
            {
                "parts": parts,
                "weights": plain.state_dict(),
                "tokens": [batch.tokens_BS for batch in batches],
                "labels": [batch.labels_BS for batch in batches],
                "sample_index": [batch.sample_index_B for batch in batches],
            },
            config.inputs,
        )


def train_plain(config: WorkerConfig, recipe: RunConfig) -> WayReport:
    """The plain trainer's steps; its micro-batches come from memory, which costs it nothing."""
    assert config.inputs is not None
    report = WayReport(libraries_gib=memory_gib("VmRSS"))
    inputs = torch.load(config.inputs, mmap=True, weights_only=True)
    sizes = sizes_of(recipe)
    model = PlainCola(sizes, method_of(recipe), inputs["parts"])
    model.load_state_dict(inputs["weights"])
    samples = [
        tuple(tensor.clone() for tensor in tensors)
        for tensors in zip(inputs["tokens"], inputs["labels"], inputs["sample_index"], strict=True)
    ]
    del inputs  # and with it the mapped file
    trainer = PlainTrainer(model, recipe.stage, optimizer_of(recipe), config.activation_checkpointing)
    micro_batches = recipe.training.global_batch_size // recipe.training.micro_batch_size
    seed = recipe.seed if config.our_noise else None

    def step(number: int) -> float:
        first = number * micro_batches
        batches = [plain_batch(sizes, seed, *sample) for sample in samples[first : first + micro_batches]]
        return float(trainer.step(batches).loss)

    forget_peak()
    for number in range(config.steps):
        report.measure(lambda number=number: step(number))  # type: ignore[misc]
    return report


def plain_batch(
    sizes: PlainSizes,
    seed: int | None,
    tokens_BS: torch.Tensor,
    labels_BS: torch.Tensor,
    sample_index_B: torch.Tensor,
) -> PlainBatch:
    """A micro-batch with the noise of the run of `seed`, or with any noise if None."""
    length = tokens_BS.shape[1]
    if seed is None:
        noise_BSA = -torch.empty(*tokens_BS.shape, sizes.num_actions).exponential_().log()
    else:
        noise_BSA = gumbel_noise(seed, sample_index_B, length, sizes.num_actions).transpose(0, 1)
    return PlainBatch(tokens_BS, labels_BS, noise_BSA)


def run(config: WorkerConfig) -> None:
    """Do what `config.program` names, on the threads torch is set to."""
    recipe = load_recipe(config.recipe, [])
    if config.program == "inputs":
        write_inputs(config, recipe)
        return
    content: Any
    if config.program == "stall":
        content = measure_stall(config, recipe)
    else:
        content = asdict((train_ours if config.program == "ours" else train_plain)(config, recipe))
    assert config.report is not None
    write_json_whole(config.report, content)


def main() -> None:
    """Entry point."""
    config = tyro.cli(WorkerConfig, description=__doc__)
    cores = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(cores)  # without it the trainer would take one thread
    torch.set_num_threads(cores)  # torch read the variable when it was imported
    run(config)


if __name__ == "__main__":
    run_cli(main)
