"""Put a run together: check, prepare the run folder, build, load, and hand over to the loop."""

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from data_prep.blended_data import BlendedData
from data_prep.errors import TrainingError, UserError
from data_prep.output_files import PARTIAL_SUFFIX, write_text_whole
from pretrain.checkpoints import checkpointing
from pretrain.checkpoints.checkpoint_folder import read_description, resolve_checkpoint, start_of
from pretrain.checkpoints.checkpoint_saving import RunOrigin
from pretrain.checkpoints.resume import newest_whole
from pretrain.config import CONFIG_FILE, LOGS_FOLDER, METRICS_FILE, RunConfig
from pretrain.config_checks import find_problems, refuse
from pretrain.cpu_redirects import use_deterministic_kernels
from pretrain.data import build_datasets
from pretrain.faults.bad_steps import RollBackError
from pretrain.faults.hang_watch import HangWatch
from pretrain.metrics import last_logged_step
from pretrain.model.cola import ColaModel
from pretrain.optimization import build_optimizer, build_scheduler, wrap_for_data_parallel
from pretrain.parallel import ParallelContext, launched_rank, launched_world_size, parallel_context
from pretrain.plan import print_plan
from pretrain.recipes import dump_recipe, parse_recipe
from pretrain.run_checks import check, find_input_problems, flat_fields, missing_inputs
from pretrain.run_record.environment import git_revision, write_environment
from pretrain.run_record.history import History
from pretrain.run_record.run_logs import job_name
from pretrain.run_record.start_up import StartUp
from pretrain.stages.registry import stage_class
from pretrain.train_loop import BEGINNING, Position, TrainLoop

PARTIAL_CONFIG_FILE = CONFIG_FILE + PARTIAL_SUFFIX  # what a run killed at its very start leaves behind
# What must not change between the start of a run and its resumption: it would be another run.
_FIXED_ON_RESUME = ("stage", "start_from", "seed", "model", "actions", "data.sequence_length",
                    "training.global_batch_size", "training.precision",
                    "training.fp8", "training.base_fp8")  # fmt: skip


def dry_run(config: RunConfig, gpus: int | None) -> None:
    """Print the plan of the run on `gpus` ranks, then check what it reads; without starting it.

    Inputs that do not exist yet are named and allowed, since a plan is wanted before there are any.

    Raises:
        UserError: listing every problem of the recipe, or else of the inputs that do exist.
    """
    parallel = config.parallel
    ranks = gpus or max(
        launched_world_size(), parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    )
    refuse(find_problems(config, ranks))
    if launched_rank() != 0:
        return
    console = Console()
    console.print(dump_recipe(config), highlight=False)
    print_plan(config, ranks, console)
    missing = missing_inputs(config)
    problems = find_input_problems(config)[0]
    refuse(
        [problem for problem in problems if problem.split(":")[0] not in {m.split(":")[0] for m in missing}]
    )
    for line in missing:
        console.print(f"not there yet: {line}", highlight=False)
    console.print("Checked, but for the inputs that are not there yet." if missing else "Checked.")


