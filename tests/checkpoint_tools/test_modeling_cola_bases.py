"""The frozen base computes what transformers' own Llama, Mistral and Qwen2 compute; biases are where they belong."""

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM
from tests.checkpoint_tools.random_cola import (
    DEFAULT_ROPE,
    LLAMA3_ROPE,
    greatest_difference,
    random_cola,
    random_tokens,
    randomise,
    rope_fields,
    tiny_config,
)

SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)

# Of each family: its classes, its fields, and ours for the same base. Qwen2 as in the small Qwen2.5 models.
FAMILIES: dict[str, tuple[type, type, dict[str, Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        {"sliding_window": None},
        {"rope_parameters": DEFAULT_ROPE},
    ),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {},
        {"rope_parameters": DEFAULT_ROPE, "qkv_bias": True, "tie_word_embeddings": True},
    ),
}


def base_of_family(family: str, **changed: Any) -> tuple[PreTrainedModel, ColaForCausalLM]:
    """A large-weighted model of the family, head size 128, and a CoLA model on it; `changed` fields of ours."""
    config_class, model_class, theirs, ours = FAMILIES[family]
    config = tiny_config(hidden_size=256, **ours)
    shared = {name: getattr(config, name) for name in SHARED_FIELDS}
    model = model_class(config_class(**shared, **rope_fields(config), **theirs)).eval()
    randomise(model, seed=0)
    cola = random_cola(hidden_size=256, **(ours | changed))
    missing, unexpected = cola.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not [name for name in missing if "action" not in name and "policy" not in name]
    return model, cola


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_base_is_the_familys_own(family: str) -> None:
    model, cola = base_of_family(family)
    tokens_BS = random_tokens(2, 512)
    expected = model(tokens_BS).logits
    assert model.model.layers[0].self_attn.head_dim == 128
    assert float(expected.std()) > 1.0
    assert greatest_difference(cola.base_logits(tokens_BS), expected) <= 1e-5
    if family == "qwen2":
        for layer in cola.model.layers:
            layer.self_attn.q_proj.bias.zero_()
    else:
        other = DEFAULT_ROPE if family == "llama" else LLAMA3_ROPE
        _, cola = base_of_family(family, rope_parameters=other)
    assert greatest_difference(cola.base_logits(tokens_BS), expected) > 0.1


def test_only_queries_keys_and_values_have_a_bias_and_in_every_layer() -> None:
    model = random_cola(qkv_bias=True)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biases == {
        f"model.{stack}.{layer}.self_attn.{projection}_proj.bias"
        for stack in ("layers", "action_layers", "policy_layers")
        for layer in (0, 1)
        for projection in "qkv"
    }
    assert not any(name.endswith("bias") for name, _ in random_cola().named_parameters())


@pytest.mark.parametrize(("stack", "changed"), [("policy_layers", "policy"), ("action_layers", "idm")])
@torch.inference_mode()
def test_the_biases_of_idm_and_policy_act_there_alone(stack: str, changed: str) -> None:
    model, tokens_BS = random_cola(qkv_bias=True), random_tokens(2, 64)
    outputs = {
        "base": model.base_logits,
        "policy": model.policy_logits,
        "idm": model.infer_action_logits,
    }
    before = {name: output(tokens_BS) for name, output in outputs.items()}
    for layer in getattr(model.model, stack):
        layer.self_attn.k_proj.bias.zero_()
        layer.self_attn.v_proj.bias.zero_()
    for name, output in outputs.items():
        assert (greatest_difference(output(tokens_BS), before[name]) > 0.1) is (name == changed)
