"""Checkpoints: what a stage trained, where the rest comes from, and the optimizer.

Layout of a run:  checkpoints/step_00000500/{weights/, optimizer/, cola.json}
weights/ and optimizer/ are Megatron distributed checkpoints, loadable on any layout of ranks. cola.json describes
them and holds the fingerprints of the trained and the frozen tensors. A checkpoint is written under a name ending in
`.partial` and renamed when complete, so a folder with the final name is always whole.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer

from data_prep.errors import UserError
from data_prep.output_files import partial_path, write_json_whole
from pretrain.config import RunConfig
from pretrain.fingerprint import differing_tensors, fingerprint_tensors
from pretrain.model.cola import ColaModel
from pretrain.optimization import make_loadable, make_savable
from pretrain.recipes import recipe_fields

FORMAT_VERSION = 1
DESCRIPTION_FILE = "cola.json"
# Optimizer state by parameter, not by rank, so that another layout of ranks can load it.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription:
    """Contents of cola.json."""

    format_version: int
    """Layout of the checkpoint; readers refuse one they do not know."""
    stage: str
    """Stage that wrote it."""
    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Sequences read so far."""
    consumed_tokens: int
    """Tokens read so far."""
    parts: list[str]
    """Model parts whose weights are inside."""
    start_from: str | None
    """Checkpoint the frozen parts came from, relative to the run folder."""
    tokenizer_fingerprint: str
    """Of the tokenizer that made the training data."""
    data_fingerprint: str
    """Of the blended shards, which together with the seed decide the order of samples."""
    recipe: dict[str, Any]
    """The resolved run configuration."""
    fingerprints: dict[str, str]
    """Of every trained and frozen tensor of the model, by checkpoint key."""
    megatron_version: str
    """megatron-core that wrote the files."""


@dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """What a run is made from; the same for all its checkpoints."""

    start: Path | None
    """Checkpoint whose parts are frozen in it."""
    tokenizer_fingerprint: str
    """As in `CheckpointDescription`."""
    data_fingerprint: str
    """As in `CheckpointDescription`."""


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run_folder / "checkpoints" / f"step_{step:08d}"


