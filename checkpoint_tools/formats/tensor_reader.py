"""Tensors by name, read one at a time: what every converter and comparison here works on.

A folder of safetensors, a Megatron checkpoint, and one seen under the names of the other all look alike through this,
so that conversion is writing what a reader reads, and memory is bounded by the largest tensor.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from data_prep.errors import IntegrityError


@dataclass(frozen=True)
class TensorFacts:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    """Its size along each axis."""
    dtype: torch.dtype
    """Type of its elements."""

    @property
    def dtype_name(self) -> str:
        """torch's name of the type."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return self.numel * self.dtype.itemsize


class TensorReader(Protocol):
    """Named tensors somewhere on disk."""

    @property
    def facts(self) -> Mapping[str, TensorFacts]:
        """All tensors, in a stable order; costs no reading of data."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, whole, on the CPU, contiguous; the caller may change it. KeyError if there is none."""


def read_ahead(reader: TensorReader, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each of `names`; while the caller has one, a thread reads the next.

    Raises:
        IntegrityError: a tensor is not what the reader's facts say.
    """
    with ThreadPoolExecutor(1) as reading_thread:
        waiting = None
        for name in names:
            reading = reading_thread.submit(_read_checked, reader, name)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            # Nothing here holds on to the tensor that was given away.
            waiting = name, reading
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _read_checked(reader: TensorReader, name: str) -> torch.Tensor:
    tensor, facts = reader.read(name), reader.facts[name]
    if (tuple(tensor.shape), tensor.dtype) != (facts.shape, facts.dtype):
        raise IntegrityError(
            f"{name}: was to be {facts.dtype} {list(facts.shape)}, but reads as {tensor.dtype} "
            f"{list(tensor.shape)}; check the folder it comes from"
        )
    return tensor
