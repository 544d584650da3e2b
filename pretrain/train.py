"""Train one stage of CoLA from a recipe.

    python -m pretrain.launch --ranks-per-node 2 configs/demo_idm.yaml [--section.field value ...]
             [--resume | --overwrite] [--dry-run [--gpus N]]

`pretrain.launch` starts this module on every rank; `python -m pretrain.train` with the same arguments trains on one, in
this process. Every field of the recipe can be overridden (`--help` after the recipe lists them with their meaning).
Writes into the recipe's run_folder: config.yaml, environment.json, metrics.jsonl, history.jsonl, checkpoints/.

`--resume` continues from the newest checkpoint that is whole (and starts if none was ever saved), `--overwrite`
deletes what is there but its logs, `--dry-run` prints the plan of the run on N ranks (parameters, FLOPs, memory,
layout, time on named GPUs), checks everything and stops. SIGTERM or SIGUSR1 to any rank ends the run after the current
step, saved, with exit code 75; all exit codes are in docs/operations.md.
"""

import sys
import warnings

from data_prep.errors import run_cli
from pretrain import cpu_redirects
from pretrain.train_arguments import TrainArguments, parse_train_arguments


def main() -> None:
    """Parse, check everything, then train."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__)
        return
    start(parse_train_arguments(sys.argv[1:]))


def start(arguments: TrainArguments) -> None:
    """Check the recipe, then train it or, with --dry-run, print it."""
    cpu_redirects.apply()  # before the imports below, which load Megatron
    # Megatron calls functions that torch has renamed; that is not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from pretrain.recipes import load_recipe
    from pretrain.run import dry_run, train

    config = load_recipe(arguments.recipe, list(arguments.overrides))
    if arguments.dry_run:
        dry_run(config, arguments.gpus)
    else:
        train(config, resume=arguments.resume, overwrite=arguments.overwrite)


if __name__ == "__main__":
    run_cli(main)
