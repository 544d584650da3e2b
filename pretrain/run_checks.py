"""Everything that can be wrong with a run: its recipe, this machine, its data, and what it starts from, all at once."""

from pathlib import Path

from data_prep.blended_data import BlendedData, open_blend
from data_prep.errors import UserError
from pretrain.backends import find_backend_problems, find_backends
from pretrain.checkpoints import checkpoint_folder
from pretrain.checkpoints.resume import newest_described
from pretrain.config import RunConfig
from pretrain.config_checks import find_problems, refuse
from pretrain.data import find_data_problems
from pretrain.parallel import launched_world_size
from pretrain.plan import find_plan_problems
from pretrain.recipes import recipe_from_fields
from pretrain.stages.registry import stage_class


def check(config: RunConfig, resume: bool = False) -> BlendedData:
    """Everything that can be wrong before anything starts, or before the run goes on from its newest checkpoint.

    Raises:
        UserError: listing every problem found.
    """
    ranks = launched_world_size()
    problems = find_problems(config, ranks)
    problems += find_device_problems(config, ranks, fits=not problems)
    resumed = newest_described(config.run_folder) if resume else None
    input_problems, blend = find_input_problems(config, resumed)
    refuse(problems + input_problems)
    assert blend is not None, "problem-free inputs include a blend"
    return blend


def find_device_problems(config: RunConfig, ranks: int, fits: bool) -> list[str]:
    """What this machine lacks: precision, libraries and, for a recipe that is right in itself (`fits`), memory."""
    backends = find_backends()
    problems = find_backend_problems(config, backends)
    if fits and backends.device_memory_gib is not None:
        problems += find_plan_problems(config, ranks, backends.device_memory_gib, backends.device_name)
    return problems


def find_input_problems(
    config: RunConfig, resumed: Path | None = None
) -> tuple[list[str], BlendedData | None]:
    """What is wrong with the data and the checkpoints that the run reads; and the data, if they can be opened.

    A run that goes on from its checkpoint `resumed` reads no other, but for the frozen parts that are not in it.
    """
    problems, blend = [], None
    try:
        blend = open_blend(config.data.path)
        problems += find_data_problems(config, blend)
    except UserError as error:
        problems.append(f"data.path: {error}")
    stage = stage_class(config)
    sources = {"init_from": (config.init_from if resumed is None else None, stage.trained_parts)}
    if config.stage != "base":
        sources["start_from"] = (resumed or config.start_from, stage.frozen_parts)
    for name, (path, parts) in sources.items():
        if path is not None:
            try:
                checkpoint = checkpoint_folder.resolve_checkpoint(path)
                problems += _checkpoint_problems(config, name, checkpoint, parts, blend)
            except UserError as error:
                problems.append(f"{name}: {error}")
    if resumed is not None and not config.checkpoint.self_contained:
        problems += _lost_start_problems(resumed, stage.frozen_parts)
    return problems, blend


def _lost_start_problems(resumed: Path, frozen_parts: tuple[str, ...]) -> list[str]:
    """What keeps checkpoints to come from being without frozen parts: that those are in `resumed` and nowhere else."""
    description = checkpoint_folder.read_description(resumed)
    start = checkpoint_folder.start_of(resumed, description)
    if start is None or not set(frozen_parts) <= set(description.parts):
        return []
    try:
        checkpoint_folder.locate_parts(start, frozen_parts)
    except UserError as error:
        return [
            f"checkpoint.self_contained: leave it on, for only {resumed} still has the frozen parts ({error})"
        ]
    return []


def missing_inputs(config: RunConfig) -> list[str]:
    """Folders that the recipe reads and that do not exist (yet)."""
    paths = {"data.path": config.data.path, "start_from": config.start_from, "init_from": config.init_from}
    return [f"{name}: {path}" for name, path in paths.items() if path is not None and not path.exists()]


def _checkpoint_problems(
    config: RunConfig, name: str, checkpoint: Path, parts: tuple[str, ...], blend: BlendedData | None
) -> list[str]:
    """What keeps `checkpoint` from giving `parts` to the run."""
    description = checkpoint_folder.read_description(checkpoint)
    held = checkpoint_folder.locate_parts(checkpoint)
    lacking = [part for part in parts if part not in held]
    if lacking:
        before = {"base": "base", "idm": "base", "policy": "idm"}[config.stage]
        wanted = config.stage if name == "init_from" else before
        return [
            f"{name}: {checkpoint} is of stage '{description.stage}', stage '{config.stage}' needs '{wanted}': "
            f"it has no {', '.join(lacking)}"
        ]
    theirs = recipe_from_fields(description.recipe, str(checkpoint))
    ours_text, theirs_text = flat_fields(config), flat_fields(theirs)
    shared = [field for field in ours_text if field.startswith("model.") or field == "training.precision"]
    if set(parts) & {"idm", "policy"}:  # the policy must not change what the actions mean
        shared += [
            field
            for field in ours_text
            if field.startswith("actions.") and (field != "actions.num_policy_layers" or "policy" in parts)
        ]
    problems = [
        f"{field}: {ours_text[field]}, but {checkpoint} was trained with {theirs_text[field]}"
        for field in shared
        if ours_text[field] != theirs_text[field]
    ]
    if blend is not None and description.tokenizer_fingerprint != blend.tokenizer_fingerprint:
        problems.append(
            f"data.path: {blend.folder} was made with another tokenizer than the data of {checkpoint}; "
            "blend shards of the same tokenizer"
        )
    return problems


def flat_fields(config: RunConfig) -> dict[str, str]:
    """Every field as dotted name -> text."""
    flat: dict[str, str] = {}
    for name, value in vars(config).items():
        if hasattr(value, "__dataclass_fields__"):
            flat |= {f"{name}.{key}": str(inner) for key, inner in vars(value).items()}
        else:
            flat[name] = str(value)
    return flat
