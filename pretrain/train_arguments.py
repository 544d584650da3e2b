"""The command line of training, taken apart: recipe, overrides of its fields, what to do. Nothing here loads torch."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError

USAGE = (
    "usage: pretrain.train RECIPE.yaml [--section.field value ...] [--resume | --overwrite]"
    " [--dry-run [--gpus N]]"
)
MODES = ("--resume", "--overwrite", "--dry-run")


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What was asked for."""

    recipe: Path
    """The recipe's file."""
    overrides: tuple[str, ...]
    """Fields of it and their values, e.g. ("--training.steps", "100")."""
    resume: bool
    """Go on from the newest checkpoint, where there is one."""
    overwrite: bool
    """Delete the run that is there."""
    dry_run: bool
    """Print the plan, check everything, and stop."""
    gpus: int | None
    """Ranks to plan for; None: those that are there."""


def parse_train_arguments(arguments: list[str]) -> TrainArguments:
    """Take `arguments` (without the program's name) apart.

    Raises:
        UserError: if there is no recipe, or if modes exclude each other. Overrides are not looked at here.
    """
    modes = {argument for argument in arguments if argument in MODES}
    rest = [argument for argument in arguments if argument not in MODES]
    gpus = _take_gpus(rest) if "--dry-run" in modes else None
    if not rest or rest[0].startswith("-"):
        raise UserError(USAGE)
    if {"--resume", "--overwrite"} <= modes:
        raise UserError("--resume and --overwrite exclude each other")
    return TrainArguments(
        recipe=Path(rest[0]),
        overrides=tuple(rest[1:]),
        resume="--resume" in modes,
        overwrite="--overwrite" in modes,
        dry_run="--dry-run" in modes,
        gpus=gpus,
    )


def _take_gpus(arguments: list[str]) -> int | None:
    """Remove `--gpus N` from `arguments`; N, or None if it is not there."""
    if "--gpus" not in arguments:
        return None
    place = arguments.index("--gpus")
    value = arguments[place + 1] if place + 1 < len(arguments) else ""
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"--gpus: needs a number of ranks to plan for, got '{value}'")
    del arguments[place : place + 2]
    return int(value)
