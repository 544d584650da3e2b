"""What a training stage is: which parts it builds, which it trains, and its loss on one micro-batch.

The loop (`pretrain.train_loop`) knows only this. A new stage is a new subclass, not a new loop.
Shapes: B batch, S sequence, A actions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel


class Batch(NamedTuple):
    """One micro-batch of this data-parallel rank."""

    tokens_BS: torch.Tensor
    """Input tokens."""
    labels_BS: torch.Tensor
    """The next token of each position."""
    sample_index_B: torch.Tensor
    """Index of each sample in the training order; action noise is drawn from it."""


@dataclass
class StageLoss:
    """The loss of one micro-batch and what to log about it."""

    loss: torch.Tensor
    """Scalar with gradient, nats."""
    means: dict[str, torch.Tensor]
    """Detached scalars, averaged over micro-batches and data-parallel ranks."""
    action_counts_A: torch.Tensor | None = field(default=None)
    """How often each action was the argmax of the IDM, summed over micro-batches and ranks."""


class Stage(ABC):
    """Stateless: everything it needs comes with the configuration, the model and the batch."""

    trained_parts: ClassVar[tuple[str, ...]]
    """Parts that receive gradients and go into this stage's checkpoints."""
    frozen_parts: ClassVar[tuple[str, ...]]
    """Parts loaded from earlier stages, bit-identical for ever."""

    def __init__(self, config: RunConfig, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.config = config
        self.mean_over_ranks = mean_over_ranks

    @abstractmethod
    def loss(self, model: ColaModel, batch: Batch) -> StageLoss:
        """Loss and metrics of one micro-batch; `model.training` False means evaluation (argmax actions)."""
