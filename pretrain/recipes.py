"""Recipes: a YAML file in configs/, overridden on the command line, as one checked `RunConfig`.

pydantic checks the file (it reports every wrong, missing and unknown key at once), tyro makes the command line
and its help from the same dataclasses.
"""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

import tyro
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_prep.errors import UserError
from pretrain.config import RunConfig

# Unknown keys anywhere in a recipe are errors: a misspelt field must not be a silent default.
_STRICT = ConfigDict(extra="forbid")
# On a terminal tyro's complaints come in colours and in a frame.
_TERMINAL_DECORATION = re.compile(r"\x1b\[[0-9;]*m|[\u2500-\u257f]")


def _strict_adapter() -> TypeAdapter[RunConfig]:
    for part in [
        RunConfig,
        *(f.type for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.type)),
    ]:
        part.__pydantic_config__ = _STRICT  # type: ignore[union-attr]
    return TypeAdapter(RunConfig)


def parse_recipe(text: str, source: str) -> RunConfig:
    """The recipe in the YAML `text`; `source` names it in errors.

    Raises:
        UserError: if it is not YAML, or as `recipe_from_fields`.
    """
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    return recipe_from_fields(fields, source)


def recipe_from_fields(fields: object, source: str) -> RunConfig:
    """The recipe with the given nested `fields`; `source` names it in errors.

    Raises:
        UserError: listing every key that is unknown, missing or of the wrong type.
    """
    try:
        return _strict_adapter().validate_python(fields)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()]
        raise UserError(f"{source}: {len(problems)} problem(s): " + "; ".join(problems)) from None


def load_recipe(path: Path, overrides: list[str]) -> RunConfig:
    """Read the recipe at `path` and apply `overrides` such as ["--training.steps", "100"].

    Raises:
        UserError: if the file is missing or any of its keys or overrides is wrong.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such recipe; see the YAML files in configs/")
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; recipes are YAML, see configs/") from None
    recipe = parse_recipe(text, str(path))
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            return tyro.cli(RunConfig, default=recipe, args=overrides, prog=f"pretrain.train {path}")
    except SystemExit as exit_request:
        if not exit_request.code:  # --help was asked for and printed
            raise
        words = _TERMINAL_DECORATION.sub(" ", complaints.getvalue()).split()
        raise UserError(f"command line: {' '.join(words)}") from None


def recipe_fields(config: RunConfig) -> dict[str, object]:
    """`config` as nested plain values (JSON types); `recipe_from_fields` reads them back to an equal object."""
    return _strict_adapter().dump_python(config, mode="json")


def dump_recipe(config: RunConfig) -> str:
    """`config` as YAML; `parse_recipe` reads it back to an equal object."""
    return yaml.safe_dump(recipe_fields(config), sort_keys=False)
