"""Metrics: reduced over micro-batches, ranks and steps, then written to metrics.jsonl, wandb and the progress bar.

Shapes: A actions.
"""

import json
import math
import resource
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from data_prep.output_files import append_line, write_text_whole
from data_prep.progress import progress_bar
from pretrain.checkpoints.checkpoint_folder import LoopState
from pretrain.config import METRICS_FILE, RunConfig
from pretrain.faults.bad_steps import BadStepError
from pretrain.flops import CONVENTION
from pretrain.parallel import ParallelContext
from pretrain.recipes import recipe_fields
from pretrain.stages.contract import StageLoss

WANDB_ID_FILE = "wandb_id.txt"
# Metrics beside the progress bar, by the short name they have there.
SHOWN_ON_TERMINAL = {
    "loss": "loss",
    "regulariser": "reg",
    "action_accuracy": "acc",
    "learning_rate": "lr",
    "grad_norm": "grad",
    "alive_actions": "alive",
    "action_perplexity": "ppl",
    "most_used_action": "top",
    "tokens_per_second": "tok/s",
    "tflops_per_second": "TFLOP/s",
    "memory_gib": "GiB",
}


class StepMeans(NamedTuple):
    """One step's report."""

    means: dict[str, float]
    action_counts_A: torch.Tensor | None


class MeanOfSteps:
    """Averages of what the micro-batches of several steps report, over all data-parallel ranks."""

    def __init__(self, context: ParallelContext) -> None:
        self.context = context
        self.steps = 0
        self.sums: dict[str, float] = {}
        self.action_counts_A: torch.Tensor | None = None

    def add_step(self, micro_batches: Sequence[StageLoss]) -> None:
        """`reduce_step` and `add`. Collective."""
        self.add(self.reduce_step(micro_batches))

    def reduce_step(self, micro_batches: Sequence[StageLoss]) -> StepMeans:
        """What a step reports; `micro_batches` is empty but on the last pipeline stage, which tells the others.

        Collective.

        Raises:
            BadStepError: on every rank, if a mean over micro-batches and ranks is not finite.
        """
        means, counts_A = self.context.from_last_stage(self._reduce(micro_batches))
        if not all(math.isfinite(value) for value in means.values()):
            raise BadStepError(str(means))
        return StepMeans(means, None if counts_A is None else counts_A.to(self.context.device))

    def add(self, step: StepMeans) -> None:
        """Add one step."""
        for name, value in step.means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if step.action_counts_A is not None:
            before_A = 0 if self.action_counts_A is None else self.action_counts_A
            self.action_counts_A = before_A + step.action_counts_A
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """What `restore` needs, the same on all ranks. Collective."""
        counts_A = self.action_counts_A
        return {
            "interval_steps": self.steps,
            "interval_sums": dict(self.sums),
            "interval_action_counts": None
            if counts_A is None
            else self.context.data_parallel_mean(counts_A).tolist(),
        }

    def restore(self, loop: LoopState) -> None:
        """Go on where the interval of a checkpoint stood."""
        self.steps, self.sums = loop.interval_steps, dict(loop.interval_sums)
        if loop.interval_action_counts is not None:
            self.action_counts_A = torch.tensor(loop.interval_action_counts, device=self.context.device)

    def _reduce(self, micro_batches: Sequence[StageLoss]) -> StepMeans:
        """Means over micro-batches and data-parallel ranks; action counts of this rank."""
        if not micro_batches:
            return StepMeans({}, None)
        names = sorted(micro_batches[0].means)
        rows = [torch.stack([m.means[name].float() for name in names]) for m in micro_batches]
        means = self.context.data_parallel_mean(torch.stack(rows).mean(0)).tolist()
        counts = [m.action_counts_A for m in micro_batches if m.action_counts_A is not None]
        return StepMeans(dict(zip(names, means, strict=True)), torch.stack(counts).sum(0) if counts else None)

    def summary(self) -> dict[str, float | int | list[float]]:
        """Means over the added steps, and how the actions were used. Collective."""
        result: dict[str, float | int | list[float]] = {name: s / self.steps for name, s in self.sums.items()}
        if self.action_counts_A is not None:
            result |= action_usage(self.context.data_parallel_mean(self.action_counts_A))
        return result


