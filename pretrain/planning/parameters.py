"""The tensors of the model, by part and by pipeline stage, from the recipe alone.

Numbers of parameters follow the shapes of Megatron's modules, e.g. Llama-3.1-8B: 8,030,261,248 in the base,
1,460,178,944 trained in stage `idm`, 1,745,162,240 in stage `policy`.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from pretrain.config import ModelConfig, RunConfig
from pretrain.placement import HalfCounts, Placement

Place = Literal["attention", "mlp", "first", "end", "last"]


class TensorGroup(NamedTuple):
    """Tensors of one part that are placed and divided alike."""

    part: str
    """Part of the model, as in the names of its parameters."""
    parameters: int
    """How many, over all tensor-parallel ranks; of one block where `place` is a half of it."""
    place: Place
    """Pipeline stage: with each block's attention or MLP, the first, the one where the part's blocks end, the last."""
    is_divided: bool = True
    """Shared out over the tensor-parallel ranks; else every rank has all of it."""
    is_block_linear: bool = False
    """Weights of the products inside blocks and merge layers, which FP8 recipes are for."""


def trained_parts(config: RunConfig) -> tuple[str, ...]:
    """Parts that the run trains."""
    if config.stage == "idm":
        return (
            ("idm", "world_model", "quantiser")
            if config.actions.assignment == "vq"
            else ("idm", "world_model")
        )
    return (config.stage,)


def built_parts(config: RunConfig) -> tuple[str, ...]:
    """Parts that the run holds, frozen ones first."""
    frozen = {"base": (), "idm": ("base",), "policy": ("base", "idm", "world_model")}[config.stage]
    return (*frozen, *trained_parts(config))


def parameters_by_part(config: RunConfig) -> dict[str, int]:
    """Parameters of every part that the run holds, over all ranks."""
    blocks = {
        "base": config.model.num_layers,
        "idm": config.actions.num_idm_layers,
        "policy": config.actions.num_policy_layers,
    }
    counts = dict.fromkeys(built_parts(config), 0)
    for group in _tensor_groups(config):
        counts[group.part] += group.parameters * (
            blocks[group.part] if group.place in HalfCounts._fields else 1
        )
    return counts


def groups_on_stage(config: RunConfig, placement: Placement, stage: int) -> Iterator[TensorGroup]:
    """The groups on one pipeline stage; those of attentions and MLPs come multiplied by the number of them there.

    Copies included: stages after the base's last block hold its final norm too, and the last one the head of an
    embedding on the first.
    """
    last = len(placement.stages) - 1
    for group in _tensor_groups(config):
        if group.place in HalfCounts._fields:
            count = getattr(placement.halves_on(group.part, stage), group.place)
            if count:
                yield group._replace(parameters=group.parameters * count)
        elif group.place == "end":
            is_here = group.part == "base" or placement.blocks_on(group.part, stage)
            if is_here and placement.complete_before(group.part, stage + 1):
                yield group
        elif stage == {"first": 0, "last": last}[group.place]:
            yield group
    if config.model.tied_embeddings and 0 < stage == last:
        yield TensorGroup("base", config.model.padded_vocab_size * config.model.hidden_size, "last")


def rank_count(group: TensorGroup, tensor_parallel_size: int) -> float:
    """Parameters of the group on one tensor-parallel rank."""
    return group.parameters / tensor_parallel_size if group.is_divided else group.parameters


def _tensor_groups(config: RunConfig) -> Iterator[TensorGroup]:
    """All groups of the model's parts, each once."""
    model, actions = config.model, config.actions
    hidden_size, parts = model.hidden_size, built_parts(config)
    table = model.padded_vocab_size * hidden_size
    yield TensorGroup("base", table, "first")
    if not model.tied_embeddings:
        yield TensorGroup("base", table, "last")
    for part in parts:
        if part not in ("base", "idm", "policy"):
            continue
        yield from _block_groups(part, model)
        yield TensorGroup(part, hidden_size, "end", is_divided=False)  # final norm
        if part != "base":
            yield TensorGroup(part, actions.num_actions * hidden_size, "end")
    if "world_model" in parts:
        yield TensorGroup("world_model", actions.num_actions * hidden_size, "last", is_divided=False)
        merge = 5 * hidden_size * model.ffn_hidden_size  # gate and up on [state; action], and down
        yield TensorGroup("world_model", actions.num_merge_layers * merge, "last", is_block_linear=True)
    if "quantiser" in parts:
        yield TensorGroup("quantiser", actions.num_actions**2, "last", is_divided=False)


def _block_groups(part: str, model: ModelConfig) -> Iterator[TensorGroup]:
    """One decoder block: its products' weights, their biases, its two norms."""
    query_size = model.num_attention_heads * model.head_size
    qkv_size = query_size + 2 * model.num_key_value_heads * model.head_size
    attention, mlp = qkv_size + query_size, 3 * model.ffn_hidden_size
    yield TensorGroup(part, model.hidden_size * attention, "attention", is_block_linear=True)
    yield TensorGroup(part, model.hidden_size * mlp, "mlp", is_block_linear=True)
    if model.qkv_bias:
        yield TensorGroup(part, qkv_size, "attention")
    yield TensorGroup(part, model.hidden_size, "attention", is_divided=False)
    yield TensorGroup(part, model.hidden_size, "mlp", is_divided=False)
