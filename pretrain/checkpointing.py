"""Checkpoints: what a stage trained, where the rest comes from (or the rest itself), and the optimizer.

Layout of a run:  checkpoints/step_00000500/{weights/, optimizer/, cola.json}
weights/ and optimizer/ are Megatron distributed checkpoints, loadable on any layout of ranks. cola.json describes
them and holds the fingerprints of the trained and the frozen tensors. A checkpoint is written under a name ending in
`.partial` and renamed when complete, so a folder with the final name is always whole.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from data_prep.errors import UserError
from data_prep.output_files import partial_path, write_json_whole
from pretrain.config import RunConfig
from pretrain.fingerprint import differing_tensors, fingerprint_tensors
from pretrain.model.cola import ColaModel
from pretrain.optimization import make_loadable, make_savable
from pretrain.planning.parameters import built_parts
from pretrain.recipes import recipe_fields

FORMAT_VERSION = 2
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
    """Checkpoint the frozen parts came from, relative to the run folder; a fact, even if they are inside too."""
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


@dataclass(frozen=True, kw_only=True)
class FrozenFingerprints:
    """Of the tensors that a run does not train."""

    saved: dict[str, str]
    """As the checkpoint they came from recorded them."""
    held: dict[str, str]
    """As the run holds them after loading; others than `saved` where the base is quantised to FP8."""


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run_folder / "checkpoints" / f"step_{step:08d}"


def find_checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(
        path.parent for path in (run_folder / "checkpoints").glob(f"step_*[0-9]/{DESCRIPTION_FILE}")
    )


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; None if it has none yet."""
    return next(reversed(find_checkpoints(run_folder)), None)


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest of the run folder `path`."""
    if is_checkpoint(path):
        return path
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise UserError(
            f"{path}: holds no complete checkpoint; name a run folder or a checkpoints/step_* folder"
        )
    return checkpoint


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


def locate_parts(checkpoint: Path, wanted: Iterable[str] | None = None) -> dict[str, Path]:
    """Which checkpoint holds each part of the model: `checkpoint` itself, then what it started from, and so on.

    What a checkpoint started from is looked at only while a part is missing; it may be gone otherwise.

    Args:
        checkpoint: where to begin.
        wanted: parts to look for; None: all parts of the model that was saved.

    Returns:
        The parts found; those that are nowhere are left out.

    Raises:
        UserError: if a wanted part should be in a checkpoint that is gone.
    """
    current, description = checkpoint, read_description(checkpoint)
    places = dict.fromkeys(description.parts, checkpoint)
    sought = {name.split(".")[0] for name in description.fingerprints} if wanted is None else set(wanted)
    while missing := sorted(sought - places.keys()):
        start = start_of(current, description)
        if start is None:
            break
        if not is_checkpoint(start):
            raise UserError(
                f"{current}: takes {', '.join(missing)} from {start}, which it started from and which holds no "
                "checkpoint any more; bring it back, or use a checkpoint saved with checkpoint.self_contained"
            )
        current, description = start, read_description(start)
        places |= {part: start for part in description.parts if part not in places}
    return places


def is_checkpoint(folder: Path) -> bool:
    """Whether a complete checkpoint lies in `folder` itself."""
    return (folder / DESCRIPTION_FILE).is_file()


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
    """Write the checkpoint of `step`, the frozen parts too if it is to need no other. Collective."""
    final = step_folder(config.run_folder, step)
    partial = partial_path(final)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        for name in ("weights", "optimizer"):
            (partial / name).mkdir(parents=True)
    dist.barrier()
    parts = built_parts(config) if config.checkpoint.self_contained else trained_parts
    weights = sharded_weights(model, parts, scales=True)
    make_savable(optimizer)
    optimizer_state = optimizer.sharded_state_dict(
        sharded_weights(model, trained_parts), metadata=_OPTIMIZER_FORMAT
    )
    dist_checkpointing.save(weights, str(partial / "weights"))
    dist_checkpointing.save({"optimizer": optimizer_state}, str(partial / "optimizer"))
    if dist.get_rank() == 0:
        description = CheckpointDescription(
            format_version=FORMAT_VERSION,
            stage=config.stage,
            step=step,
            consumed_samples=step * config.training.global_batch_size,
            consumed_tokens=step * config.tokens_per_step,
            parts=list(parts),
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


def sharded_weights(model: ColaModel, parts: tuple[str, ...], scales: bool = False) -> dict[str, Any]:
    """Megatron sharded state of `parts`; with `scales`, also Transformer Engine's extra states where they matter.

    They do under delayed scaling, whose maxima of past steps are in them; else they hold only the recipe.
    """
    state: dict[str, Any] = {}
    for part in (part for part in parts if part in model.parts):
        module = getattr(model, part)
        keep = scales and has_delayed_scales(module.config)
        whole = module.sharded_state_dict(prefix=f"{part}.")
        state |= {name: value for name, value in whole.items() if keep or not name.endswith("_extra_state")}
    return state


def has_delayed_scales(config: TransformerConfig) -> bool:
    """Whether the linear layers of a part scale by the maxima of past steps, which belong to a run's state."""
    return config.fp8 is not None and config.fp8_recipe == "delayed"


