"""Train one stage of CoLA from a recipe.

    torchrun --nproc-per-node 2 -m pretrain.train configs/demo_idm.yaml [--section.field value ...]
             [--resume | --overwrite] [--dry-run [--gpus N]]

Every field of the recipe can be overridden (`--help` after the recipe lists them with their meaning). Writes into the
recipe's run_folder: config.yaml, metrics.jsonl, checkpoints/. `--resume` continues from the newest checkpoint (and
starts if there is none), `--overwrite` deletes what is there, `--dry-run` prints the
plan of the run on N ranks (parameters, FLOPs, memory, layout, time on named GPUs), checks everything and stops.
"""

import os
import sys
import time
import warnings
from pathlib import Path

from data_prep.errors import USER_ERROR_EXIT_CODE, UserError, run_cli
from pretrain import cpu_redirects

USAGE = (
    "usage: pretrain.train RECIPE.yaml [--section.field value ...] [--resume | --overwrite]"
    " [--dry-run [--gpus N]]"
)
MODES = ("--resume", "--overwrite", "--dry-run")


def main() -> None:
    """Parse, check everything, then train."""
    arguments = sys.argv[1:]
    modes = {argument for argument in arguments if argument in MODES}
    arguments = [argument for argument in arguments if argument not in MODES]
    gpus = take_gpus(arguments) if "--dry-run" in modes else None
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    if not arguments or arguments[0].startswith("-"):
        raise UserError(USAGE)
    if {"--resume", "--overwrite"} <= modes:
        raise UserError("--resume and --overwrite exclude each other")
    try:
        start(Path(arguments[0]), arguments[1:], modes, gpus)
    except UserError:
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:  # every rank fails alike: let the first one say it
            time.sleep(2)
            sys.exit(USER_ERROR_EXIT_CODE)
        raise


def take_gpus(arguments: list[str]) -> int | None:
    """Remove `--gpus N` from `arguments`; N, or None if it is not there."""
    if "--gpus" not in arguments:
        return None
    place = arguments.index("--gpus")
    value = arguments[place + 1] if place + 1 < len(arguments) else ""
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"--gpus: needs a number of ranks to plan for, got '{value}'")
    del arguments[place : place + 2]
    return int(value)


def start(recipe: Path, overrides: list[str], modes: set[str], gpus: int | None) -> None:
    """Check the recipe, then train it or, with --dry-run, print it."""
    cpu_redirects.apply()  # before the imports below, which load Megatron
    # Megatron calls functions that torch has renamed; that is not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from pretrain.recipes import load_recipe
    from pretrain.run import dry_run, train

    config = load_recipe(recipe, overrides)
    if "--dry-run" in modes:
        dry_run(config, gpus)
    else:
        train(config, resume="--resume" in modes, overwrite="--overwrite" in modes)


if __name__ == "__main__":
    run_cli(main)
