"""Memory of one GPU by kind, estimated from the recipe.

Weights, gradients and optimizer state are exact up to the padding of Megatron's buffers. Activations are what the
backward pass of the trained parts keeps, without recomputation and with attention that stores no scores. A token of a
decoder block keeps its input and its normed input before attention and before the MLP (4 H), queries and keys after
rotation, the product that the values are part of, attention's output as it was and in order, and of the SwiGLU gate
and up as one product and what they multiply to (3 F); a merge layer keeps its input and 4 F. What an FP8 product reads
is kept in FP8. Frozen parts keep nothing. Against peaks measured on a GPU all of it is 2 to 5 % too much
(docs/benchmarks.md).
"""

from typing import Literal

from pretrain.config import RunConfig
from pretrain.placement import Placement, place_layers
from pretrain.planning.parameters import groups_on_stage, rank_count, trained_parts

Kind = Literal[
    "frozen weights", "trained weights", "FP8 copies of trained weights", "gradients", "optimizer state",
    "activations", "base hidden states", "logits of the token loss", "work of one block", "runtime",
]  # fmt: skip
GIB = 2**30
# As pretrain.model.token_loss.CHUNK_TOKENS, which cannot be imported without torch.
CHUNK_TOKENS = 1024
# As pretrain.base_ahead.GROUPS_AHEAD: runs of the frozen base whose hidden states are kept, on one pipeline stage.
GROUPS_AHEAD = 2
# CUDA context, communication buffers, fragments: a usual figure, not a measured one.
RUNTIME_BYTES = 4_000_000_000
_FP32_BYTES = 4


def data_parallel_size(config: RunConfig, gpus: int) -> int:
    """Ranks that work on different samples."""
    return gpus // (config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size)


def micro_batches_a_step(config: RunConfig, gpus: int) -> int:
    """Micro-batches that one rank works through before an optimizer step."""
    training = config.training
    return training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, gpus))


def fullest_stage_memory(config: RunConfig, gpus: int) -> tuple[int, dict[Kind, float]]:
    """The pipeline stage whose GPUs need most, counted from 0, and their bytes by kind."""
    stages = [stage_memory(config, gpus, stage) for stage in range(config.parallel.pipeline_parallel_size)]
    fullest = max(range(len(stages)), key=lambda stage: sum(stages[stage].values()))
    return fullest, stages[fullest]


def stage_memory(config: RunConfig, gpus: int, stage: int) -> dict[Kind, float]:
    """Bytes of one GPU of a pipeline stage, by kind; kinds that do not occur are left out."""
    placement = place_layers(config)
    kinds = {
        **_state_memory(config, gpus, placement, stage),
        **_passing_memory(config, gpus, placement, stage),
        "runtime": RUNTIME_BYTES,
    }
    return {kind: size for kind, size in kinds.items() if size}


def _state_memory(config: RunConfig, gpus: int, placement: Placement, stage: int) -> dict[Kind, float]:
    """What lives as long as the run: weights, gradients, optimizer state."""
    bf16 = config.training.precision == "bf16"
    weight_bytes = 2 if bf16 else _FP32_BYTES
    # Adam's two moments, and beside BF16 weights an fp32 master; shared out over the data-parallel ranks
    optimizer_bytes = (3 if bf16 else 2) * _FP32_BYTES / data_parallel_size(config, gpus)
    kinds: dict[Kind, float] = dict.fromkeys(
        ("frozen weights", "trained weights", "FP8 copies of trained weights"), 0.0
    )
    for group in groups_on_stage(config, placement, stage):
        count = rank_count(group, config.parallel.tensor_parallel_size)
        if group.part in trained_parts(config):
            kinds["trained weights"] += weight_bytes * count
            if group.is_block_linear and config.training.fp8 != "off":
                # one for each pass, one transposed to the other
                kinds["FP8 copies of trained weights"] += 2 * count
        else:
            in_fp8 = group.part == "base" and group.is_block_linear and config.training.base_fp8 != "off"
            kinds["frozen weights"] += (1 if in_fp8 else weight_bytes) * count
    trained = kinds["trained weights"] / weight_bytes
    return kinds | {"gradients": _FP32_BYTES * trained, "optimizer state": optimizer_bytes * trained}


