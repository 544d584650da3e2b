"""What a checkpoint holds: sharded weights, optimizer state, fingerprints; loaded and checked on any layout of ranks.

Where checkpoints lie and what describes them is `checkpoint_folder`, how they are written `checkpoint_saving`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint.api import CheckpointException

from data_prep.errors import UserError
from pretrain.checkpoints.checkpoint_folder import locate_parts, read_description
from pretrain.checkpoints.safe_pickle import refuse_foreign_code
from pretrain.fingerprint import differing_tensors, fingerprint_tensors
from pretrain.model.cola import ColaModel
from pretrain.optimization import make_loadable, own_settings

# Optimizer state by parameter, not by rank, so that another layout of ranks can load it.
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True, kw_only=True)
class FrozenFingerprints:
    """Of the tensors that a run does not train."""

    saved: dict[str, str]
    """As the checkpoint they came from recorded them."""
    held: dict[str, str]
    """As the run holds them after loading; others than `saved` where the base is quantised to FP8."""


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
        sharded_weights(model, parts), is_loading=True, metadata=OPTIMIZER_FORMAT
    )
    loaded = _load({"optimizer": requested}, checkpoint / "optimizer")["optimizer"]
    with own_settings(optimizer):
        optimizer.load_state_dict(loaded)


def _load(requested: dict[str, Any], folder: Path) -> dict[str, Any]:
    refuse_foreign_code(folder)
    try:
        return dist_checkpointing.load(requested, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    except (
        CheckpointException,
        CheckpointingException,
        OSError,
        EOFError,
        KeyError,
        RuntimeError,
        ValueError,
    ) as error:
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
