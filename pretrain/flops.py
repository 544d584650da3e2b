"""FLOPs the method needs, a token.

Convention: 2 FLOPs a multiply-add; attention scores counted for the causal half; norms, softmax and embeddings not
counted; frozen modules only forward, except the frozen head of stage `idm`, which also passes gradients to its input.
The first block of a trained stack does need the input gradient of its QKV projection: its norm's weight is trained.
"""

from pretrain.config import ModelConfig, RunConfig

CONVENTION = "2 FLOPs a multiply-add, causal half of attention, only what the method needs"


def block_flops(model: ModelConfig, sequence_length: int) -> float:
    """Forward FLOPs a token of one decoder block."""
    return sum(half_block_flops(model, sequence_length))


def half_block_flops(model: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """The same of its attention and of its MLP."""
    mlp = 6 * model.hidden_size * model.ffn_hidden_size
    scores = 2 * model.num_attention_heads * model.head_size * sequence_length
    return block_product_flops(model) - mlp + scores, mlp


def block_product_flops(model: ModelConfig) -> float:
    """Those of its products with weights: all but attention's scores and weighted values."""
    query_size = model.num_attention_heads * model.head_size
    key_value_size = model.num_key_value_heads * model.head_size
    return 2 * model.hidden_size * (2 * query_size + 2 * key_value_size + 3 * model.ffn_hidden_size)


def head_flops(model: ModelConfig) -> float:
    """Forward FLOPs a token of the token head, rows that pad the vocabulary included: they are multiplied too."""
    return 2.0 * model.hidden_size * model.padded_vocab_size


def merge_flops(config: RunConfig) -> tuple[float, float]:
    """Forward and backward FLOPs a token of the merge layers, the action's half of the product taken from a table."""
    hidden_size, ffn_hidden_size = config.model.hidden_size, config.model.ffn_hidden_size
    layer = 2 * ffn_hidden_size * (3 * hidden_size + 2 * config.actions.num_actions)
    forward = config.actions.num_merge_layers * layer
    # the first layer's state is the frozen base's, so its two input gradients are not needed
    return forward, 2 * forward - 4 * hidden_size * ffn_hidden_size


def flops_per_token(config: RunConfig) -> dict[str, float]:
    """FLOPs a token of one training step of `config`, by module."""
    model, actions = config.model, config.actions
    block = block_flops(model, config.data.sequence_length)
    head = head_flops(model)
    action_head = 2 * model.hidden_size * actions.num_actions
    if config.stage == "base":
        return {
            "base forward": model.num_layers * block + head,
            "base backward": 2 * (model.num_layers * block + head),
        }
    flops = {
        "base forward": model.num_layers * block,
        "idm forward": actions.num_idm_layers * block + action_head,
    }
    if config.stage == "idm":
        merge_forward, merge_backward = merge_flops(config)
        return flops | {
            "idm backward": 2 * flops["idm forward"],
            "merge forward": merge_forward,
            "merge backward": merge_backward,
            "head forward": head,
            "head input gradient": head,
        }
    policy = actions.num_policy_layers * block + action_head
    return flops | {"policy forward": policy, "policy backward": 2 * policy}


def full_training_flops(config: RunConfig) -> float:
    """FLOPs a token of training the base itself, all of it: what a stage is compared with."""
    block = block_flops(config.model, config.data.sequence_length)
    return 3 * (config.model.num_layers * block + head_flops(config.model))


def fp8_flops_per_token(config: RunConfig) -> dict[str, float]:
    """The part of `flops_per_token` that the recipe's FP8 settings run in FP8, by module; empty if none.

    Products with the weights of blocks and merge layers. Attention, heads, action tables and frozen parts other than
    the base stay in BF16.
    """
    model, actions = config.model, config.actions
    block = block_product_flops(model)
    in_fp8: dict[str, float] = {}
    if config.stage != "base" and config.training.base_fp8 != "off":
        in_fp8["base forward"] = model.num_layers * block
    if config.training.fp8 != "off":
        layers = {
            "base": model.num_layers,
            "idm": actions.num_idm_layers,
            "policy": actions.num_policy_layers,
        }
        in_fp8[f"{config.stage} forward"] = layers[config.stage] * block
        in_fp8[f"{config.stage} backward"] = 2 * layers[config.stage] * block
        if config.stage == "idm":
            product = 2 * model.hidden_size * model.ffn_hidden_size
            in_fp8["merge forward"] = actions.num_merge_layers * 3 * product
            in_fp8["merge backward"] = 2 * in_fp8["merge forward"] - 2 * product  # as in merge_flops
    return in_fp8
