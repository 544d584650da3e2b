"""Compare two models: every tensor, and what both compute, each by its own code. Nothing is written.

    python checkpoint_tools/compare.py runs/demo/policy runs/demo/hf
    python checkpoint_tools/compare.py Llama-3.1-8B runs/llama31_8b/base --tokens 2048
    python checkpoint_tools/compare.py run/checkpoints/step_00001000 run/checkpoints/step_00002000 --tensors-only

Takes runs or checkpoints of the trainer and Hugging Face folders, any two. Tensors are compared by their Hugging Face
names, byte by byte, or as one rounded to the type of the other. Then both models read the same random tokens: the one
in Megatron's modules, the other in transformers', layer by layer, in fp32. So a fault in the weights is named by its
tensor, and a fault in the configuration by the first layer that computes something else. Memory holds a layer, not a
model. Ends with exit code 5 where the models are not the same.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from checkpoint_tools.comparison.outputs import OutputDifference, compare_outputs, make_probe
from checkpoint_tools.comparison.tensors import (
    TensorComparison,
    TensorDifference,
    common_dtypes,
    compare_tensors,
)
from checkpoint_tools.formats.opened_model import OpenedModel, open_model
from data_prep.errors import IntegrityError, UserError, run_cli
from pretrain.cpu_redirects import prepare_conversion

SHOWN_TENSORS = 12
FILE_WIDTH = 160
# What only the trainer knows of, or how it lays out the vocabulary.
UNEXPORTED = {"vocab_padding", "assignment", "temperature", "regulariser", "regulariser_coefficient"}
PART_OF_SETTING = {"num_idm_layers": "idm", "num_policy_layers": "policy"}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare two models."""

    left: Annotated[Path, tyro.conf.Positional]
    """A run, a checkpoint or a Hugging Face folder."""
    right: Annotated[Path, tyro.conf.Positional]
    """Another, of any kind."""
    tokens: int = 512
    """Length of the random text that both models read."""
    tensors_only: bool = False
    """Compare no outputs."""
    json: bool = False
    """Print the same facts as JSON."""


@dataclass(frozen=True, kw_only=True)
class SettingDifference:
    """A size or number of the two models' configurations that is not the same."""

    name: str
    """Field of ModelConfig or ActionConfig."""
    left: object
    """Its value on the left."""
    right: object
    """Its value on the right."""

    def __str__(self) -> str:
        return f"{self.name} is {self.left} against {self.right}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that was compared."""

    left: Path
    """As it was opened."""
    right: Path
    """As it was opened."""
    parts: tuple[str, ...]
    """Those that both models have; nothing else is compared."""
    settings: tuple[SettingDifference, ...]
    """Settings that differ."""
    tensors: TensorComparison
    """Their weights."""
    tokens: int = 0
    """Length of the random text that both read; 0 where outputs were not compared."""
    outputs: tuple[OutputDifference, ...] = ()
    """What they compute, in the order in which it is computed."""

    def first_wrong_output(self) -> OutputDifference | None:
        """Where the models part."""
        return next((output for output in self.outputs if not output.equal), None)

    def problems(self) -> list[str]:
        """Why the models are not the same, the likeliest cause first; empty if they are."""
        tensors, problems = self.tensors, []
        for names, side in ((tensors.only_left, self.left), (tensors.only_right, self.right)):
            if names:
                problems.append(f"{len(names)} tensor(s) are in {side} alone, first {names[0]}")
        if tensors.differences:
            count = f"{len(tensors.differences)} of {tensors.compared} tensors differ"
            problems.append(f"{count}, first {tensors.differences[0]}")
        problems += [str(setting) for setting in self.settings]
        if (wrong := self.first_wrong_output()) is not None:
            problems.append(_in_words(wrong, tensors.equal))
        return problems


def compare_models(left: OpenedModel, right: OpenedModel, tokens: int | None) -> Comparison:
    """Compare the parts that both models have: settings, all tensors, and outputs over `tokens` positions.

    Outputs are left out with `tokens` None, and where the tensors' names or shapes differ.

    Raises:
        UserError: if a file is damaged.
    """
    parts = tuple(part for part in left.parts if part in right.parts)
    comparison = Comparison(
        left=left.path,
        right=right.path,
        parts=parts,
        settings=tuple(_setting_differences(left, right, parts)),
        tensors=compare_tensors(left, right, parts),
    )
    return comparison if tokens is None else _with_outputs(comparison, left, right, tokens)


def _with_outputs(comparison: Comparison, left: OpenedModel, right: OpenedModel, tokens: int) -> Comparison:
    if not comparison.tensors.fit:
        return comparison
    parts, probe = comparison.parts, make_probe(left, right, tokens)
    outputs = compare_outputs(left, right, parts, probe, common_dtypes(left, right, parts))
    return dataclasses.replace(comparison, tokens=len(probe.tokens_S), outputs=tuple(outputs))


