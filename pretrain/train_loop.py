"""The one training loop, for every stage: Megatron's schedule, optimizer step, metrics, validation, checkpoints."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from megatron.core.utils import get_model_config

from data_prep.errors import StoppedError
from pretrain.base_ahead import BaseAhead
from pretrain.checkpoints import checkpointing
from pretrain.checkpoints.checkpoint_folder import LoopState
from pretrain.checkpoints.checkpoint_saving import CheckpointSaver, RunOrigin, Snapshot
from pretrain.config import RunConfig
from pretrain.cpu_products import fast_on_cpu
from pretrain.cpu_redirects import return_freed_memory
from pretrain.data import IndexedSamples, micro_batches
from pretrain.faults.bad_steps import BadStepError, BadSteps
from pretrain.faults.hang_watch import HangWatch
from pretrain.faults.stop_request import StopRequest
from pretrain.flops import flops_per_token
from pretrain.metrics import MeanOfSteps, MetricsWriter, peak_memory_gib
from pretrain.optimization import refuse_non_finite_gradients
from pretrain.parallel import ParallelContext
from pretrain.pipeline import Pipeline
from pretrain.run_record.history import History
from pretrain.stages.contract import Batch, Carry, Stage, StageLoss


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in the run, and in the data, a loop begins."""

    step: int
    """Steps done."""
    next_sample: int
    """Samples read."""
    loop: LoopState
    """The rest of what a checkpoint keeps of a loop."""


BEGINNING = Position(step=0, next_sample=0, loop=LoopState())


@contextmanager
def ready_for_steps() -> Iterator[None]:
    """What holds while steps are done.

    What is there now stays out of garbage collections (Megatron makes one at every save, 0.2 s with its modules), what
    loading has freed is returned, and a CPU computes in the fastest way.
    """
    gc.collect()
    gc.freeze()
    return_freed_memory()
    try:
        with fast_on_cpu():
            yield
    finally:
        gc.unfreeze()


