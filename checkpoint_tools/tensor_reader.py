"""Tensors by name, read one at a time: what every converter and comparison here works on.

A folder of safetensors, a Megatron checkpoint, and one seen under the names of the other all look alike through this,
so that conversion is writing what a reader reads, and memory is bounded by the largest tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class TensorFacts:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    """Its size along each axis."""
    dtype: torch.dtype
    """Type of its elements."""

    @property
    def bytes(self) -> int:
        """Size of its data."""
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * self.dtype.itemsize


class TensorReader(Protocol):
    """Named tensors somewhere on disk."""

    @property
    def facts(self) -> Mapping[str, TensorFacts]:
        """All tensors, in a stable order; costs no reading of data."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, whole, on the CPU, contiguous; the caller may change it. KeyError if there is none."""