def verify_conversion(source: OpenedModel, converted: OpenedModel, tokens: int = 64) -> str:
    """Compare a model with what it was converted from, in the parts that both have.

    Every tensor must be the source's, cast to its own type, and the outputs over `tokens` positions the same.

    Returns:
        One line that says what was found.

    Raises:
        IntegrityError: naming the first wrong tensor, setting or layer.
    """
    comparison = compare_models(source, converted, tokens=None)
    problems = comparison.problems()
    if comparison.tensors.left_rounded:
        problems.append(f"{comparison.tensors.left_rounded} tensors have digits that the source's have not")
    if not problems:
        comparison = _with_outputs(comparison, source, converted, tokens)
        problems = comparison.problems()
    if problems:
        raise IntegrityError(f"{converted.path}: is not what {source.path} is: " + "; ".join(problems))
    return f"verified: {_summary(comparison)}"


def _setting_differences(
    left: OpenedModel, right: OpenedModel, parts: tuple[str, ...]
) -> Iterator[SettingDifference]:
    sections: list[tuple[object, object]] = [(left.model, right.model)]
    if "world_model" in parts:
        sections.append((left.actions, right.actions))
    for ours, theirs in sections:
        for field in dataclasses.fields(ours):  # type: ignore[arg-type]
            values = getattr(ours, field.name), getattr(theirs, field.name)
            counts = field.name not in UNEXPORTED and PART_OF_SETTING.get(field.name, "base") in parts
            if counts and values[0] != values[1]:
                yield SettingDifference(name=field.name, left=values[0], right=values[1])


def _in_words(wrong: OutputDifference, tensors_equal: bool) -> str:
    words = f"outputs differ from {wrong.module} on, by {wrong.relative:.2g} of their length"
    if not wrong.agrees_at_start:
        return words
    cause = "rotary positions" if tensors_equal else "queries, keys or rotary positions"
    growth = ", ".join(f"{at.relative:.1g} at {at.position}" for at in wrong.at)
    return f"{words}, not at position 0 but at later ones ({growth}), as by other {cause}"


def _summary(comparison: Comparison) -> str:
    tensors = comparison.tensors
    rounded = tensors.right_rounded + tensors.left_rounded
    words = f"{tensors.compared} tensors equal" + (f", {rounded} of them after rounding" if rounded else "")
    if comparison.outputs:
        greatest = max(output.relative for output in comparison.outputs)
        within = f"outputs within {greatest:.0e}" if greatest else "outputs bit for bit the same"
        words += f", {within} over {comparison.tokens} positions"
    return f"{words} ({', '.join(comparison.parts)})"


def _print(comparison: Comparison, console: Console) -> None:
    if not console.is_terminal:  # in a file nothing is cut off
        console.width = FILE_WIDTH
    differences = comparison.tensors.differences
    if differences:
        console.print(_tensor_table(differences[:SHOWN_TENSORS]))
        console.print(f"{len(differences)} of {comparison.tensors.compared} tensors differ")
    if comparison.outputs:
        console.print(_output_table(comparison))


def _tensor_table(differences: Sequence[TensorDifference]) -> Table:
    table = Table("tensor", "left", "right", "elements", "greatest difference", "relative", "hint")
    for tensor in differences:
        measured = (
            ("", "", "")
            if tensor.elements is None
            else (f"{tensor.elements:,}", f"{tensor.max_abs:.3g}", f"{tensor.relative:.3g}")
        )
        table.add_row(tensor.name, tensor.left, tensor.right, *measured, tensor.hint)
    return table


def _output_table(comparison: Comparison) -> Table:
    positions = [f"at position {at.position:,}" for at in comparison.outputs[0].at]
    table = Table("output", "greatest difference", "relative", *positions)
    for output in comparison.outputs:
        cells = [
            f"{at.relative:.1e}" + ("" if at.kl_nats is None else f", KL {at.kl_nats:.1e}")
            for at in output.at
        ]
        style = None if output.equal else "bold red"
        table.add_row(output.module, f"{output.max_abs:.1e}", f"{output.relative:.1e}", *cells, style=style)
    return table


def compare(config: CompareConfig) -> None:
    """Print how the two models differ.

    Raises:
        UserError: if a model cannot be read.
        IntegrityError: if they are not the same.
    """
    if config.tokens < 1:
        raise UserError(f"--tokens is {config.tokens}, must be at least 1")
    opened = open_model(config.left), open_model(config.right)
    comparison = compare_models(*opened, None if config.tensors_only else config.tokens)
    if config.json:
        print(json.dumps(dataclasses.asdict(comparison), default=str, indent=2))
    else:
        _print(comparison, Console(highlight=False))
    if problems := comparison.problems():
        raise IntegrityError(f"{config.right}: is not what {config.left} is: " + "; ".join(problems))
    if not config.json:
        print(f"the same: {_summary(comparison)}")


def main() -> None:
    """Command line."""
    prepare_conversion()
    compare(tyro.cli(CompareConfig, description=__doc__))


if __name__ == "__main__":
    run_cli(main)
