"""FLOPs the method needs, a token.

Convention: 2 FLOPs a multiply-add; attention scores counted for the causal half; norms, softmax and embeddings not
counted; frozen modules only forward, except the frozen head of stage `idm`, which also passes gradients to its input;
the first block of a trained stack sends no gradient into the frozen base, so its QKV input gradient is not counted.
"""

from pretrain.config import ModelConfig, RunConfig

CONVENTION = "2 FLOPs a multiply-add, causal half of attention, only what the method needs"


def block_flops(model: ModelConfig, sequence_length: int) -> float:
    """Forward FLOPs a token of one decoder block."""
    query_size = model.num_attention_heads * model.head_size
    key_value_size = model.num_key_value_heads * model.head_size
    weights = model.hidden_size * (2 * query_size + 2 * key_value_size + 3 * model.ffn_hidden_size)
    return 2 * weights + 2 * query_size * sequence_length


def stack_backward_flops(
    model: ModelConfig, num_layers: int, num_actions: int, sequence_length: int
) -> float:
    """Backward FLOPs a token of a trained stack with an action head on frozen input."""
    query_size = model.num_attention_heads * model.head_size
    key_value_size = model.num_key_value_heads * model.head_size
    skipped = 2 * model.hidden_size * (query_size + 2 * key_value_size)
    forward = num_layers * block_flops(model, sequence_length) + 2 * model.hidden_size * num_actions
    return 2 * forward - skipped


def flops_per_token(config: RunConfig) -> dict[str, float]:
    """FLOPs a token of one training step of `config`, by module."""
    model, actions, sequence_length = config.model, config.actions, config.data.sequence_length
    block = block_flops(model, sequence_length)
    head = 2.0 * model.hidden_size * model.vocab_size
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
        merge = (
            2
            * actions.num_merge_layers
            * model.ffn_hidden_size
            * (3 * model.hidden_size + 2 * actions.num_actions)
        )
        return flops | {
            "idm backward": stack_backward_flops(
                model, actions.num_idm_layers, actions.num_actions, sequence_length
            ),
            "merge forward": merge,
            # the first merge layer's state is the frozen base's, so its two input gradients are not needed
            "merge backward": 2 * merge - 4 * model.hidden_size * model.ffn_hidden_size,
            "head forward": head,
            "head input gradient": head,
        }
    return flops | {
        "policy forward": actions.num_policy_layers * block + action_head,
        "policy backward": stack_backward_flops(
            model, actions.num_policy_layers, actions.num_actions, sequence_length
        ),
    }
