"""Which tensors of two models differ, by their Hugging Face names; memory holds two tensors, not two models.

Equal means byte by byte. Where types differ, it means that one is what the other becomes when it is cast.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from checkpoint_tools.formats.opened_model import OpenedCheckpoint, OpenedModel
from checkpoint_tools.formats.weight_map import weight_rules
from data_prep.progress import progress_bar
from pretrain.fingerprint import BITS_VIEW

CHUNK_ELEMENTS = 1 << 20  # compared at once, within the processor's cache

_Verdict = Literal["equal", "right rounded", "left rounded"]
# Shape, and sums that do not depend on the order of the elements.
_Marks = tuple[tuple[int, ...], int, int]


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """A tensor that both models have, and that is not the same in both."""

    name: str
    """Its Hugging Face name."""
    left: str
    """Type and shape on the left."""
    right: str
    """Type and shape on the right."""
    elements: int | None = None
    """How many elements differ; None, as the next two, where shapes do."""
    max_abs: float | None = None
    """Greatest difference of two elements."""
    relative: float | None = None
    """The same over the greatest magnitude on the left."""
    hint: str = ""
    """What the numbers tell of the cause."""

    def __str__(self) -> str:
        if self.elements is None:
            return f"{self.name}: {self.left} against {self.right}"
        size = f"differs by at most {self.max_abs:.3g}, in {self.elements:,} element(s) of {self.left}"
        return f"{self.name}: {size}" + (f"; {self.hint}" if self.hint else "")


@dataclass(frozen=True, kw_only=True)
class TensorComparison:
    """All tensors of the parts that two models share."""

    compared: int
    """How many tensors both have."""
    only_left: tuple[str, ...]
    """Names on the left alone."""
    only_right: tuple[str, ...]
    """Names on the right alone."""
    right_rounded: int
    """Tensors on the right that are those on the left, cast to a type that may hold less."""
    left_rounded: int
    """Tensors on the left that are those on the right, so cast, and not the other way round."""
    differences: tuple[TensorDifference, ...]
    """Those that differ, in the order of the model."""

    @property
    def fit(self) -> bool:
        """Whether both models have the same tensors of the same shapes, so that one can stand in for the other."""
        return not (self.only_left or self.only_right or any(d.elements is None for d in self.differences))

    @property
    def equal(self) -> bool:
        """Whether there is no difference but rounding."""
        return not (self.only_left or self.only_right or self.differences)


def common_dtypes(left: OpenedModel, right: OpenedModel, parts: tuple[str, ...]) -> dict[str, torch.dtype]:
    """By name, the narrower of the two types in which the models hold a tensor of `parts`."""
    return {
        name: min(left.reader.facts[name].dtype, right.reader.facts[name].dtype, key=lambda d: d.itemsize)
        for name in shared_names(left, right, parts)
    }


def shared_names(left: OpenedModel, right: OpenedModel, parts: tuple[str, ...]) -> list[str]:
    """Names of the tensors of `parts` that both models have, in the order of the model."""
    on_right = set(_names(right, parts))
    return [name for name in _names(left, parts) if name in on_right]


def compare_tensors(left: OpenedModel, right: OpenedModel, parts: tuple[str, ...]) -> TensorComparison:
    """Compare every tensor of `parts`.

    Raises:
        UserError: if a file is damaged.
    """
    names = shared_names(left, right, parts)
    marks: dict[str, tuple[_Marks, _Marks]] = {}
    total = sum(left.reader.facts[name].bytes for name in names)
    verdicts: list[TensorDifference | _Verdict] = []
    with progress_bar("tensors", total, unit="B", unit_scale=True, leave=False) as progress:
        for name in names:
            verdicts.append(_compare(name, left, right, marks))
            progress.update(left.reader.facts[name].bytes)
    counts = Counter(verdict for verdict in verdicts if isinstance(verdict, str))
    differences = [verdict for verdict in verdicts if isinstance(verdict, TensorDifference)]
    return TensorComparison(
        compared=len(names),
        only_left=tuple(name for name in _names(left, parts) if name not in set(names)),
        only_right=tuple(name for name in _names(right, parts) if name not in set(names)),
        right_rounded=counts["right rounded"],
        left_rounded=counts["left rounded"],
        differences=tuple(replace(d, hint=_hint(d.name, marks)) for d in differences),
    )


def _names(opened: OpenedModel, parts: tuple[str, ...]) -> list[str]:
    return [name for rule in weight_rules(opened.model, opened.actions, parts) for name in rule.huggingface]


def _compare(
    name: str, left: OpenedModel, right: OpenedModel, marks: dict[str, tuple[_Marks, _Marks]]
) -> TensorDifference | _Verdict:
    """Of one tensor; if it differs, puts what may tell the cause into `marks`."""
    facts = left.reader.facts[name], right.reader.facts[name]
    descriptions = [f"{f.dtype_name} {list(f.shape)}" for f in facts]
    difference = TensorDifference(name=name, left=descriptions[0], right=descriptions[1])
    if facts[0].shape != facts[1].shape:
        return difference
    pair = _read_both(name, left, right)
    if _equal(pair[0], pair[1]):
        return "equal" if facts[0].dtype == facts[1].dtype else "right rounded"
    if facts[0].dtype != facts[1].dtype and _equal(pair[1], pair[0]):
        return "left rounded"
    marks[name] = _marks(pair[0]), _marks(pair[1])
    return _measured(difference, *pair)


def _read_both(name: str, left: OpenedModel, right: OpenedModel) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(right.source, OpenedCheckpoint):  # takes a tensor's memory twice while it reads: goes first
        on_right = right.reader.read(name)
        return left.reader.read(name), on_right
    return left.reader.read(name), right.reader.read(name)


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return not any(bool(differs.any()) for _, _, differs in _chunks(left, right))


def _chunks(
    left: torch.Tensor, right: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Parts of both, and where `left`, cast to the type of `right`, has other bits than `right`."""
    bits = BITS_VIEW[right.dtype.itemsize]
    for ours, theirs in zip(*(t.flatten().split(CHUNK_ELEMENTS) for t in (left, right)), strict=True):
        yield ours, theirs, ours.to(theirs.dtype).view(bits) != theirs.view(bits)


def _measured(difference: TensorDifference, left: torch.Tensor, right: torch.Tensor) -> TensorDifference:
    elements, max_abs, magnitude = 0, 0.0, 0.0
    for ours, theirs, differs in _chunks(left, right):
        elements += int(differs.sum())
        distance = (ours.float() - theirs.float()).abs().nan_to_num(nan=math.inf)
        max_abs = max(max_abs, float(distance.max()))
        magnitude = max(magnitude, float(ours.abs().max()))
    relative = max_abs / magnitude if magnitude else math.inf
    return replace(difference, elements=elements, max_abs=max_abs, relative=relative)


def _marks(tensor: torch.Tensor) -> _Marks:
    total = squares = 0
    for chunk in tensor.flatten().split(CHUNK_ELEMENTS):
        bits = chunk.float().view(torch.int32).long()
        total += int(bits.sum())
        squares += int((bits * bits >> 20).sum())
    return tuple(tensor.shape), total, squares


def _hint(name: str, marks: dict[str, tuple[_Marks, _Marks]]) -> str:
    """What permuted or exchanged tensors have in common."""
    if name not in marks:
        return ""
    left, right = marks[name]
    if left == right:
        return "the same numbers in another order: heads, rows or halves are permuted"
    for other, (_, theirs) in marks.items():
        if theirs == left:
            return f"its numbers are in {other} on the right"
    return ""
