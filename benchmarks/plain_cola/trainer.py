"""Train the plain CoLA on one device: gradient accumulation, clipping, AdamW, warm-up and cosine."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from benchmarks.plain_cola.losses import PlainBatch, stage_loss
from benchmarks.plain_cola.model import PlainCola
from benchmarks.plain_cola.settings import PlainOptimizer, Stage

# Which parameters a stage trains, by the start of their names.
TRAINED_PREFIXES: dict[Stage, tuple[str, ...]] = {
    "base": ("embed_tokens.", "layers.", "norm.", "lm_head."),
    "idm": ("action_",),
    "policy": ("policy_",),
}
NO_WEIGHT_DECAY = "action_code_book.weight"


class StepReport(NamedTuple):
    """What one optimizer step saw."""

    loss: torch.Tensor
    """Mean loss of the micro-batches, nats."""
    gradient_norm: torch.Tensor
    """Global norm before clipping."""


class PlainTrainer:
    """Trains what `stage` trains and freezes the rest.

    `precision` bf16 is PyTorch's automatic mixed precision: fp32 weights where trained, bf16 where frozen.
    `activation_checkpointing` computes every block again in the backward pass, as the authors do.
    """

    def __init__(
        self,
        model: PlainCola,
        stage: Stage,
        settings: PlainOptimizer,
        activation_checkpointing: bool = False,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.model, self.stage, self.settings, self.precision = model, stage, settings, precision
        model.activation_checkpointing = activation_checkpointing
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(TRAINED_PREFIXES[stage]))
            if precision == "bf16" and not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        self.optimizer = build_optimizer(self.trained_parameters(), settings)
        # The scheduler counts from zero, the steps from one.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: learning_rate(settings, done + 1) / settings.learning_rate
        )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """By name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def step(self, micro_batches: Sequence[PlainBatch]) -> StepReport:
        """One optimizer step over the micro-batches of a global batch."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.accumulate(micro_batches)
        norm = nn.utils.clip_grad_norm_(self.trained_parameters().values(), self.settings.clip_gradient_norm)
        self.optimizer.step()
        self.scheduler.step()
        return StepReport(loss, norm)

    def accumulate(self, micro_batches: Sequence[PlainBatch]) -> torch.Tensor:
        """Add the gradients of the mean loss over the micro-batches; returns that loss."""
        losses = []
        for batch in micro_batches:
            with torch.autocast(
                batch.tokens_BS.device.type, torch.bfloat16, enabled=self.precision == "bf16"
            ):
                loss = stage_loss(self.model, self.stage, batch) / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()


def build_optimizer(parameters: dict[str, nn.Parameter], settings: PlainOptimizer) -> torch.optim.AdamW:
    """AdamW; weight decay on everything but the codebook."""
    groups = [
        {
            "params": [p for name, p in parameters.items() if (name == NO_WEIGHT_DECAY) == spared],
            "weight_decay": 0.0 if spared else settings.weight_decay,
        }
        for spared in (False, True)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def learning_rate(settings: PlainOptimizer, step: int) -> float:
    """Of optimizer step number `step`, counted from one: a line up from zero, half a cosine down, the minimum."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    share = min((step - settings.warmup_steps) / (settings.decay_steps - settings.warmup_steps), 1.0)
    span = settings.learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + span * (1 + math.cos(math.pi * share)) / 2
