"""The frozen base, run ahead of the step that needs it.

The base never changes, so its hidden states may be computed at any time. Computed while gradients are being reduced
and parameters gathered, they hide that traffic, exactly; and since the base keeps nothing for a backward pass, it can
take more sequences at once than the trained parts.

Shapes: S sequence, B batch, H hidden.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice

import torch

from pretrain.model.cola import ColaModel
from pretrain.stages.contract import Batch

# One hides the reduction of gradients, one the gathering of parameters.
GROUPS_AHEAD = 2


class BaseAhead(Iterator[Batch]):
    """Micro-batches with their hidden states; `groups` of `group_size` micro-batches go through the base at once."""

    def __init__(self, batches: Iterator[Batch], model: ColaModel, group_size: int) -> None:
        self.batches, self.model, self.group_size = batches, model, group_size
        self.ready: deque[list[Batch]] = deque()

    def __next__(self) -> Batch:
        if not self.ready:
            self.run_ahead()
        if not self.ready:
            raise StopIteration
        batch = self.ready[0].pop(0)
        if not self.ready[0]:
            self.ready.popleft()
        return batch

    @torch.no_grad()
    def run_ahead(self) -> None:
        """Compute one more group of hidden states, unless enough are waiting or no batch is left."""
        if len(self.ready) >= GROUPS_AHEAD:
            return
        group = list(islice(self.batches, self.group_size))
        if not group:
            return
        hidden_SBH = self.model.base.hidden(torch.cat([batch.tokens_BS for batch in group]))
        sizes = [len(batch.tokens_BS) for batch in group]
        parts = hidden_SBH.split(sizes, dim=1)
        self.ready.append(
            [batch._replace(hidden_SBH=part.contiguous()) for batch, part in zip(group, parts, strict=True)]
        )