def find_checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(
        path.parent for path in (run_folder / "checkpoints").glob(f"step_*[0-9]/{DESCRIPTION_FILE}")
    )


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest of the run folder `path`."""
    if (path / DESCRIPTION_FILE).is_file():
        return path
    checkpoints = find_checkpoints(path)
    if not checkpoints:
        raise UserError(
            f"{path}: holds no complete checkpoint; name a run folder or a checkpoints/step_* folder"
        )
    return checkpoints[-1]


def read_description(checkpoint: Path) -> CheckpointDescription:
    """cola.json of `checkpoint`.

    Raises:
        UserError: if it is missing, damaged or of another format version.
    """
    file = checkpoint / DESCRIPTION_FILE
    try:
        description = CheckpointDescription(**json.loads(file.read_text()))
    except FileNotFoundError:
        raise UserError(f"{file}: not found; {checkpoint} is not a complete checkpoint") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); use another checkpoint of the run") from None
    if description.format_version != FORMAT_VERSION:
        raise UserError(f"{file}: format {description.format_version}, this code reads {FORMAT_VERSION}")
    return description


def locate_parts(checkpoint: Path) -> dict[str, Path]:
    """Which checkpoint holds each part of the model: `checkpoint` itself, then what it started from, and so on."""
    places: dict[str, Path] = {}
    current: Path | None = checkpoint
    while current is not None:
        description = read_description(current)
        places |= {part: current for part in description.parts if part not in places}
        current = start_of(current, description)
    return places


def start_of(checkpoint: Path, description: CheckpointDescription) -> Path | None:
    """The checkpoint that the run of `checkpoint` started from; None for a base run."""
    if description.start_from is None:
        return None
    return (checkpoint.parent.parent / description.start_from).resolve()


def save(
    config: RunConfig,
    model: ColaModel,
    optimizer: MegatronOptimizer,
    trained_parts: tuple[str, ...],
    step: int,
    origin: RunOrigin,
    fingerprints: dict[str, str],
) -> Path:
    """Write the checkpoint of `step`. Collective: every rank calls it."""
    final = step_folder(config.run_folder, step)
    partial = partial_path(final)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        for name in ("weights", "optimizer"):
            (partial / name).mkdir(parents=True)
    dist.barrier()
    weights = sharded_weights(model, trained_parts)
    make_savable(optimizer)
    optimizer_state = optimizer.sharded_state_dict(weights, metadata=_OPTIMIZER_FORMAT)
    dist_checkpointing.save(weights, str(partial / "weights"))
    dist_checkpointing.save({"optimizer": optimizer_state}, str(partial / "optimizer"))
    if dist.get_rank() == 0:
        description = CheckpointDescription(
            format_version=FORMAT_VERSION,
            stage=config.stage,
            step=step,
            consumed_samples=step * config.training.global_batch_size,
            consumed_tokens=step * config.tokens_per_step,
            parts=list(trained_parts),
            start_from=os.path.relpath(origin.start, config.run_folder) if origin.start else None,
            tokenizer_fingerprint=origin.tokenizer_fingerprint,
            data_fingerprint=origin.data_fingerprint,
            recipe=recipe_fields(config),
            fingerprints=fingerprints,
            megatron_version=megatron_version,
        )
        write_json_whole(partial / DESCRIPTION_FILE, asdict(description))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in find_checkpoints(config.run_folder)[: -config.checkpoint.keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def sharded_weights(model: ColaModel, parts: tuple[str, ...]) -> dict[str, Any]:
    """Megatron sharded state of `parts`, without Transformer Engine's extra states (empty without delayed scaling)."""
    state: dict[str, Any] = {}
    for part in (part for part in parts if part in model.parts):
        state |= getattr(model, part).sharded_state_dict(prefix=f"{part}.")
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def load_parts(model: ColaModel, parts: tuple[str, ...], checkpoint: Path) -> None:
    """Load the weights of `parts` from wherever `checkpoint` says they are. Collective.

    Raises:
        UserError: if a part is nowhere, files are damaged, or a tensor is missing or has another shape.
    """
    places = locate_parts(checkpoint)
    for part in parts:
        if part not in places:
            raise UserError(f"{checkpoint}: has no trained '{part}', nor has any run it started from")
        requested = sharded_weights(model, (part,))
        folder = places[part] / "weights"
        loaded = _load(requested, folder)
        answer = model.load_state_dict(loaded, strict=False)
        assert not answer.unexpected_keys, answer.unexpected_keys


def load_checked(model: ColaModel, parts: tuple[str, ...], checkpoint: Path) -> dict[str, str]:
    """`load_parts`, and check every tensor against the fingerprint that `checkpoint` recorded. Collective.

    Returns:
        The fingerprints.
    """
    load_parts(model, parts, checkpoint)
    found = model_fingerprints(model, parts)
    check_fingerprints(read_description(checkpoint).fingerprints, found, str(checkpoint))
    return found


def load_optimizer(
    model: ColaModel, optimizer: MegatronOptimizer, parts: tuple[str, ...], checkpoint: Path
) -> None:
    """Load the optimizer's state of `checkpoint`. Collective."""
    make_loadable(optimizer)
    requested = optimizer.sharded_state_dict(
        sharded_weights(model, parts), is_loading=True, metadata=_OPTIMIZER_FORMAT
    )
    optimizer.load_state_dict(_load({"optimizer": requested}, checkpoint / "optimizer")["optimizer"])


def _load(requested: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(requested, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    except (CheckpointingException, OSError, EOFError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def model_fingerprints(model: ColaModel, parts: tuple[str, ...]) -> dict[str, str]:
    """Fingerprints of `parts` as they are in memory. Collective."""
    return fingerprint_tensors(sharded_weights(model, parts))


def check_fingerprints(expected: dict[str, str], found: dict[str, str], where: str) -> None:
    """Raise unless every tensor in `found` has its `expected` fingerprint."""
    changed = differing_tensors({name: value for name, value in expected.items() if name in found}, found)
    if changed:
        raise UserError(
            f"{where}: {len(changed)} tensor(s) are not what was saved, first {changed[0]}; "
            "the files or the memory were damaged, or the checkpoint is of another run"
        )
