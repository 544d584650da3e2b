"""What is in a checkpoint, a run or a Hugging Face folder: where it comes from, its parts, and its tensors.

Nothing is read but descriptions, unless the values of the tensors are asked for; then memory holds one tensor.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from checkpoint_tools.formats.megatron_files import MegatronWeights
from checkpoint_tools.formats.opened_model import HF_CONFIG_FILE, open_model
from checkpoint_tools.formats.tensor_reader import TensorReader
from checkpoint_tools.formats.weight_map import weight_rules
from data_prep.errors import UserError
from data_prep.output_files import read_json_object
from data_prep.progress import progress_bar
from pretrain import cpu_redirects

cpu_redirects.apply()

from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoints.checkpoint_folder import (
    CheckpointDescription,
    find_checkpoints,
    is_checkpoint,
    read_description,
    resolve_checkpoint,
    start_of,
)
from pretrain.fingerprint import fingerprint_tensors
from pretrain.model.cola import PARTS
from pretrain.recipes import recipe_from_fields

Check = Literal["ok", "DAMAGED", "not recorded"]
GONE = "gone"
_CHUNK_ELEMENTS = 1 << 18  # in fp32, so that they stay in the cache


@dataclass(frozen=True, kw_only=True)
class TensorValues:
    """What is in a tensor; None where it cannot be read, or has no finite element."""

    norm: float | None = None
    """Root of the sum of squares of its finite elements, which are taken in fp32."""
    min: float | None = None
    """Smallest finite element."""
    max: float | None = None
    """Largest finite element."""
    non_finite: int | None = None
    """Elements that are NaN or infinite."""
    hash: str | None = None
    """Fingerprint, of what is stored."""
    check: Check | None = None
    """Whether that is the recorded fingerprint; None where nothing records any."""


@dataclass(frozen=True, kw_only=True)
class ShownTensor:
    """One tensor."""

    name: str
    """Under which it can be read."""
    part: str
    """Part of the model that it belongs to."""
    shape: tuple[int, ...]
    """Size along each axis."""
    dtype: str
    """Type of its elements, torch's name for it."""
    parameters: int
    """Its elements."""
    bytes: int
    """Size of its data."""
    values: TensorValues | None = None
    """What is in it, if it was read."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What there is to show."""

    head: dict[str, object]
    """Facts of the whole, of JSON's types."""
    places: dict[str, str]
    """Where each part lies; a part that lies nowhere any more is GONE."""
    tensors: list[ShownTensor]
    """In the model's order, part by part."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A model that was opened, but not read."""

    head: dict[str, object]
    places: dict[str, str]
    reader: TensorReader
    part_of: dict[str, str]
    """Part of each tensor, in the model's order."""
    fingerprints: Callable[[str, torch.Tensor], dict[str, str]]
    """Of the tensor with a name, by the keys that it is stored under."""
    recorded: Mapping[str, str] | None
    """Fingerprints that were recorded, by the same keys."""


def show(path: Path, *, values: bool = False) -> Shown:
    """Look at what lies at `path`; with `values`, read all of it, under a progress bar.

    Raises:
        UserError: if there is no model, or it cannot be opened.
    """
    ours = is_checkpoint(path) or find_checkpoints(path)
    source = _open_checkpoint(path) if ours else _open_huggingface(path)
    tensors = [_facts(source, name, part) for name, part in source.part_of.items()]
    if values:
        tensors = list(_with_values(source, tensors))
    return Shown(head=source.head, places=source.places, tensors=tensors)


def _open_checkpoint(path: Path) -> _Source:
    checkpoint = resolve_checkpoint(path)
    description = read_description(checkpoint)
    recipe = recipe_from_fields(description.recipe, str(checkpoint))
    chain = list(_chain(checkpoint))
    places: dict[str, Path] = {}
    for folder, link in chain:
        places |= {part: folder for part in (link.parts if link else ()) if part not in places}
    named = {name.split(".")[0] for name in description.fingerprints} | places.keys()
    parts = tuple(part for part in PARTS if part in places)
    weights = MegatronWeights(recipe, checkpoint, parts)
    return _Source(
        head={
            "kind": "checkpoint",
            "path": str(checkpoint),
            "steps_of_the_run": [read_description(folder).step for folder in find_checkpoints(path)],
            "stage": description.stage,
            "step": description.step,
            "tokens": description.consumed_tokens,
            "precision": recipe.training.precision,
            "start_from": [_link_text(folder, link) for folder, link in chain[1:]],
            **_size(checkpoint),
            "optimizer_state": (checkpoint / "optimizer" / ".metadata").is_file(),
            "tokenizer_fingerprint": description.tokenizer_fingerprint,
            "data_fingerprint": description.data_fingerprint,
            "megatron_version": description.megatron_version,
            "model": vars(recipe.model),
            "actions": vars(recipe.actions) if named != {"base"} else {},
        },
        places={part: str(places.get(part, GONE)) for part in PARTS if part in named},
        reader=weights,
        part_of={name: name.split(".")[0] for name in weights.facts},
        fingerprints=weights.fingerprint,
        recorded=description.fingerprints,
    )