def _passing_memory(config: RunConfig, gpus: int, placement: Placement, stage: int) -> dict[Kind, float]:
    """What a micro-batch needs on its way through, at the fullest moment."""
    training, parallel, model = config.training, config.parallel, config.model
    value_bytes = 2 if training.precision == "bf16" else _FP32_BYTES
    length = config.data.sequence_length
    tokens = training.micro_batch_size * length
    is_last = stage == parallel.pipeline_parallel_size - 1
    # Megatron's 1F1B schedule: the first stage is ahead of the last one by as many micro-batches as stages follow.
    in_flight = min(parallel.pipeline_parallel_size - stage, micro_batches_a_step(config, gpus))
    kinds: dict[Kind, float] = {
        "activations": in_flight * tokens * _saved_bytes_a_token(config, placement, stage)
    }

    runs_base = config.stage != "base" and placement.stages[stage].base > 0
    base_tokens = (training.base_micro_batch_size or training.micro_batch_size) * length if runs_base else 0
    hidden_bytes = value_bytes * model.hidden_size / _sequence_share(config)
    if config.stage != "base" and placement.complete_before("base", stage + 1):
        ahead = GROUPS_AHEAD * base_tokens if parallel.pipeline_parallel_size == 1 else in_flight * tokens
        kinds["base hidden states"] = hidden_bytes * ahead
    if is_last:
        # fp32, beside the product in `precision`; a trained head keeps those of the whole micro-batch
        logit_bytes = _FP32_BYTES + (value_bytes if training.precision == "bf16" else 0)
        logit_tokens = tokens if config.stage == "base" else min(CHUNK_TOKENS, tokens)
        kinds["logits of the token loss"] = (
            logit_tokens * logit_bytes * model.padded_vocab_size / parallel.tensor_parallel_size
        )
    block_bytes = 2 * hidden_bytes + 4 * value_bytes * model.ffn_hidden_size / parallel.tensor_parallel_size
    kinds["work of one block"] = max(base_tokens, tokens) * block_bytes
    return kinds


def _saved_bytes_a_token(config: RunConfig, placement: Placement, stage: int) -> float:
    """Bytes that the trained parts on a pipeline stage keep for the backward pass, a token of a micro-batch."""
    model, actions = config.model, config.actions
    tensor_size, share = config.parallel.tensor_parallel_size, _sequence_share(config)
    value_bytes = 2 if config.training.precision == "bf16" else _FP32_BYTES
    query_size = model.num_attention_heads * model.head_size
    key_value_size = model.num_key_value_heads * model.head_size
    read_bytes = value_bytes if config.training.fp8 == "off" else 1  # of what products with weights read
    # Each half its input, and that normed.
    half = (value_bytes + read_bytes) * model.hidden_size / share
    # Queries, keys, values, and what attention makes of them, which the projection after it reads.
    attention = value_bytes * 2 * (query_size + key_value_size) + _FP32_BYTES * model.num_attention_heads
    attention += 0 if config.training.fp8 == "off" else read_bytes * query_size
    mlp = (2 * value_bytes + read_bytes) * model.ffn_hidden_size
    attentions, mlps = placement.halves_on(config.stage, stage)
    saved = attentions * (half + attention / tensor_size) + mlps * (half + mlp / tensor_size)
    if stage == placement.last_stage_of(config.stage):  # final norm and head
        saved += value_bytes * 2 * model.hidden_size / share
    if config.stage == "idm" and stage == config.parallel.pipeline_parallel_size - 1:
        merge = value_bytes * (model.hidden_size + 3 * model.ffn_hidden_size / tensor_size)
        merge += read_bytes * model.ffn_hidden_size / tensor_size
        # and the last state and its gradient, which the token loss makes beside the loss
        saved += actions.num_merge_layers * merge + value_bytes * 2 * model.hidden_size
        saved += _FP32_BYTES * 6 * actions.num_actions  # logits, noise and choice of the action
    return saved


def _sequence_share(config: RunConfig) -> int:
    """Ranks that share norms and residual streams."""
    return config.parallel.tensor_parallel_size if config.parallel.sequence_parallel else 1
