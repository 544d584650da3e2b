"""What a training stage is: which parts it builds, which it trains, and its loss on one micro-batch.

The loop (`pretrain.train_loop`) knows only this. A new stage is a new subclass, not a new loop.
Shapes: B batch, S sequence, H hidden, A actions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel


class Batch(NamedTuple):
    """One micro-batch of this data-parallel rank; every pipeline stage reads the same."""

    tokens_BS: torch.Tensor
    """Input tokens."""
    labels_BS: torch.Tensor
    """The next token of each position."""
    sample_index_B: torch.Tensor
    """Index of each sample in the training order; action noise is drawn from it."""
    hidden_SBH: torch.Tensor | None = None
    """The frozen base's hidden state, where it was computed ahead (`pretrain.base_ahead`)."""


class Carry(NamedTuple):
    """What one pipeline stage hands to the next: as much of it as there is at that place of the chain."""

    hidden_SBH: torch.Tensor | None = None
    """The base's state, finished or on its way through the blocks."""
    idm: torch.Tensor | None = None
    """The IDM's state [S, B, H] on its way, or its finished logits [S, B, A]."""
    labels_SB: torch.Tensor | None = None
    """The actions the policy is to choose, stage `policy`."""
    policy_SBH: torch.Tensor | None = None
    """The policy's state on its way."""


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
    def forward(self, model: ColaModel, batch: Batch, carry: Carry | None) -> Carry | StageLoss:
        """One micro-batch through the parts of the model that are here; `carry` is None on the first pipeline stage.

        `model.training` False means evaluation (argmax actions).

        Returns:
            What the next pipeline stage needs, or on the last one the loss and metrics.
        """


def frozen_hidden(model: ColaModel, batch: Batch, carry: Carry | None) -> torch.Tensor | None:
    """The frozen base's state [S, B, H] after the blocks that are here; nothing is kept for a backward pass.

    None on a pipeline stage that neither computes it nor was handed it.
    """
    if batch.hidden_SBH is not None:
        return batch.hidden_SBH
    received_SBH = carry.hidden_SBH if carry else None
    if model.base.num_layers_here == 0:
        return received_SBH
    with torch.no_grad():
        return model.base.hidden(batch.tokens_BS, received_SBH)
