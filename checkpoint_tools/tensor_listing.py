"""All tensors of a recipe's model in both formats, before there are any.

    python checkpoint_tools/tensor_listing.py configs/policy_llama31_8b.yaml

The converters' `--dry-run` prints the same table of the tensors that they find.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from checkpoint_tools.formats.converted_reader import seen_as_huggingface
from checkpoint_tools.formats.megatron_files import entry_facts, model_entries
from checkpoint_tools.formats.opened_model import PARTS_BY_STAGE
from checkpoint_tools.formats.tensor_reader import TensorFacts
from checkpoint_tools.formats.weight_map import Rule, weight_rules
from data_prep.errors import run_cli
from pretrain.config import StageName
from pretrain.cpu_redirects import prepare_conversion
from pretrain.recipes import load_recipe

FILE_WIDTH = 200


@dataclass(frozen=True)
class ListingConfig:
    """List the tensors of a recipe's model."""

    recipe: Annotated[Path, tyro.conf.Positional]
    """YAML file in configs/."""
    stage: StageName | None = None
    """The model as it is after this stage; default: after the recipe's own."""


def list_recipe(config: ListingConfig, console: Console) -> None:
    """Print all tensors of the model that the recipe builds, from meta tensors."""
    recipe = load_recipe(config.recipe, [])
    parts = PARTS_BY_STAGE[config.stage or recipe.stage]
    megatron = _Unwritten(entry_facts(model_entries(recipe, parts)))
    rules = weight_rules(recipe.model, recipe.actions, parts)
    list_tensors(console, seen_as_huggingface(megatron, rules).facts, megatron.facts, rules)


class _Unwritten:
    """A reader of tensors that are not there yet."""

    def __init__(self, facts: Mapping[str, TensorFacts]) -> None:
        self.facts = facts

    def read(self, name: str) -> torch.Tensor:
        raise KeyError(name)


def list_tensors(
    console: Console,
    huggingface: Mapping[str, TensorFacts],
    megatron: Mapping[str, TensorFacts],
    rules: Sequence[Rule],
) -> None:
    """Print which tensors on either side hold the same numbers, with shapes and types, and the totals."""
    if not console.is_terminal:  # in a file names are not cut off
        console.width = FILE_WIDTH
    table = Table("Hugging Face", "shape", "Megatron", "shape", "type")
    for rule in rules:
        theirs = [(name, _shape(huggingface[name])) for name in rule.huggingface]
        ours = [(name, _shape(megatron[name])) for name in rule.megatron]
        width = max(len(theirs), len(ours))
        rows = zip(
            theirs + [("", "")] * (width - len(theirs)), ours + [("", "")] * (width - len(ours)), strict=True
        )
        dtype = megatron[rule.megatron[0]].dtype_name
        for (their_name, their_shape), (our_name, our_shape) in rows:
            table.add_row(their_name, their_shape, our_name, our_shape, dtype)
    console.print(table)
    for side, facts in (("Hugging Face", huggingface), ("Megatron", megatron)):
        total = sum(fact.numel for fact in facts.values())
        gib = sum(fact.bytes for fact in facts.values()) / 2**30
        console.print(f"{side}: {len(facts)} tensors, {total:,} parameters, {gib:.2f} GiB")


def _shape(facts: TensorFacts) -> str:
    return " x ".join(map(str, facts.shape))


def main() -> None:
    """Command line."""
    prepare_conversion()
    list_recipe(tyro.cli(ListingConfig, description=__doc__), Console(soft_wrap=True))


if __name__ == "__main__":
    run_cli(main)
