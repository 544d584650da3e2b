"""A model on disk, whatever wrote it: its configuration, and its tensors under their Hugging Face names.

Takes a run of the trainer, one of its checkpoints, or a Hugging Face folder (a base, a CoLA export, or the published
release's layout). Everything here that reads a model reads it through this.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoint_tools.formats.converted_reader import seen_as_huggingface
from checkpoint_tools.formats.families import read_action_config, read_model_config
from checkpoint_tools.formats.huggingface_folder import HF_CONFIG_FILE
from checkpoint_tools.formats.megatron_files import CheckedWeights, MegatronWeights
from checkpoint_tools.formats.safetensors_files import SafetensorsFolder, open_safetensors
from checkpoint_tools.formats.tensor_reader import TensorReader
from checkpoint_tools.formats.weight_map import weight_rules
from data_prep.errors import UserError
from data_prep.output_files import read_json_object
from pretrain.checkpoints.checkpoint_folder import (
    CheckpointDescription,
    find_checkpoints,
    locate_parts,
    read_description,
    resolve_checkpoint,
)
from pretrain.config import ActionConfig, ModelConfig, RunConfig
from pretrain.recipes import recipe_from_fields

# In a checkpoint that was imported: what the Hugging Face folder held besides weights.
HF_FILES_FOLDER = "huggingface"
EXPORTED_PARTS = ("base", "idm", "world_model", "policy")
# A policy that an idm run's start had is of the actions before that run.
PARTS_BY_STAGE = {"base": EXPORTED_PARTS[:1], "idm": EXPORTED_PARTS[:3], "policy": EXPORTED_PARTS}


@dataclass(frozen=True, kw_only=True)
class OpenedCheckpoint:
    """Where a model of Megatron's format lies."""

    folder: Path
    """checkpoints/step_*"""
    description: CheckpointDescription
    """Its cola.json."""
    recipe: RunConfig
    """The run that wrote it."""
    weights: MegatronWeights
    """Its tensors under our parameter names; not held against the recorded fingerprints, as `reader` is."""


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model whose tensors can be read one at a time."""

    path: Path
    """The checkpoint or the Hugging Face folder."""
    reader: TensorReader
    """Its tensors under their Hugging Face names."""
    model: ModelConfig
    """Sizes of the base."""
    actions: ActionConfig
    """Sizes of the other parts; the defaults where there are none."""
    parts: tuple[str, ...]
    """Of base, idm, world_model, policy: those it has."""
    source: OpenedCheckpoint | SafetensorsFolder
    """What it was opened from."""
    notices: tuple[str, ...] = ()
    """What the user should know of it, a line each."""


def open_model(path: Path) -> OpenedModel:
    """The model at `path`.

    Raises:
        UserError: if there is none, or its files are damaged, incomplete, or of a kind that is not supported.
    """
    if (path / HF_CONFIG_FILE).is_file():
        return _open_huggingface(path)
    if not find_checkpoints(path) and not (path / "cola.json").is_file():
        raise UserError(
            f"{path}: is no model; name a run folder, a checkpoints/step_* folder, or a Hugging Face folder "
            f"with its {HF_CONFIG_FILE}"
        )
    return _open_checkpoint(resolve_checkpoint(path))


def _open_checkpoint(checkpoint: Path) -> OpenedModel:
    description = read_description(checkpoint)
    recipe = recipe_from_fields(description.recipe, str(checkpoint))
    if "quantiser" in description.parts:
        raise UserError(
            f"{checkpoint}: assigns actions by '{recipe.actions.assignment}', an ablation that only the trainer "
            "and evaluation read; only 'gumbel' has an export"
        )
    held = locate_parts(checkpoint, PARTS_BY_STAGE[recipe.stage])
    parts = tuple(part for part in PARTS_BY_STAGE[recipe.stage] if part in held)
    weights = MegatronWeights(recipe, checkpoint, parts)
    checked = CheckedWeights(weights, description.fingerprints, checkpoint)
    return OpenedModel(
        path=checkpoint,
        reader=seen_as_huggingface(checked, weight_rules(recipe.model, recipe.actions, parts)),
        model=recipe.model,
        actions=recipe.actions,
        parts=parts,
        source=OpenedCheckpoint(folder=checkpoint, description=description, recipe=recipe, weights=weights),
    )


def _open_huggingface(folder: Path) -> OpenedModel:
    file = folder / HF_CONFIG_FILE
    config = read_json_object(file, "download or export the model again")
    family = read_model_config(config, str(file))
    actions = read_action_config(config, str(file))
    source = open_safetensors(folder)
    parts = _parts_of(actions)
    found = family.model, actions or ActionConfig()
    _refuse_other_names(
        folder, source.facts, (names for r in weight_rules(*found, parts) for names in r.huggingface)
    )
    return OpenedModel(
        path=folder,
        reader=source,
        model=found[0],
        actions=found[1],
        parts=parts,
        source=source,
        notices=(*family.notices, *source.notices),
    )


def _parts_of(actions: ActionConfig | None) -> tuple[str, ...]:
    if actions is None:
        return ("base",)
    layers = {"idm": actions.num_idm_layers, "policy": actions.num_policy_layers}
    return tuple(part for part in EXPORTED_PARTS if layers.get(part, 1))


def _refuse_other_names(folder: Path, found: Mapping[str, object], expected: Iterable[str]) -> None:
    """Missing and unexpected tensors are errors: a checkpoint that half fits is another model's."""
    wanted = set(expected)
    problems = [
        f"{len(names)} {kind} tensor(s), first {min(names)}"
        for kind, names in (("missing", wanted - found.keys()), ("unexpected", found.keys() - wanted))
        if names
    ]
    if problems:
        raise UserError(f"{folder}: does not hold what its {HF_CONFIG_FILE} says: " + "; ".join(problems))
