"""Checks of the evaluation commands: nothing is overwritten unasked, all problems are told at once."""

from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import UserError


def output_problems(output: Path, overwrite: bool) -> list[str]:
    """What keeps the file `output` from being written, in words for the user."""
    if output.is_dir():
        return [f"--output {output}: is a folder; name a file in it"]
    if output.exists() and not overwrite:
        return [f"--output {output}: exists already; add --overwrite to replace it"]
    if not output.parent.is_dir():
        return [f"--output {output}: its folder does not exist; make it first"]
    return []


def raise_problems(problems: Sequence[str]) -> None:
    """One `UserError` for all problems, if there are any."""
    if problems:
        raise UserError("; ".join(problems))
