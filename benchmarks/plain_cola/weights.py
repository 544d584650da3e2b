"""Between a run of this project and the plain CoLA: settings one way, tensors both ways.

Weights and gradients alike: every rule only rearranges numbers. Tensors are whole (one rank).
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

import torch

from benchmarks.plain_cola.model import PlainCola
from benchmarks.plain_cola.settings import PlainMethod, PlainOptimizer, PlainSizes
from checkpoint_tools.formats.weight_map import Rule, to_huggingface, to_megatron, weight_rules
from pretrain.config import RunConfig

# The published names of all tensors but the head's begin with it.
PREFIX = "model."
HEAD = "lm_head."

Settings = TypeVar("Settings", PlainSizes, PlainMethod, PlainOptimizer)


def sizes_of(config: RunConfig) -> PlainSizes:
    """Sizes of the plain twin of `config`'s model."""
    return _pick(PlainSizes, config.model, config.actions)


def method_of(config: RunConfig) -> PlainMethod:
    """The choices of `config`'s actions; assignment is always gumbel."""
    return _pick(PlainMethod, config.actions)


def optimizer_of(config: RunConfig) -> PlainOptimizer:
    """Rates, decay and clipping of `config`."""
    return _pick(PlainOptimizer, config.optimizer)


def load_from_megatron(model: PlainCola, config: RunConfig, megatron: dict[str, torch.Tensor]) -> None:
    """Copy the weights of all parts of `model`; RuntimeError or KeyError unless every tensor is there."""
    tensors = to_plain(config, model.parts, megatron)
    if config.model.tied_embeddings and "base" in model.parts:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    model.load_state_dict(tensors)


def to_plain(
    config: RunConfig, parts: Sequence[str], megatron: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Megatron tensors of `parts`, weights or gradients, under the plain model's names; KeyError if one lacks."""
    tensors = to_huggingface(_rules(config, parts), megatron)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def from_plain(
    config: RunConfig, parts: Sequence[str], plain: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The inverse of `to_plain`."""
    published = {name if name.startswith(HEAD) else PREFIX + name: t for name, t in plain.items()}
    return to_megatron(_rules(config, parts), published)


def _rules(config: RunConfig, parts: Sequence[str]) -> list[Rule]:
    return weight_rules(config.model, config.actions, parts)


def _pick(kind: type[Settings], *sections: object) -> Settings:
    """The fields of `kind`, by name, out of the configuration's sections."""
    values = {name: value for section in sections for name, value in vars(section).items()}
    return kind(**{field.name: values[field.name] for field in fields(kind)})
