"""A training run under injected faults: each must be recovered from without help, and cost nothing but time.

    python soak/run_soak.py [--long] [--faults N] [--seed S]     (make soak)

Trains a tiny stage `idm` on two ranks of this machine: once without interruption, then again under a plan of faults
drawn from the seed, started again after every exit by the same command. Processes are killed at any moment, also while
a checkpoint is written; ranks hang, signals come, gradients are NaN, checkpoint writers die or stand still, the disk
is full, files of the newest checkpoint are damaged or gone. There is no pointer to the newest checkpoint that could be
lost: the listing of checkpoints/ is the truth. Damaged training data must be refused; they alone are then restored by
hand. In the end weights, optimizer and metrics must be those of the uninterrupted run, to the last bit.

Prints a table, writes summary.json, and keeps logs and damaged checkpoints; exit code 1 if anything failed. Seconds
lost run from a fault to the first new step; faults that share a restart count it each. Full disks need root.
"""

import contextlib
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro
from rich.console import Console

from benchmarks.machine import describe_machine
from benchmarks.train_bench_setup import write_recipe
from data_prep.errors import UserError, run_cli
from data_prep.output_files import write_json_whole
from data_prep.progress import progress_bar
from pretrain import cpu_redirects
from pretrain.config import RunConfig
from pretrain.run_record.run_status import read_status, training_seconds
from soak import small_disk
from soak.faults import FaultName
from soak.orders import order_nan_gradients
from soak.outcomes import SoakResult
from soak.plan import SoakPlan, make_plan
from soak.report import faults_table, summary
from soak.run_process import RunProcess, last_step
from soak.soak_recipe import mark_as_started, prepare, soak_recipe
from soak.supervisor import Supervisor
from soak.watched_run import WatchedRun

PLAN_FILE = "plan.json"
SUMMARY_FILE = "summary.json"
LONG_FAULTS = 200
WORKER = "soak.worker"
REFERENCE, UNDER_FAULTS = "reference", "under_faults"
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """Train under injected faults, and see that nothing is lost."""

    folder: Path = Path("runs/soak")
    """Folder for everything that is written; an earlier soak in it is deleted."""
    faults: int = 25
    """How many."""
    long: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """200 faults instead (an hour and more)."""
    seed: int = 0
    """Of the plan."""
    ranks: int = 2
    """Processes of the run."""


def soak(config: SoakConfig) -> dict[str, object]:
    """All of it; what summary.json holds."""
    folder = config.folder.absolute()
    _clear(folder)
    with_disk = small_disk.can_mount(folder / "disk_trial")
    left_out: tuple[FaultName, ...] = () if with_disk else ("fill_disk",)
    plan = make_plan(LONG_FAULTS if config.long else config.faults, config.seed, config.ranks, left_out)
    write_json_whole(folder / PLAN_FILE, asdict(plan))
    result = carry_out(plan, folder, config.ranks, with_disk=with_disk)
    run_folders = {name: folder / name for name in (REFERENCE, UNDER_FAULTS)}
    return summary(result, len(plan.faults), left_out) | {
        "ettr": read_status(run_folders[UNDER_FAULTS]).effective_time_ratio,
        "ettr_uninterrupted": read_status(run_folders[REFERENCE]).effective_time_ratio,
        "training_share_of_wall_time": training_seconds(run_folders[UNDER_FAULTS]) / result.wall_seconds,
        "steps": plan.steps,
        "machine": describe_machine(),
        "seed": config.seed,
        "command": " ".join(["python", *sys.argv]),
    }


def carry_out(
    plan: SoakPlan, folder: Path, ranks: int, module: str = WORKER, with_disk: bool = False
) -> SoakResult:
    """Train without interruption, then under the faults of `plan`; compare.

    Args:
        plan: the faults.
        folder: where all of it goes.
        ranks: processes of the run.
        module: what each of them runs.
        with_disk: put the checkpoints on a small disk, which can be filled.
    """
    prepare(folder, plan.steps)
    reference, under_faults = (_make_run(folder, name, plan) for name in (REFERENCE, UNDER_FAULTS))
    run_uninterrupted(reference, ranks, module)
    disk = small_disk.small_disk(mark_as_started(under_faults)) if with_disk else contextlib.nullcontext()
    with disk, progress_bar("faults", len(plan.faults), unit="fault") as bar:

        def report(result: SoakResult) -> None:
            bar.set_postfix(starts=result.starts, recovered=result.recovered, refresh=False)
            bar.update(len(result.outcomes) - bar.n)

        run = WatchedRun(under_faults, _recipe_file(under_faults), ranks, module)
        result = Supervisor(run, report).carry_out(plan)
        result.differences = find_differences(reference, under_faults)
    return result


def run_uninterrupted(recipe: RunConfig, ranks: int, module: str) -> None:
    """Train the recipe in one go. Raises UserError if that fails."""
    log = recipe.run_folder.with_suffix(".log")
    process = RunProcess(_recipe_file(recipe), ranks, module, log)
    try:
        with progress_bar("uninterrupted run", recipe.training.steps, unit="step") as bar:
            while process.exit_code is None:
                if (done := last_step(recipe.run_folder)) > bar.n:
                    bar.update(done - bar.n)
                time.sleep(POLL_SECONDS)
    finally:
        process.end()
    if process.exit_code:
        raise UserError(f"the uninterrupted run ended with exit code {process.exit_code}; see {log}")


def find_differences(reference: RunConfig, under_faults: RunConfig) -> list[str]:
    """What is not bit-identical in the two runs."""
    cpu_redirects.apply()
    from soak.comparison import differences

    try:
        return differences(reference.run_folder, under_faults.run_folder)
    except UserError as error:  # no checkpoint, or none that can be read
        return [str(error)]


def _make_run(folder: Path, name: str, plan: SoakPlan) -> RunConfig:
    recipe = soak_recipe(folder, name, "idm", plan.steps)
    file = write_recipe(recipe, folder)
    order_nan_gradients(file, {fault.after_steps: fault.rank for fault in plan.nan_gradients})
    return recipe


def _recipe_file(recipe: RunConfig) -> Path:
    return recipe.run_folder.with_suffix(".yaml")


def _end(number: int, frame: FrameType | None) -> None:
    """By way of an exception, so that the run is ended and the small disk taken away."""
    sys.exit(128 + number)


def _clear(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / PLAN_FILE).exists():
        raise UserError(f"--folder {folder} holds something other than a soak; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def main() -> None:
    """Entry point."""
    config = tyro.cli(SoakConfig, description=__doc__)
    if min(config.faults, config.ranks) < 1:
        raise UserError("--faults and --ranks must be at least 1")
    signal.signal(signal.SIGTERM, _end)
    content = soak(config)
    write_json_whole(config.folder / SUMMARY_FILE, content)
    console = Console()
    console.print(faults_table(content))
    console.print(
        f"Effective training time: {content['ettr']:.1%} of the time since the first start "
        f"(uninterrupted: {content['ettr_uninterrupted']:.1%}), "
        f"{content['training_share_of_wall_time']:.1%} of all time, launchers included",
        highlight=False,
    )
    failures = content["failures"]
    assert isinstance(failures, list), "made by `summary`"
    for line in failures:
        console.print(f"failed: {line}", style="bold red", highlight=False)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