def action_usage(counts_A: torch.Tensor) -> dict[str, float | int | list[float]]:
    """How evenly the actions are used: number alive, perplexity, the commonest and its share, all shares."""
    fractions_A = counts_A / counts_A.sum()
    entropy = -torch.xlogy(fractions_A, fractions_A).sum()
    return {
        "alive_actions": int((counts_A > 0).sum()),
        "action_perplexity": float(entropy.exp()),
        "most_used_action": int(fractions_A.argmax()),
        "most_used_action_fraction": float(fractions_A.max()),
        "action_fractions": [round(value, 6) for value in fractions_A.tolist()],
    }


def peak_memory_gib(context: ParallelContext) -> float:
    """Peak memory of the hungriest rank: of its GPU, else resident memory of its process. Collective."""
    if context.device.type == "cuda":
        peak_bytes = float(torch.cuda.max_memory_allocated())
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    peak = torch.tensor(peak_bytes / 2**30, device=context.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return round(float(peak), 3)


class MetricsWriter:
    """metrics.jsonl, wandb and the progress bar; does nothing on ranks other than the first."""

    def __init__(self, config: RunConfig, context: ParallelContext, first_step: int) -> None:
        self.active = context.is_first_rank
        if not self.active:
            return
        self.path = config.run_folder / METRICS_FILE
        self._unwritten: list[str] = []
        drop_lines_after(self.path, first_step)
        self.wandb_run = _start_wandb(config)
        print(f"{config.stage}: TFLOP/s are over all ranks and count {CONVENTION}", flush=True)
        self.bar = progress_bar(config.stage, config.training.steps, initial=first_step, unit="step")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self._write_lines()
            self.bar.close()
            if self.wandb_run is not None:
                self.wandb_run.finish()

    def _write_lines(self) -> None:
        """Write what there is; while the disk is full, it waits for the next line."""
        try:
            while self._unwritten:
                append_line(self.path, self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            waiting = len(self._unwritten)
            print(f"warning: {self.path}: {error.strerror}; {waiting} line(s) wait to be written", flush=True)

    def step_done(self) -> None:
        """Move the progress bar on by one step."""
        if self.active:
            self.bar.update()

    def write(self, line: dict[str, float | int | str | list[float]]) -> None:
        """Append one line; `line` holds step, stage, split and the metrics."""
        if not self.active:
            return
        self._unwritten.append(json.dumps(line))
        self._write_lines()
        if self.wandb_run is not None:
            scalars = {f"{line['split']}/{k}": v for k, v in line.items() if isinstance(v, int | float)}
            self.wandb_run.log(scalars, step=int(line["step"]))  # type: ignore[arg-type]
        if line["split"] == "train":
            shown = {short: line[name] for name, short in SHOWN_ON_TERMINAL.items() if name in line}
            self.bar.set_postfix({short: f"{value:.4g}" for short, value in shown.items()}, refresh=False)


def last_logged_step(path: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [step for line in lines if math.isfinite(step := _step_of(line))]
    return int(max(steps, default=0))


def drop_lines_after(path: Path, step: int) -> None:
    """Remove what an interrupted run logged beyond the checkpoint it resumes from."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    write_text_whole(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line cut short by a crash
        return float("inf")


def _start_wandb(config: RunConfig):  # type: ignore[no-untyped-def]  # wandb is imported only when it is wanted
    if config.logging.wandb == "off":
        return None
    import wandb

    return wandb.init(
        project="cola-pretrain",
        id=wandb_run_id(config.run_folder),
        resume="allow",
        name=str(config.run_folder),
        dir=config.run_folder,
        mode="online" if config.logging.wandb == "auto" and wandb.login(prompt=False) else "offline",
        config=recipe_fields(config),
        # Without "meta", which has the command line in it; environment.json says the same, without secrets.
        settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
    )


def wandb_run_id(run_folder: Path) -> str:
    """The one id that the run has in wandb, over all its starts; made at the first and kept in the run folder."""
    path = run_folder / WANDB_ID_FILE
    if not path.exists():
        write_text_whole(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()
