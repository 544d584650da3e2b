"""Whether two runs are the same to the last bit: final checkpoint (weights, optimizer, description) and metrics."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from pretrain.checkpoints.checkpoint_folder import read_description, resolve_checkpoint
from pretrain.config import METRICS_FILE
from pretrain.fingerprint import BITS_VIEW
from pretrain.parallel import parallel_context

# Times, rates and memory differ from run to run.
MEASURED = ("elapsed_seconds", "tokens_per_second", "tflops_per_second", "memory_gib")
# These name the run, or add up times.
OWN_FACTS = ("recipe", "loop.interval_seconds")


def differences(reference: Path, other: Path) -> list[str]:
    """What is not bit-identical in two run folders, a line each; empty if nothing is.

    Opens process groups for itself; torch.distributed must not be in use.
    """
    checkpoints = [resolve_checkpoint(folder) for folder in (reference, other)]
    descriptions = [_flat(asdict(read_description(checkpoint))) for checkpoint in checkpoints]
    with parallel_context(tensor_parallel_size=1, seed=0):
        contents = [_contents(checkpoint) for checkpoint in checkpoints]
    return [
        *_unequal("checkpoint", *contents),
        *_unequal("cola.json", *[_without_own(description) for description in descriptions]),
        *metrics_differences(reference, other),
    ]


def metrics_differences(reference: Path, other: Path) -> list[str]:
    """Lines of metrics.jsonl that differ in more than what is measured."""
    return list(_unequal("metrics", *[_metrics(folder) for folder in (reference, other)]))


def _metrics(folder: Path) -> dict[str, object]:
    lines: dict[str, object] = {}
    for position, text in enumerate((folder / METRICS_FILE).read_text().splitlines()):
        line = json.loads(text)
        kept = {name: value for name, value in line.items() if name not in MEASURED}
        lines[f"line {position + 1}"] = json.dumps(kept, sort_keys=True)
    return lines


def _contents(checkpoint: Path) -> dict[str, object]:
    """Every tensor and every other value that a checkpoint holds, by name."""
    contents: dict[str, object] = {}
    for kind in ("weights", "optimizer"):
        folder = str(checkpoint / kind)
        contents |= _flat(dist_checkpointing.load_plain_tensors(folder), f"{kind}.")
        contents |= _flat(dist_checkpointing.load_common_state_dict(folder), f"{kind}.common.")
    return contents


def _without_own(description: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in description.items() if not name.startswith(OWN_FACTS)}


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        children: Any = value.items()
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    else:
        return {prefix.rstrip("."): value}
    flat: dict[str, object] = {}
    for name, child in children:
        flat |= _flat(child, f"{prefix}{name}.")
    return flat


def _unequal(what: str, reference: Mapping[str, object], other: Mapping[str, object]) -> Iterator[str]:
    for name in sorted(reference.keys() | other.keys()):
        if name not in other or name not in reference:
            yield f"{what}: {name} is only in {'the reference' if name in reference else 'the other run'}"
        elif not _same(reference[name], other[name]):
            yield f"{what}: {name} differs"


def _same(one: object, two: object) -> bool:
    if not (torch.is_tensor(one) and torch.is_tensor(two)):
        return type(one) is type(two) and repr(one) == repr(two)
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    view = BITS_VIEW[one.element_size()]  # bits: NaN equals itself, and 0 is not -0
    return torch.equal(one.contiguous().view(view), two.contiguous().view(view))