def train(config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Run the recipe to its last step.

    Raises (as `TrainLoop.run` does, and before it):
        UserError: listing what is wrong.
        IntegrityError: checkpoints were saved, and none is whole any more.
    """
    started = StartUp()
    blend = check(config, resume)
    prepare_run_folder(config, resume, overwrite)
    if config.training.deterministic:
        use_deterministic_kernels()
    started.passed("import_seconds")
    parallel = config.parallel
    with parallel_context(
        parallel.tensor_parallel_size, config.seed, parallel.pipeline_parallel_size
    ) as context:
        # Only now that the process group stands: no rank still reads the folder's old state.
        if context.is_first_rank:
            _write_run_folder(config, overwrite)
        dist.barrier()
        started.passed("groups_seconds")
        history = History(config.run_folder, active=context.is_first_rank)
        try:
            with HangWatch(config.faults.hang_seconds) as watch:
                _train_to_the_end(config, context, blend, resume, history, watch, started)
        except BaseException as error:
            code = error.exit_code if isinstance(error, UserError) else 1
            history.record("end", exit_code=code, reason=" ".join(str(error).split()) or type(error).__name__)
            raise


def _train_to_the_end(
    config: RunConfig,
    context: ParallelContext,
    blend: BlendedData,
    resume: bool,
    history: History,
    watch: HangWatch,
    started: StartUp,
) -> None:
    """Train from where the run stands, and again from its last checkpoint whenever a bad step is rolled back."""
    newest = newest_whole(config.run_folder, context, history) if resume else None
    begin = _position(newest)
    if begin.step >= config.training.steps:
        if context.is_first_rank:
            print(f"{config.run_folder}: already at step {begin.step}; nothing to do")
        return
    if context.is_first_rank:  # the others need not read the metrics, nor ask git
        history.record(
            "start",
            from_step=begin.step,
            lost_steps=max(0, last_logged_step(config.run_folder / METRICS_FILE) - begin.step),
            ranks=context.world_size,
            job=job_name(),
            revision=git_revision(),
        )
    roll_backs = 0
    while True:
        loop = build_loop(config, context, blend, newest, history, watch, begin)
        started.passed("load_seconds")
        try:
            loop.run(lambda: history.record("training", **started.after_first_step()))
            history.record("end", step=config.training.steps, exit_code=0, reason="done")
            return
        except RollBackError as error:
            watch.begin_anew()
            newest_before, newest = newest, newest_whole(config.run_folder, context, history)
            roll_backs = roll_backs + 1 if newest == newest_before else 1
            begin = _roll_back(config, error, newest, roll_backs, context, history)
        del loop
        gc.collect()  # before the next one, which needs its memory


def _position(checkpoint: Path | None) -> Position:
    """Where `checkpoint` stands; the very beginning if there is none."""
    if checkpoint is None:
        return BEGINNING
    description = read_description(checkpoint)
    return Position(step=description.step, next_sample=description.consumed_samples, loop=description.loop)


def _roll_back(
    config: RunConfig,
    bad_step: RollBackError,
    newest: Path | None,
    roll_backs: int,
    context: ParallelContext,
    history: History,
) -> Position:
    """Where to go on after a bad step: at the state of `newest`, but in the data after that step.

    Raises:
        TrainingError: after too many without a new checkpoint in between.
    """
    begin = replace(_position(newest), next_sample=bad_step.next_sample)
    history.record("bad_step", step=bad_step.step, reason=str(bad_step), action="rolled_back")
    if roll_backs > config.faults.max_bad_steps:
        raise TrainingError(
            f"{bad_step}; it is roll-back {roll_backs} without a new checkpoint, faults.max_bad_steps allows "
            f"{config.faults.max_bad_steps}"
        )
    history.record("rolled_back", step=bad_step.step, to_step=begin.step)
    if context.is_first_rank:
        print(f"{bad_step}; back to step {begin.step}, and on with other data", flush=True)
    return begin


def prepare_run_folder(config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that is in use, or that `--resume` would continue with another configuration."""
    saved = config.run_folder / CONFIG_FILE
    if not saved.exists():
        others = config.run_folder.glob("*") if config.run_folder.exists() else ()
        if any(path.name not in (PARTIAL_CONFIG_FILE, LOGS_FOLDER) for path in others):
            raise UserError(
                f"run_folder: {config.run_folder} holds other files and no {CONFIG_FILE}, so it is no run's; "
                "choose another folder"
            )
        return
    if not resume and not overwrite:
        raise UserError(f"run_folder: {config.run_folder} already holds a run; pass --resume or --overwrite")
    if resume:
        before, now = flat_fields(parse_recipe(saved.read_text(), str(saved))), flat_fields(config)
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
        for path in config.run_folder.glob("*"):
            if path.name == LOGS_FOLDER:  # this start already writes there
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    config.run_folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(config.run_folder / CONFIG_FILE, dump_recipe(config))
    write_environment(config.run_folder)


def build_loop(
    config: RunConfig,
    context: ParallelContext,
    blend: BlendedData,
    newest: Path | None,
    history: History,
    watch: HangWatch,
    begin: Position = BEGINNING,
) -> TrainLoop:
    """Build the stage and load what it starts or resumes from. Collective."""
    origin = _find_origin(config, blend, newest)
    samples = build_datasets(config, blend)
    stage_type = stage_class(config)
    model = ColaModel(config, context.groups, (*stage_type.frozen_parts, *stage_type.trained_parts))
    model.freeze_all_but(stage_type.trained_parts)
    frozen = checkpointing.FrozenFingerprints(saved={}, held={})
    frozen_from = newest or origin.start  # a resumed run's own checkpoint knows where they are, or has them
    if frozen_from is not None:
        frozen = checkpointing.load_frozen(model, stage_type.frozen_parts, frozen_from)
    weights = newest or (resolve_checkpoint(config.init_from) if config.init_from else None)
    if weights is not None:
        checkpointing.load_checked(model, stage_type.trained_parts, weights, scales=newest is not None)
    ddp = wrap_for_data_parallel(model, context)
    optimizer = build_optimizer(config, ddp)
    if newest is not None:
        checkpointing.load_optimizer(model, optimizer, stage_type.trained_parts, newest)
    return TrainLoop(
        config,
        context,
        stage_type(config, context.data_parallel_mean),
        ddp,
        optimizer,
        build_scheduler(config, optimizer, begin.step),
        samples,
        origin,
        frozen,
        history,
        watch,
        begin,
    )


def _find_origin(config: RunConfig, blend: BlendedData, newest: Path | None) -> RunOrigin:
    """What the run is made from: for a resumed one, what it was made from, even if newer checkpoints exist."""
    if newest is None:
        start = resolve_checkpoint(config.start_from) if config.start_from else None
    else:
        description = read_description(newest)
        start = start_of(newest, description)
        if description.data_fingerprint != blend.plan_fingerprint:
            raise UserError(
                f"data.path: {blend.folder} holds other shards than those {newest} was trained on, so the run "
                "cannot go on in the same order; restore them or start a new run_folder"
            )
    return RunOrigin(
        start=start,
        tokenizer_fingerprint=blend.tokenizer_fingerprint,
        data_fingerprint=blend.plan_fingerprint,
    )
