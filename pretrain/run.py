"""Put a run together: check, prepare the run folder, build, load, and hand over to the loop."""

import shutil
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from data_prep.blended_data import BlendedData, open_blend
from data_prep.errors import UserError
from data_prep.output_files import PARTIAL_SUFFIX, write_text_whole
from pretrain import checkpointing
from pretrain.config import CONFIG_FILE, RunConfig
from pretrain.config_checks import find_problems
from pretrain.data import build_datasets, find_data_problems
from pretrain.flops import CONVENTION, flops_per_token
from pretrain.model.cola import ColaModel
from pretrain.optimization import build_optimizer, build_scheduler, wrap_for_data_parallel
from pretrain.parallel import ParallelContext, launched_rank, launched_world_size, parallel_context
from pretrain.recipes import dump_recipe, parse_recipe, recipe_from_fields
from pretrain.stages.registry import stage_class
from pretrain.train_loop import TrainLoop

PARTIAL_CONFIG_FILE = CONFIG_FILE + PARTIAL_SUFFIX  # what a run killed at its very start leaves behind
# What must not change between the start of a run and its resumption: it would be another run.
_FIXED_ON_RESUME = ("stage", "start_from", "seed", "model", "actions", "data.sequence_length",
                    "training.global_batch_size", "training.precision")  # fmt: skip


def check(config: RunConfig) -> BlendedData:
    """Everything that can be wrong before anything starts.

    Raises:
        UserError: listing every problem found.
    """
    problems = find_problems(config, launched_world_size())
    blend = None
    try:
        blend = open_blend(config.data.path)
        problems += find_data_problems(config, blend)
    except UserError as error:
        problems.append(f"data.path: {error}")
    if config.start_from is not None and config.stage != "base":
        try:
            problems += _start_problems(config, checkpointing.resolve_checkpoint(config.start_from), blend)
        except UserError as error:
            problems.append(f"start_from: {error}")
    if problems or blend is None:
        raise UserError(f"{len(problems)} problem(s) in this run: " + "; ".join(problems))
    return blend


def _start_problems(config: RunConfig, checkpoint: Path, blend: BlendedData | None) -> list[str]:
    """What keeps `checkpoint` from being the frozen start of `config`."""
    description = checkpointing.read_description(checkpoint)
    before = {"idm": "base", "policy": "idm"}[config.stage]
    if description.stage != before:
        return [
            f"start_from: {checkpoint} is of stage '{description.stage}', stage '{config.stage}' needs '{before}'"
        ]
    theirs = recipe_from_fields(description.recipe, str(checkpoint))
    ours_text, theirs_text = _flat(config), _flat(theirs)
    shared = [name for name in ours_text if name.startswith("model.") or name == "training.precision"]
    if config.stage == "policy":  # the policy must not change what the actions mean
        shared += [
            name for name in ours_text if name.startswith("actions.") and name != "actions.num_policy_layers"
        ]
    problems = [
        f"{name}: {ours_text[name]}, but {checkpoint} was trained with {theirs_text[name]}"
        for name in shared
        if ours_text[name] != theirs_text[name]
    ]
    if blend is not None and description.tokenizer_fingerprint != blend.tokenizer_fingerprint:
        problems.append(
            f"data.path: {blend.folder} was made with another tokenizer than the data of {checkpoint}; "
            "blend shards of the same tokenizer"
        )
    return problems


def _flat(config: RunConfig) -> dict[str, str]:
    """Every field as dotted name -> text."""
    flat: dict[str, str] = {}
    for name, value in vars(config).items():
        if hasattr(value, "__dataclass_fields__"):
            flat |= {f"{name}.{key}": str(inner) for key, inner in vars(value).items()}
        else:
            flat[name] = str(value)
    return flat


def dry_run(config: RunConfig) -> None:
    """Check the run and print what it would do, without starting it."""
    check(config)
    if launched_rank() != 0:
        return
    flops = flops_per_token(config)
    table = Table(title=f"{config.stage}: FLOPs a token ({CONVENTION})")
    table.add_column("module")
    table.add_column("MFLOP", justify="right")
    for name, value in [*flops.items(), ("total", sum(flops.values()))]:
        table.add_row(name, f"{value / 1e6:,.3f}")
    console = Console()
    console.print(dump_recipe(config), highlight=False)
    console.print(table)
    tokens = config.training.steps * config.tokens_per_step
    console.print(
        f"{config.training.steps:,} steps x {config.tokens_per_step:,} tokens = {tokens:,} tokens. Checked."
    )


