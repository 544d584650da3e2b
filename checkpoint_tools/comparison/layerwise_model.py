"""What the two kinds of model, each run by its own code, look like to whoever compares them.

Shapes: S sequence, K positions, H hidden, V vocabulary, A actions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

# The parts that end in action logits, and what their layers are called.
ACTION_PARTS = {"idm": "IDM", "policy": "policy"}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One sequence of tokens, at positions that may have a gap."""

    tokens_S: torch.Tensor
    """Token ids."""
    actions_S: torch.Tensor
    """Actions for the world model where there is no IDM to infer them."""
    runs: tuple[range, ...]
    """Their positions, as runs one after another."""

    def positions(self) -> torch.Tensor:
        """The position of each token, [S]."""
        return torch.cat([torch.arange(run.start, run.stop) for run in self.runs])


class LayerwiseModel(Protocol):
    """A model that is run on one probe, part by part; `hidden` comes first."""

    layers: Mapping[str, nn.Module]
    """By what they are called, the modules whose outputs are states (of H, or a tuple that begins with one)."""

    def hidden(self) -> torch.Tensor:
        """h [S, H]: the base's state after its final norm."""

    def action_logits(self, part: str, hidden_SH: torch.Tensor) -> torch.Tensor:
        """Logits [S, A] of "policy", or of "idm" (of the action that led to each token)."""

    def world_state(self, hidden_SH: torch.Tensor, actions_S: torch.Tensor) -> torch.Tensor:
        """What the token head reads [S, H] under the given actions."""

    def token_logits(self, state_KH: torch.Tensor) -> torch.Tensor:
        """Logits [K, V] of the token head, without those of padding."""


def numbered(title: str, layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """`layers` by what they are called."""
    return {f"{title} layer {number}": layer for number, layer in enumerate(layers)}