def _chain(checkpoint: Path) -> Iterator[tuple[Path, CheckpointDescription | None]]:
    """`checkpoint`, what it started from, and so on; where one is gone (None), so are those before it."""
    folder: Path | None = checkpoint
    seen: set[Path] = set()
    while folder is not None and folder not in seen:  # not for ever, whatever it says
        seen.add(folder)
        description = read_description(folder) if is_checkpoint(folder) else None
        yield folder, description
        folder = start_of(folder, description) if description else None


def _link_text(folder: Path, description: CheckpointDescription | None) -> str:
    return f"{folder}: {f'{description.stage}, step {description.step:,}' if description else GONE}"


def _open_huggingface(folder: Path) -> _Source:
    opened = open_model(folder)
    config = read_json_object(folder / HF_CONFIG_FILE, "download or export the model again")
    return _Source(
        head={
            "kind": "Hugging Face folder",
            "path": str(folder),
            "model_type": config["model_type"],
            "architectures": config.get("architectures", []),
            **_size(folder),
            "notices": list(opened.notices),
            "model": vars(opened.model),
            "actions": vars(opened.actions) if opened.parts != ("base",) else {},
        },
        places=dict.fromkeys(opened.parts, str(folder)),
        reader=opened.reader,
        part_of={
            name: part
            for part in opened.parts
            for rule in weight_rules(opened.model, opened.actions, (part,))
            for name in rule.huggingface
        },
        fingerprints=lambda name, tensor: fingerprint_tensors(
            {name: ShardedTensor.from_rank_offsets(name, tensor)}
        ),
        recorded=None,
    )


def _size(folder: Path) -> dict[str, object]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"files": len(sizes), "bytes": sum(sizes)}


def _facts(source: _Source, name: str, part: str) -> ShownTensor:
    facts = source.reader.facts[name]
    return ShownTensor(
        name=name,
        part=part,
        shape=facts.shape,
        dtype=facts.dtype_name,
        parameters=facts.numel,
        bytes=facts.bytes,
    )


def _with_values(source: _Source, tensors: Sequence[ShownTensor]) -> Iterator[ShownTensor]:
    total_bytes = sum(tensor.bytes for tensor in tensors)
    with progress_bar("read", total_bytes, unit="B", unit_scale=True, leave=False) as bar:
        for tensor in tensors:
            yield replace(tensor, values=_read_values(source, tensor.name))
            bar.update(tensor.bytes)


def _read_values(source: _Source, name: str) -> TensorValues:
    try:
        tensor = source.reader.read(name)
    except UserError:  # the others are still worth a look
        return TensorValues(check="DAMAGED")
    found = source.fingerprints(name, tensor)
    return replace(
        describe_values(tensor), hash=" ".join(found.values()), check=_check(found, source.recorded)
    )


def _check(found: Mapping[str, str], recorded: Mapping[str, str] | None) -> Check | None:
    if recorded is None:
        return None
    if not found.keys() <= recorded.keys():
        return "not recorded"
    return "ok" if all(recorded[key] == value for key, value in found.items()) else "DAMAGED"


def describe_values(tensor: torch.Tensor) -> TensorValues:
    """Norm and extremes of the finite elements of `tensor`, and how many are not; a chunk at a time."""
    squares, low, high, finite_elements = 0.0, math.inf, -math.inf, 0
    for chunk in tensor.reshape(-1).split(_CHUNK_ELEMENTS):
        numbers = chunk.float()
        if not numbers.sum().isfinite():  # as it is in most tensors, which need no second look
            numbers = numbers[numbers.isfinite()]
        if numbers.numel():
            squares += float(numbers.double().square().sum())  # fp32 would overflow at 1e19
            chunk_low, chunk_high = torch.aminmax(numbers)
            low, high = min(low, float(chunk_low)), max(high, float(chunk_high))
            finite_elements += numbers.numel()
    non_finite = tensor.numel() - finite_elements
    if not finite_elements:
        return TensorValues(non_finite=non_finite)
    return TensorValues(norm=math.sqrt(squares), min=low, max=high, non_finite=non_finite)


def totals(tensors: Iterable[ShownTensor]) -> dict[str, int]:
    """Numbers of tensors, of parameters and of bytes."""
    listed = list(tensors)
    return {
        "tensors": len(listed),
        "parameters": sum(tensor.parameters for tensor in listed),
        "bytes": sum(tensor.bytes for tensor in listed),
    }