def train(config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Run the recipe to its last step."""
    blend = check(config)
    prepare_run_folder(config, resume, overwrite)
    with parallel_context(config.parallel.tensor_parallel_size, config.seed) as context:
        # Only now that the process group stands: no rank still reads the folder's old state.
        if context.is_first_rank:
            _write_run_folder(config, overwrite)
        dist.barrier()
        checkpoints = checkpointing.find_checkpoints(config.run_folder) if resume else []
        newest = checkpoints[-1] if checkpoints else None
        first_step = checkpointing.read_description(newest).step if newest else 0
        if first_step >= config.training.steps:
            if context.is_first_rank:
                print(f"{config.run_folder}: already at step {first_step}; nothing to do")
            return
        build_loop(config, context, blend, newest, first_step).run(first_step)


def prepare_run_folder(config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that is in use, or that `--resume` would continue with another configuration."""
    saved = config.run_folder / CONFIG_FILE
    if not saved.exists():
        others = config.run_folder.glob("*") if config.run_folder.exists() else ()
        if any(path.name != PARTIAL_CONFIG_FILE for path in others):
            raise UserError(
                f"run_folder: {config.run_folder} holds other files and no {CONFIG_FILE}, so it is no run's; "
                "choose another folder"
            )
        return
    if not resume and not overwrite:
        raise UserError(f"run_folder: {config.run_folder} already holds a run; pass --resume or --overwrite")
    if resume:
        before, now = _flat(parse_recipe(saved.read_text(), str(saved))), _flat(config)
        changed = [
            f"{name}: {before.get(name)} -> {now[name]}"
            for name in now
            if before.get(name) != now[name] and name.startswith(_FIXED_ON_RESUME)
        ]
        if changed:
            raise UserError(
                f"--resume: {config.run_folder} was started with other settings ({'; '.join(changed)}); "
                "restore them or start a new run_folder"
            )


def _write_run_folder(config: RunConfig, overwrite: bool) -> None:
    if overwrite:
        shutil.rmtree(config.run_folder, ignore_errors=True)
    config.run_folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(config.run_folder / CONFIG_FILE, dump_recipe(config))


def build_loop(
    config: RunConfig, context: ParallelContext, blend: BlendedData, newest: Path | None, first_step: int
) -> TrainLoop:
    """Build the stage and load what it starts or resumes from. Collective."""
    origin = _find_origin(config, blend, newest)
    samples = build_datasets(config, blend)
    stage_type = stage_class(config)
    model = ColaModel(config, context.groups, (*stage_type.frozen_parts, *stage_type.trained_parts))
    model.to(context.device)
    model.freeze_all_but(stage_type.trained_parts)
    frozen_fingerprints = {}
    if origin.start is not None:
        frozen_fingerprints = checkpointing.load_checked(model, stage_type.frozen_parts, origin.start)
    if newest is not None:
        checkpointing.load_checked(model, stage_type.trained_parts, newest)
    ddp = wrap_for_data_parallel(model)
    optimizer = build_optimizer(config, ddp)
    if newest is not None:
        checkpointing.load_optimizer(model, optimizer, stage_type.trained_parts, newest)
    return TrainLoop(
        config,
        context,
        stage_type(config, context.data_parallel_mean),
        ddp,
        optimizer,
        build_scheduler(config, optimizer, first_step),
        samples,
        origin,
        frozen_fingerprints,
    )


def _find_origin(config: RunConfig, blend: BlendedData, newest: Path | None) -> checkpointing.RunOrigin:
    """What the run is made from: for a resumed one, what it was made from, even if newer checkpoints exist."""
    start = checkpointing.resolve_checkpoint(config.start_from) if config.start_from else None
    if newest is not None:
        description = checkpointing.read_description(newest)
        start = checkpointing.start_of(newest, description)
        if description.data_fingerprint != blend.plan_fingerprint:
            raise UserError(
                f"data.path: {blend.folder} holds other shards than those {newest} was trained on, so the run "
                "cannot go on in the same order; restore them or start a new run_folder"
            )
    return checkpointing.RunOrigin(
        start=start,
        tokenizer_fingerprint=blend.tokenizer_fingerprint,
        data_fingerprint=blend.plan_fingerprint,
    )
