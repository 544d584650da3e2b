"""The one training loop, for every stage: Megatron's schedule, optimizer step, metrics, validation, checkpoints."""

import math
import time
from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func

from pretrain import checkpointing
from pretrain.config import RunConfig
from pretrain.data import IndexedSamples, micro_batches
from pretrain.flops import flops_per_token
from pretrain.metrics import MeanOfSteps, MetricsWriter, peak_memory_gib
from pretrain.parallel import ParallelContext
from pretrain.stages.contract import Batch, Stage, StageLoss


class NonFiniteLossError(RuntimeError):
    """The loss or gradient norm became NaN or infinite; the optimizer has not moved on it."""


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
        origin: checkpointing.RunOrigin,
        frozen_fingerprints: dict[str, str],
    ) -> None:
        self.config, self.context, self.stage = config, context, stage
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.train_samples, self.validation_samples = samples
        self.origin, self.frozen_fingerprints = origin, frozen_fingerprints
        self.total_flops_per_token = sum(flops_per_token(config).values())

    def run(self, first_step: int) -> None:
        """Train the steps after `first_step`; validates and saves on the way and at the end."""
        config = self.config
        batches = micro_batches(self.train_samples, config, self.context, first_step, config.training.steps)
        with MetricsWriter(config, self.context, first_step) as writer:
            started = time.monotonic()
            interval, interval_seconds = MeanOfSteps(self.context), 0.0
            for step in range(first_step + 1, config.training.steps + 1):
                step_started = time.monotonic()
                gradient_norm = self.train_step(batches, interval, step)
                interval_seconds += time.monotonic() - step_started
                writer.step_done()
                last = step == config.training.steps
                if last or step % config.logging.interval_steps == 0:
                    line = self.describe(step, "train", interval, time.monotonic() - started)
                    writer.write(line | self.speed(interval, interval_seconds, gradient_norm))
                    interval, interval_seconds = MeanOfSteps(self.context), 0.0
                if last or step % config.validation.interval_steps == 0:
                    writer.write(
                        self.describe(step, "validation", self.validate(), time.monotonic() - started)
                    )
                if last or step % config.checkpoint.interval_steps == 0:
                    self.save(step)

    def train_step(self, batches: Iterator[Batch], means: MeanOfSteps, step: int) -> float:
        """One optimizer step over a global batch; returns the gradient norm before clipping."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        step_means = means.add_step(self.forward_backward(batches, forward_only=False))
        if not all(math.isfinite(value) for value in step_means.values()):
            raise NonFiniteLossError(f"step {step}: {step_means}; the optimizer was not moved")
        self.scheduler.step(increment=1)
        _, gradient_norm, _ = self.optimizer.step()
        if gradient_norm is None or not math.isfinite(gradient_norm):
            raise NonFiniteLossError(f"step {step}: gradient norm {gradient_norm}; nothing of it was saved")
        return float(gradient_norm)

    def forward_backward(self, batches: Iterator[Batch], forward_only: bool) -> list[StageLoss]:
        """All micro-batches of one global batch through Megatron's schedule."""
        training = self.config.training
        count = training.global_batch_size // (training.micro_batch_size * self.context.data_parallel_size)
        return get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=count,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=forward_only,
        )

    def forward_step(self, batches: Iterator[Batch], model: torch.nn.Module):  # type: ignore[no-untyped-def]
        """Megatron's contract: the output, and a function that turns it into (loss, report)."""
        result: StageLoss = model(self.stage, next(batches))
        # The schedule divides the output in place by the number of micro-batches; what is logged must not change.
        return result.loss.clone(), lambda output: (output, result)

    @torch.no_grad()
    def validate(self) -> MeanOfSteps:
        """Means over the validation batches, argmax actions. Collective."""
        self.model.eval()
        means = MeanOfSteps(self.context)
        steps = self.config.validation.steps
        batches = micro_batches(self.validation_samples, self.config, self.context, 0, steps)
        for _ in range(steps):
            means.add_step(self.forward_backward(batches, forward_only=True))
        self.model.train()
        return means

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
            "tokens_per_second": round(tokens_per_second, 1),
            "tflops_per_second": self.total_flops_per_token * tokens_per_second / 1e12,
            "memory_gib": peak_memory_gib(self.context),
        }

    def save(self, step: int) -> None:
        """Check that the frozen tensors are what they were, then write a checkpoint. Collective."""
        model = self.model.module
        frozen = checkpointing.model_fingerprints(model, self.stage.frozen_parts)
        checkpointing.check_fingerprints(self.frozen_fingerprints, frozen, f"step {step}, frozen tensors")
        trained = checkpointing.model_fingerprints(model, self.stage.trained_parts)
        checkpointing.save(
            self.config,
            model,
            self.optimizer,
            self.stage.trained_parts,
            step,
            self.origin,
            frozen | trained,
        )
