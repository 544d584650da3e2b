"""The one training loop, for every stage: Megatron's schedule, optimizer step, metrics, validation, checkpoints."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from megatron.core.utils import get_model_config

from pretrain import checkpoint_saving, checkpointing
from pretrain.base_ahead import BaseAhead
from pretrain.config import RunConfig
from pretrain.data import IndexedSamples, micro_batches
from pretrain.flops import flops_per_token
from pretrain.metrics import MeanOfSteps, MetricsWriter, peak_memory_gib
from pretrain.optimization import NonFiniteError, refuse_non_finite_gradients
from pretrain.parallel import ParallelContext
from pretrain.pipeline import Pipeline
from pretrain.stages.contract import Batch, Carry, Stage, StageLoss


class TrainLoop:
    """Runs a stage from `first_step` to the recipe's last step. Everything it needs is made outside."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        stage: Stage,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        samples: tuple[IndexedSamples, IndexedSamples],
        origin: checkpoint_saving.RunOrigin,
        frozen: checkpointing.FrozenFingerprints,
    ) -> None:
        self.config, self.context, self.stage = config, context, stage
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.train_samples, self.validation_samples = samples
        self.origin, self.frozen = origin, frozen
        self.total_flops_per_token = sum(flops_per_token(config).values())
        self.pipeline = Pipeline(config, context, model)
        self.ahead: BaseAhead | None = None
        self.skipped_in_a_row = self.skipped_steps = 0
        refuse_non_finite_gradients(optimizer)
        model_config = get_model_config(model)
        model_config.finalize_model_grads_func = self.finalize_gradients
        model_config.no_sync_func = model.no_sync  # gradients are reduced after the last micro-batch only

    def run(self, first_step: int) -> None:
        """Train the steps after `first_step`; validates and saves on the way and at the end."""
        config = self.config
        batches = self.training_batches(first_step)
        with MetricsWriter(config, self.context, first_step) as writer:
            started = time.monotonic()
            interval, interval_seconds = MeanOfSteps(self.context), 0.0
            gradient_norm = 0.0
            for step in range(first_step + 1, config.training.steps + 1):
                step_started = time.monotonic()
                gradient_norm = self.train_or_skip_step(batches, interval, step, gradient_norm)
                interval_seconds += time.monotonic() - step_started
                writer.step_done()
                last = step == config.training.steps
                if interval.steps and (last or step % config.logging.interval_steps == 0):
                    line = self.describe(step, "train", interval, time.monotonic() - started)
                    writer.write(line | self.speed(interval, interval_seconds, gradient_norm))
                    interval, interval_seconds = MeanOfSteps(self.context), 0.0
                if last or step % config.validation.interval_steps == 0:
                    writer.write(
                        self.describe(step, "validation", self.validate(), time.monotonic() - started)
                    )
                if last or step % config.checkpoint.interval_steps == 0:
                    self.save(step)

    def training_batches(self, first_step: int) -> Iterator[Batch]:
        """Micro-batches of the steps after `first_step`; where the whole base is here and frozen, it runs ahead."""
        config = self.config
        batches = micro_batches(self.train_samples, config, self.context, first_step, config.training.steps)
        if "base" not in self.stage.frozen_parts or self.context.pipeline_size > 1:
            return batches
        training = config.training
        group_size = (
            training.base_micro_batch_size or training.micro_batch_size
        ) // training.micro_batch_size
        self.ahead = BaseAhead(batches, self.model.module, group_size)
        return self.ahead

    def train_or_skip_step(
        self, batches: Iterator[Batch], means: MeanOfSteps, step: int, last_norm: float
    ) -> float:
        """One optimizer step, or none where loss or gradient are not finite; the ranks agree.

        Raises:
            NonFiniteError: after more such steps in a row than `training.non_finite_steps`.
        """
        try:
            gradient_norm = self.train_step(batches, means)
        except NonFiniteError as error:
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > self.config.faults.max_bad_steps:
                raise NonFiniteError(f"step {step}: {error}; the optimizer was not moved") from None
            self.skipped_steps += 1
            if self.context.is_first_rank:
                print(f"step {step}: {error}; skipped ({self.skipped_in_a_row} in a row)", flush=True)
            return last_norm
        self.skipped_in_a_row = 0
        return gradient_norm

    def train_step(self, batches: Iterator[Batch], means: MeanOfSteps) -> float:
        """One optimizer step over a global batch; returns the gradient norm before clipping."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync()  # behind the base's forward pass
        self.run_base_ahead()
        report = means.reduce_step(self.pipeline.run(self.forward, batches, training=True))
        self.scheduler.step(increment=1)
        _, gradient_norm, _ = self.optimizer.step()
        means.add(report)
        return float(gradient_norm)

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

    def speed(self, interval: MeanOfSteps, seconds: float, gradient_norm: float) -> dict[str, float]:
        """Rates of the interval, over all ranks; TFLOP/s by the convention of `pretrain.flops`. Collective."""
        tokens_per_second = interval.steps * self.config.tokens_per_step / seconds
        return {
            "learning_rate": get_canonical_lr_for_logging(self.optimizer.param_groups) or 0.0,
            "grad_norm": gradient_norm,
            "skipped_steps": self.skipped_steps,
            "tokens_per_second": round(tokens_per_second, 1),
            "tflops_per_second": self.total_flops_per_token * tokens_per_second / 1e12,
            "memory_gib": peak_memory_gib(self.context),
        }

    def save(self, step: int) -> None:
        """Check that the frozen tensors are what they were, then write a checkpoint. Collective."""
        self.finish_parameters()
        model = self.model.module
        frozen = checkpointing.model_fingerprints(model, self.stage.frozen_parts)
        checkpointing.check_fingerprints(self.frozen.held, frozen, f"step {step}, frozen tensors")
        trained = checkpointing.model_fingerprints(model, self.stage.trained_parts)
        checkpoint_saving.save(
            self.config,
            model,
            self.optimizer,
            self.stage.trained_parts,
            step,
            self.origin,
            self.frozen.saved | trained,
        )
