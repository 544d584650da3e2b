"""Start the ranks of a training run on this machine, or on this node of several.

    python -m pretrain.launch [--ranks-per-node P] RECIPE.yaml [--section.field value ...] [--resume | --overwrite]
    python -m pretrain.launch --nodes N --node-rank R --master HOST:PORT [--ranks-per-node P] RECIPE.yaml ...

What follows the launcher's own options goes to `pretrain.train` on every rank (its --help: after a recipe). Each rank's
output goes to logs/<job>/rank_00000.log in the run folder; that of the first is shown here too. <job> is Slurm's job
and restart number, else the time of the start.

SIGTERM, SIGUSR1 and Ctrl-C are passed on to the ranks, which save and end with 75; the launcher waits for as long as
that takes (a second Ctrl-C ends at once). The exit code is the ranks' own, the most telling one: 2 to 7 and 75 as in
data_prep/errors.py, 128 + N where a rank was killed by signal N. Started again with --resume, a run goes on.
"""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

from data_prep.errors import UserError, run_cli
from pretrain.config_checks import find_problems, refuse
from pretrain.launching.launch_options import NodeLayout, parse_options
from pretrain.launching.rank_exits import describe_end, most_telling
from pretrain.launching.stop_signals import StopSignals
from pretrain.recipes import load_recipe
from pretrain.run_record.run_logs import job_folder, job_name, rank_log, record_launch, shown
from pretrain.train_arguments import parse_train_arguments

TRAIN_MODULE = "pretrain.train"
RANK_MODULE = "pretrain.launching.rank_process"
KILLED_EXIT_CODE = 130  # what a shell reports for a command ended by Ctrl-C


def launch(arguments: list[str], module: str = TRAIN_MODULE) -> int:
    """Check the recipe, start the ranks, wait for them.

    Args:
        arguments: the launcher's own options, the recipe, and what else `module` takes.
        module: what each rank runs.

    Returns:
        The exit code.

    Raises:
        UserError: if the arguments or the recipe are wrong; nothing was started.
    """
    layout, for_training = parse_options(arguments, __doc__)
    training = parse_train_arguments(for_training)
    config = load_recipe(training.recipe, list(training.overrides))
    ranks = layout.nodes * layout.ranks_per_node
    if training.dry_run:
        plan_for = [] if training.gpus else ["--gpus", str(ranks)]
        return subprocess.call([sys.executable, "-m", module, *for_training, *plan_for])
    refuse(find_problems(config, ranks))
    return _run(layout, job_folder(config.run_folder, job_name()), [module, *for_training])


def _run(layout: NodeLayout, logs: Path, module_command: list[str]) -> int:
    """Start, wait, and note both where the logs are."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_folder: cannot write logs to {logs}: {error.strerror}") from None
    first_node = layout.node_rank == 0
    if first_node:
        ranks = layout.nodes * layout.ranks_per_node
        record_launch(logs, "launch", ranks=ranks, host=socket.gethostname(), pid=os.getpid())
    code, reason = _start_and_wait(layout, logs, module_command)
    if first_node:
        record_launch(logs, "exit", exit_code=code, reason=reason)
    return code


def _start_and_wait(layout: NodeLayout, logs: Path, module_command: list[str]) -> tuple[int, str]:
    """Exit code, and how it came to it."""
    rank_process = ("-m", RANK_MODULE, str(os.getpid()), str(logs), *module_command)
    with (
        StopSignals(RANK_MODULE) as signals,
        shown(rank_log(logs, 0)) if layout.node_rank == 0 else contextlib.nullcontext(),
    ):
        from pretrain.launching.elastic_ranks import run_ranks  # loads torch

        try:
            python_arguments = ["-u", "-X", "faulthandler", *rank_process]
            return_codes = run_ranks(layout, logs.name, python_arguments, signals.ranks_start)
        except ConnectionError as error:
            reason = f"the nodes did not meet at --master {layout.master}: {error}"
            print(f"error: {reason}", file=sys.stderr)
            return 1, reason
    if not return_codes:
        return 0, "done"
    if signals.killed:
        return KILLED_EXIT_CODE, "ended at once, by a second Ctrl-C"
    end = most_telling(return_codes, signals.stop_requested)
    where = f"{socket.gethostname()}: {describe_end(end)}"
    print(f"{where}, exit code {end.exit_code}; its log: {rank_log(logs, end.rank)}", file=sys.stderr)
    return end.exit_code, describe_end(end)


def main() -> None:
    """Command line."""
    sys.exit(launch(sys.argv[1:]))


if __name__ == "__main__":
    run_cli(main)
