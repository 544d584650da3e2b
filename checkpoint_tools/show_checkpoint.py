"""Show what is in a checkpoint, a run or a Hugging Face folder.

    python checkpoint_tools/show_checkpoint.py runs/demo/policy
    python checkpoint_tools/show_checkpoint.py runs/demo/policy/checkpoints/step_00000500 --values
    python checkpoint_tools/show_checkpoint.py Llama-3.1-8B --json --no-tensors

Where it comes from, its sizes, which parts lie where, and all tensors under the names that they have there. With
--values each tensor is read, and shown with its norm, its smallest and largest element, the number of elements that are
not finite, and a hash: the fingerprint, which is the same number for the same tensor in either format. That of a
checkpoint's tensor is held against the recorded one; a tensor that is not what was saved is DAMAGED and makes the
command fail. Memory holds one tensor.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from checkpoint_tools.formats.contents import Shown, ShownTensor, TensorValues, show, totals
from data_prep.errors import IntegrityError, run_cli
from pretrain.cpu_redirects import prepare_conversion

FILE_WIDTH = 200
LAYER_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Show what is in a checkpoint, a run or a Hugging Face folder."""

    path: Annotated[Path, tyro.conf.Positional]
    """Run folder (its newest checkpoint is shown), checkpoints/step_* folder, or Hugging Face folder."""
    json: bool = False
    """Print one JSON object instead of tables."""
    tensors: bool = True
    """List the tensors."""
    values: bool = False
    """Read the tensors, and show and check what is in them."""


def as_json(shown: Shown, *, tensors: bool) -> dict[str, object]:
    """`shown` as one JSON object; the list of tensors only if asked for."""
    content = {
        **shown.head,
        "parts": {
            part: {"place": place, **totals(t for t in shown.tensors if t.part == part)}
            for part, place in shown.places.items()
        },
        "total": totals(shown.tensors),
    }
    if tensors:
        content["tensors"] = [_flat(tensor) for tensor in shown.tensors]
    return content


def _flat(tensor: ShownTensor) -> dict[str, object]:
    fields = asdict(tensor)
    return fields | (fields.pop("values") or {})


def fold_layers(tensors: Sequence[ShownTensor]) -> list[ShownTensor]:
    """Tensors that differ only in their layer as one, of all their parameters, named like layers.0-31.mlp.weight."""
    groups: dict[tuple[object, ...], list[ShownTensor]] = {}
    for tensor in tensors:
        key = (tensor.part, LAYER_NUMBER.sub("*", tensor.name), tensor.shape, tensor.dtype)
        groups.setdefault(key, []).append(tensor)
    return [_folded(group) if len(group) > 1 else group[0] for group in groups.values()]


def _folded(group: Sequence[ShownTensor]) -> ShownTensor:
    numbers = [int(match.group()) for t in group if (match := LAYER_NUMBER.search(t.name))]
    name = LAYER_NUMBER.sub(_ranges(numbers), group[0].name)
    sums = totals(group)
    return replace(group[0], name=name, parameters=sums["parameters"], bytes=sums["bytes"])


def _ranges(numbers: Sequence[int]) -> str:
    """Such as 0-3,7 of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def tables(shown: Shown, *, tensors: bool, values: bool) -> Iterator[Table]:
    """The head, the parts, and the tensors: a row each with `values`, else a row for all layers."""
    head = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    for name, value in shown.head.items():
        if value not in ([], {}, ""):
            head.add_row(name.replace("_", " "), _text(value))
    yield head
    yield _parts_table(shown)
    if tensors:
        yield _tensors_table(shown.tensors if values else fold_layers(shown.tensors), values)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return "\n".join(map(str, value)) if isinstance(value[0], str) else ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _parts_table(shown: Shown) -> Table:
    table = _table(
        ("part", "tensors", "parameters", "bytes", "place"), numbers=("tensors", "parameters", "bytes")
    )
    for part, place in shown.places.items():
        sums = totals(t for t in shown.tensors if t.part == part)
        table.add_row(part, *(f"{count:,}" for count in sums.values()), place)
    table.add_section()
    table.add_row("in all", *(f"{count:,}" for count in totals(shown.tensors).values()))
    return table


def _tensors_table(tensors: Sequence[ShownTensor], values: bool) -> Table:
    of_values = ("norm", "min", "max", "not finite", "hash", "") if values else ()
    columns = ("tensor", "shape", "dtype", "parameters", *of_values)
    table = _table(columns, numbers=("parameters", "norm", "min", "max", "not finite"))
    for position, tensor in enumerate(tensors):
        if position and tensor.part != tensors[position - 1].part:
            table.add_section()
        shape = " x ".join(map(str, tensor.shape))
        cells = [tensor.name, shape, tensor.dtype, f"{tensor.parameters:,}"]
        table.add_row(*cells, *(_value_cells(tensor.values) if tensor.values else ()))
    return table


def _value_cells(values: TensorValues) -> Iterator[str]:
    for number in (values.norm, values.min, values.max):
        yield "-" if number is None else f"{number:.4g}"
    yield "-" if values.non_finite is None else f"{values.non_finite:,}"
    yield values.hash or "-"
    yield values.check or ""


def _table(columns: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: Literal["right", "left"] = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column not in ("tensor", "place"))
    return table


def main() -> None:
    """Command line."""
    prepare_conversion()
    config = tyro.cli(ShowConfig, description=__doc__)
    shown = show(config.path, values=config.values)
    if config.json:
        print(json.dumps(as_json(shown, tensors=config.tensors), indent=2))
    else:
        console = Console(highlight=False, markup=False)
        if config.values or not console.is_terminal:
            # In a file names are whole; a narrow terminal wraps long rows better than narrow columns can be read.
            console.width = max(console.width, FILE_WIDTH)
        for table in tables(shown, tensors=config.tensors, values=config.values):
            console.print(table)
    damaged = [t for t in shown.tensors if t.values is not None and t.values.check == "DAMAGED"]
    if damaged:
        raise IntegrityError(
            f"{shown.places[damaged[0].part]}: {len(damaged)} tensor(s) are DAMAGED, first {damaged[0].name}; "
            "restore the folder from a copy, or use another checkpoint"
        )


if __name__ == "__main__":
    run_cli(main)
