"""Which tensor of our Megatron model is which tensor of the Hugging Face model, as one table, both ways.

The Hugging Face names are the published ones (410 tensors at Llama-3.1-8B sizes). Tensors are whole (one
tensor-parallel rank). Shapes: H hidden, F MLP width, A actions, Q query heads a key/value head, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from pretrain.config import ActionConfig, ModelConfig

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Rule:
    """One group of Megatron tensors that holds the same numbers as one group of Hugging Face tensors."""

    megatron: tuple[str, ...]
    huggingface: tuple[str, ...]
    to_huggingface: Callable[[Tensors], Tensors]
    to_megatron: Callable[[Tensors], Tensors]


def weight_rules(model: ModelConfig, actions: ActionConfig, parts: Sequence[str]) -> list[Rule]:
    """The rules of all tensors of `parts` ("base", "idm", "world_model", "policy")."""
    rules: list[Rule] = []
    if "base" in parts:
        rules.append(_vocabulary(model, "base.embedding.word_embeddings.weight", "model.embed_tokens.weight"))
        rules += _stack(model, model.num_layers, "base.decoder", "model.layers", "model.norm")
        if not model.tied_embeddings:
            rules.append(_vocabulary(model, "base.output_layer.weight", "lm_head.weight"))
    if "idm" in parts:
        rules += _stack(
            model, actions.num_idm_layers, "idm.blocks", "model.action_layers", "model.action_norm"
        )
        rules.append(_same("idm.head.weight", "model.action_head.weight"))
    if "world_model" in parts:
        rules.append(_codebook())
        for layer in range(actions.num_merge_layers):
            rules += _merge_layer(layer)
    if "policy" in parts:
        rules += _stack(
            model, actions.num_policy_layers, "policy.blocks", "model.policy_layers", "model.policy_norm"
        )
        rules.append(_same("policy.head.weight", "model.policy_head.weight"))
    return rules


def to_huggingface(rules: Sequence[Rule], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Megatron tensors renamed and regrouped; KeyError names what is missing."""
    return dict(_convert(state, ((r.megatron, r.huggingface, r.to_huggingface) for r in rules)))


def to_megatron(rules: Sequence[Rule], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face tensors renamed and regrouped; KeyError names what is missing."""
    return dict(_convert(state, ((r.huggingface, r.megatron, r.to_megatron) for r in rules)))


def _convert(
    state: dict[str, torch.Tensor],
    steps: Iterator[tuple[tuple[str, ...], tuple[str, ...], Callable[[Tensors], Tensors]]],
) -> Iterator[tuple[str, torch.Tensor]]:
    for sources, targets, convert in steps:
        tensors = convert(tuple(state[name] for name in sources))
        yield from ((name, tensor.contiguous()) for name, tensor in zip(targets, tensors, strict=True))


def _same(megatron: str, huggingface: str) -> Rule:
    return Rule((megatron,), (huggingface,), lambda tensors: tensors, lambda tensors: tensors)


def _vocabulary(model: ModelConfig, megatron: str, huggingface: str) -> Rule:
    """Rows that pad the vocabulary are zeros here and absent there."""
    padding = (0, 0, 0, model.vocab_padding)
    return Rule(
        (megatron,),
        (huggingface,),
        lambda t: (t[0][: model.vocab_size],),
        lambda t: (torch.nn.functional.pad(t[0], padding) if model.vocab_padding else t[0],),
    )


def _stack(
    model: ModelConfig, num_layers: int, megatron: str, huggingface_layers: str, huggingface_norm: str
) -> Iterator[Rule]:
    for layer in range(num_layers):
        ours, theirs = f"{megatron}.layers.{layer}", f"{huggingface_layers}.{layer}"
        yield _same(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight")
        for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
            yield _query_key_value(
                model, f"{ours}.self_attention.linear_qkv.{kind}", f"{theirs}.self_attn", kind
            )
        yield _same(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight")
        yield _same(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight")
        yield _gate_up(f"{ours}.mlp.linear_fc1.weight", f"{theirs}.mlp")
        yield _same(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.down_proj.weight")
    yield _same(f"{megatron}.final_layernorm.weight", f"{huggingface_norm}.weight")


def _query_key_value(model: ModelConfig, megatron: str, huggingface: str, kind: str) -> Rule:
    """Megatron keeps, a key/value head at a time, that head's queries, its key and its value."""
    groups, head_size = model.num_key_value_heads, model.head_size
    queries = model.num_attention_heads // groups

    def split(tensors: Tensors) -> Tensors:
        grouped = tensors[0].unflatten(0, (groups, (queries + 2) * head_size))
        sizes = [queries * head_size, head_size, head_size]
        return tuple(part.flatten(0, 1) for part in grouped.split(sizes, dim=1))

    def join(tensors: Tensors) -> Tensors:
        grouped = [part.unflatten(0, (groups, -1)) for part in tensors]
        return (torch.cat(grouped, dim=1).flatten(0, 1),)

    names = tuple(f"{huggingface}.{letter}_proj.{kind}" for letter in "qkv")
    return Rule((megatron,), names, split, join)


def _gate_up(megatron: str, huggingface: str) -> Rule:
    names = (f"{huggingface}.gate_proj.weight", f"{huggingface}.up_proj.weight")
    return Rule((megatron,), names, lambda t: t[0].chunk(2), lambda t: (torch.cat(t),))


def _codebook() -> Rule:
    """Codes are rows here and columns of a Linear(A, H) there."""
    names = ("world_model.codebook_AH",), ("model.action_code_book.weight",)
    return Rule(*names, lambda t: (t[0].T,), lambda t: (t[0].T,))


def _merge_layer(layer: int) -> Iterator[Rule]:
    """Here the halves for state and action are apart; there they read the concatenation [state; action]."""
    ours, theirs = f"world_model.merge_layers.{layer}", f"model.action_merge_layers.{layer}"
    for name in ("gate", "up"):
        yield Rule(
            (f"{ours}.{name}_state.weight", f"{ours}.{name}_action.weight"),
            (f"{theirs}.{name}_proj.weight",),
            lambda t: (torch.cat(t, dim=1),),
            lambda t: t[0].chunk(2, dim=1),
        )
    yield _same(f"{ours}.down.weight", f"{theirs}.down_proj.weight")