class TrainLoop:
    """Runs a stage from `begin` to the recipe's last step. Everything it needs is made outside."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        stage: Stage,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        samples: tuple[IndexedSamples, IndexedSamples],
        origin: RunOrigin,
        frozen: checkpointing.FrozenFingerprints,
        history: History,
        watch: HangWatch,
        begin: Position,
    ) -> None:
        self.config, self.context, self.stage = config, context, stage
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.train_samples, self.validation_samples = samples
        self.frozen, self.history, self.begin = frozen, history, begin
        self.total_flops_per_token = sum(flops_per_token(config).values())
        self.pipeline = Pipeline(config, context, model)
        self.ahead: BaseAhead | None = None
        loop = begin.loop
        self.bad_steps = BadSteps(
            config.faults, loop.recent_losses, loop.bad_steps_in_a_row, loop.skipped_steps
        )
        self.interval, self.interval_seconds = MeanOfSteps(context), loop.interval_seconds
        self.interval.restore(loop)
        self.watch = watch
        self.saver = CheckpointSaver(config, context, origin, history, watch.beat)
        refuse_non_finite_gradients(optimizer)
        model_config = get_model_config(model)
        model_config.finalize_model_grads_func = self.finalize_gradients
        model_config.no_sync_func = model.no_sync  # gradients are reduced after the last micro-batch only

    def run(self, after_first_step: Callable[[], None] = lambda: None) -> None:
        """Train from `begin` on; validates and saves on the way and at the end.

        Raises (on all ranks alike):
            StoppedError: a signal asked for it; everything up to then is saved.
            RollBackError: a bad step is to be rolled back.
            TrainingError: too many bad steps.
            StorageError: what must be saved before the end cannot be.
        """
        config = self.config
        batches = self.training_batches()
        first = self.begin.step + 1
        with (
            MetricsWriter(config, self.context, self.begin.step) as writer,
            StopRequest() as stop_request,
            ready_for_steps(),
            self.saver,
        ):
            started = time.monotonic()
            gradient_norm = 0.0
            for step in range(first, config.training.steps + 1):
                step_started = time.monotonic()
                gradient_norm = self.train_or_skip_step(batches, step, gradient_norm)
                self.interval_seconds += time.monotonic() - step_started
                writer.step_done()
                last = step == config.training.steps
                if self.interval.steps and (last or step % config.logging.interval_steps == 0):
                    line = self.describe(step, "train", self.interval, time.monotonic() - started)
                    writer.write(line | self.speed(gradient_norm))
                    self.interval, self.interval_seconds = MeanOfSteps(self.context), 0.0
                if last or step % config.validation.interval_steps == 0:
                    writer.write(
                        self.describe(step, "validation", self.validate(), time.monotonic() - started)
                    )
                if step == first:
                    after_first_step()
                self.watch.beat()
                self.save_or_stop(step, last, stop_request.asked)

    def save_or_stop(self, step: int, last: bool, asked_to_stop: bool) -> None:
        """What the ranks do together after a step: see how the save under way is doing, save, stop."""
        running, failed, stop = self.context.highest((*self.saver.local_state(), int(asked_to_stop)))
        self.saver.advance(step, bool(running), bool(failed))
        if last or stop:
            self.saver.save_and_wait(lambda: self.snapshot(step), step)
        elif step % self.config.checkpoint.interval_steps == 0 or self.saver.is_owed(step):
            self.save(step)
        if stop and not last:
            raise StoppedError(
                f"stopped on request after step {step}, which is saved; --resume goes on from there"
            )

    def training_batches(self) -> Iterator[Batch]:
        """Micro-batches of the steps to do; where the whole base is here and frozen, it runs ahead."""
        config = self.config
        steps = config.training.steps - self.begin.step
        batches = micro_batches(self.train_samples, config, self.context, self.begin.next_sample, steps)
        if "base" not in self.stage.frozen_parts or self.context.pipeline_size > 1:
            return batches
        training = config.training
        group_size = (
            training.base_micro_batch_size or training.micro_batch_size
        ) // training.micro_batch_size
        self.ahead = BaseAhead(batches, self.model.module, group_size)
        return self.ahead

    def next_sample(self, step: int) -> int:
        """The first sample that is not read once `step` is done."""
        return self.begin.next_sample + (step - self.begin.step) * self.config.training.global_batch_size

    def train_or_skip_step(self, batches: Iterator[Batch], step: int, last_norm: float) -> float:
        """One optimizer step, or none where it went wrong and the recipe says so; the ranks agree."""
        try:
            gradient_norm, loss = self.train_step(batches, self.interval)
        except BadStepError as error:
            self.saver.wait(step)  # where a roll-back would go to
            told = self.bad_steps.count_bad(step, self.next_sample(step), error)
            self.history.record("bad_step", step=step, reason=str(error), action="skipped")
            if self.context.is_first_rank:
                print(told, flush=True)
            return last_norm
        self.bad_steps.count_good(loss)
        return gradient_norm

    def train_step(self, batches: Iterator[Batch], means: MeanOfSteps) -> tuple[float, float]:
        """One optimizer step over a global batch; returns the gradient norm before clipping, and the loss.

        Raises:
            BadStepError: before the optimizer moves.
        """
        self.scheduler.step(increment=1)  # even if the step is skipped: the rate is a function of its number
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync()  # behind the base's forward pass
        self.run_base_ahead()
        report = means.reduce_step(self.pipeline.run(self.forward, batches, training=True))
        self.bad_steps.refuse_spike(report.means["loss"])
        _, gradient_norm, _ = self.optimizer.step()
        means.add(report)
        return float(gradient_norm), report.means["loss"]

    def run_base_ahead(self) -> None:
        """Give the processor base work while communication is under way."""
        if self.ahead is not None:
            self.ahead.run_ahead()

    def finalize_gradients(self, *arguments: Any, **options: Any) -> None:
        """Megatron's end of the backward pass, which waits for the reduction of the gradients."""
        self.run_base_ahead()
        finalize_model_grads(*arguments, **options)

    def forward(self, batch: Batch, carry: Carry | None) -> Carry | StageLoss:
        """One micro-batch through what is on this pipeline stage."""
        return self.model(self.stage, batch, carry)

    @torch.no_grad()
    def validate(self) -> MeanOfSteps:
        """Means over the validation batches, argmax actions. Collective."""
        self.finish_parameters()
        self.model.eval()
        means = MeanOfSteps(self.context)
        steps = self.config.validation.steps
        batches = micro_batches(self.validation_samples, self.config, self.context, 0, steps)
        for _ in range(steps):
            means.add_step(self.pipeline.run(self.forward, batches, training=False))
            self.watch.beat()
        self.model.train()
        return means

    def finish_parameters(self) -> None:
        """Have the parameters of the last step on every rank, which otherwise waits for the next step."""
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)

    def describe(
        self, step: int, split: str, means: MeanOfSteps, elapsed_seconds: float
    ) -> dict[str, float | int | str | list[float]]:
        """A metrics line. Collective."""
        return {
            "step": step,
            "stage": self.config.stage,
            "split": split,
            "consumed_tokens": step * self.config.tokens_per_step,
            "elapsed_seconds": round(elapsed_seconds, 3),
            **means.summary(),
        }

    def speed(self, gradient_norm: float) -> dict[str, float]:
        """Rates of the interval, over all ranks; TFLOP/s by the convention of `pretrain.flops`. Collective."""
        tokens_per_second = self.interval.steps * self.config.tokens_per_step / self.interval_seconds
        return {
            "learning_rate": get_canonical_lr_for_logging(self.optimizer.param_groups) or 0.0,
            "grad_norm": gradient_norm,
            "skipped_steps": self.bad_steps.skipped,
            "tokens_per_second": round(tokens_per_second, 1),
            "tflops_per_second": self.total_flops_per_token * tokens_per_second / 1e12,
            "memory_gib": peak_memory_gib(self.context),
        }

    def save(self, step: int) -> None:
        """Begin to save; later, if the save before is still under way. Collective."""
        if self.saver.is_idle:
            self.saver.begin(self.snapshot(step))
        else:
            self.saver.put_off(step)

    def snapshot(self, step: int) -> Snapshot:
        """The state after `step`, and the fingerprints of its tensors. Collective.

        Raises:
            UserError: a frozen tensor is not what it was.
        """
        began = time.monotonic()
        self.finish_parameters()
        model = self.model.module
        frozen = checkpointing.model_fingerprints(model, self.stage.frozen_parts)
        checkpointing.check_fingerprints(self.frozen.held, frozen, f"step {step}, frozen tensors")
        trained = checkpointing.model_fingerprints(model, self.stage.trained_parts)
        return Snapshot(
            began=began,
            step=step,
            consumed_samples=self.next_sample(step),
            model=model,
            optimizer=self.optimizer,
            trained_parts=self.stage.trained_parts,
            loop=LoopState(
                skipped_steps=self.bad_steps.skipped,
                bad_steps_in_a_row=self.bad_steps.in_a_row,
                recent_losses=list(self.bad_steps.recent_losses),
                interval_seconds=self.interval_seconds,
                **self.interval.state(),
            ),
            fingerprints=self.frozen.saved | trained,
        )