def load_parts(
    model: ColaModel, parts: tuple[str, ...], checkpoint: Path, scales: bool = False
) -> dict[str, str]:
    """Load `parts` from wherever `checkpoint` says they are; a resumed run loads its `scales` too. Collective.

    Returns:
        Fingerprints of what was loaded: as the model then holds it, but of FP8 weights as they were before.

    Raises:
        UserError: if a part is nowhere, files are damaged, or a tensor is missing or has another shape.
    """
    places, found = locate_parts(checkpoint, parts), dict[str, str]()
    for part in parts:
        if part not in places:
            raise UserError(f"{checkpoint}: has no trained '{part}', nor has any run it started from")
        loaded = _load(sharded_weights(model, (part,), scales), places[part] / "weights")
        quantised = is_quantised(model, part)
        if quantised:  # now, for the model will hold others
            found |= model_fingerprints(model, (part,), loaded)
        answer = model.load_state_dict(loaded, strict=False)
        assert not answer.unexpected_keys, answer.unexpected_keys
        if not quantised:
            found |= model_fingerprints(model, (part,))
    return found


def load_checked(
    model: ColaModel, parts: tuple[str, ...], checkpoint: Path, scales: bool = False
) -> dict[str, str]:
    """`load_parts`, and check every tensor against the fingerprint that `checkpoint` recorded. Collective.

    Returns:
        The fingerprints.
    """
    found = load_parts(model, parts, checkpoint, scales)
    check_fingerprints(read_description(checkpoint).fingerprints, found, str(checkpoint))
    return found


def load_frozen(model: ColaModel, parts: tuple[str, ...], checkpoint: Path) -> FrozenFingerprints:
    """`load_checked` of parts that stay as they are. Collective."""
    saved = load_checked(model, parts, checkpoint)
    quantised = tuple(part for part in parts if is_quantised(model, part))
    return FrozenFingerprints(saved=saved, held=saved | model_fingerprints(model, quantised))


def is_quantised(model: ColaModel, part: str) -> bool:
    """Whether weights of `part` are held in FP8 only, so that they are no longer those of the checkpoint."""
    return part in model.parts and bool(getattr(model, part).config.fp8_param)


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


def model_fingerprints(
    model: ColaModel, parts: tuple[str, ...], instead: Mapping[str, torch.Tensor] | None = None
) -> dict[str, str]:
    """Fingerprints of `parts` as they are in memory; of `instead` for the tensors that it names. Collective."""
    state = sharded_weights(model, parts)
    for name, value in (instead or {}).items():
        state[name].data = value
    return fingerprint_tensors(state)


def check_fingerprints(expected: dict[str, str], found: dict[str, str], where: str) -> None:
    """Raise unless every tensor in `found` has its `expected` fingerprint."""
    changed = differing_tensors({name: value for name, value in expected.items() if name in found}, found)
    if changed:
        raise UserError(
            f"{where}: {len(changed)} tensor(s) are not what was saved, first {changed[0]}; "
            "the files or the memory were damaged, or the checkpoint is of another run"
        )
