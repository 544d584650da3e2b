"""config.json files of public models, and the sizes they mean, written out apart from the code that reads them."""

from dataclasses import replace
from typing import Any

from checkpoint_tools.formats.families import LLAMA3_ROPE
from pretrain.config import ModelConfig

Config = dict[str, Any]


# Sizes in the order of the tables below, by transformers' names and by ours; ours have the size of a head as well.
KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
FIELDS = (
    "vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip


def sizes(model_type: str, *values: int, **others: Any) -> Config:
    """A config.json with the sizes KEYS."""
    return {"model_type": model_type, **dict(zip(KEYS, values, strict=True)), "hidden_act": "silu", **others}


BF16 = {"torch_dtype": "bfloat16"}
UNTIED_LLAMA = {"attention_bias": False, "pretraining_tp": 1, "tie_word_embeddings": False, **BF16}
NO_WINDOW = {"use_sliding_window": False, "attention_dropout": 0.0, "tie_word_embeddings": True, **BF16}

# As published, in the spelling of transformers 4; keys that say nothing about the computation are left out.
CONFIGS: dict[str, Config] = {
    "Llama-2-7B": sizes(
        "llama", 32000, 4096, 11008, 32, 32, 32, 4096,
        rms_norm_eps=1e-5, rope_scaling=None, pretraining_tp=1, tie_word_embeddings=False, torch_dtype="float16",
    ),
    "Llama-3.1-8B": sizes(
        "llama", 128256, 4096, 14336, 32, 32, 8, 131072,
        rms_norm_eps=1e-5, rope_theta=500000.0, mlp_bias=False, attention_dropout=0.0, **UNTIED_LLAMA,
        rope_scaling={"factor": 8.0, "rope_type": "llama3", **LLAMA3_ROPE},
    ),
    "Llama-3.2-1B": sizes(
        "llama", 128256, 2048, 8192, 16, 32, 8, 131072,
        rms_norm_eps=1e-5, rope_theta=500000.0, head_dim=64, tie_word_embeddings=True, **BF16,
        rope_scaling={"factor": 32.0, "rope_type": "llama3", **LLAMA3_ROPE},
    ),
    "Qwen2.5-1.5B": sizes(
        "qwen2", 151936, 1536, 8960, 28, 12, 2, 131072,
        rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=131072, max_window_layers=28, **NO_WINDOW,
    ),
    "Qwen2.5-Math-1.5B": sizes(
        "qwen2", 151936, 1536, 8960, 28, 12, 2, 4096,
        rms_norm_eps=1e-6, rope_theta=10000, sliding_window=4096, max_window_layers=21, **NO_WINDOW,
    ),
    "Mistral-7B-v0.1": sizes(
        "mistral", 32000, 4096, 14336, 32, 32, 8, 32768,
        rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False, **BF16,
    ),
    "Mistral-7B-v0.3": sizes(
        "mistral", 32768, 4096, 14336, 32, 32, 8, 32768,
        rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, **BF16,
    ),
    "Mistral-Nemo": sizes(
        "mistral", 131072, 5120, 14336, 40, 32, 8, 131072,
        rms_norm_eps=1e-5, rope_theta=1000000.0, head_dim=128, sliding_window=None, **BF16,
    ),
}  # fmt: skip


def model(*values: int, head: int, epsilon: float, theta: float, **others: Any) -> ModelConfig:
    """A model with the sizes FIELDS."""
    known: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
    return ModelConfig(**known, head_size=head, rms_norm_epsilon=epsilon, rope_theta=theta, **others)


LLAMA_3: Config = {"epsilon": 1e-5, "theta": 5e5}
QWEN: Config = {"head": 128, "epsilon": 1e-6, "qkv_bias": True, "tied_embeddings": True}
MISTRAL: Config = {"head": 128, "epsilon": 1e-5}
MODELS = {
    "Llama-2-7B": model(32000, 4096, 11008, 32, 32, 32, 4096, head=128, epsilon=1e-5, theta=1e4),
    "Llama-3.1-8B": model(
        128256, 4096, 14336, 32, 32, 8, 131072, head=128, rope_scaling_factor=8.0, **LLAMA_3
    ),
    "Llama-3.2-1B": model(
        128256, 2048, 8192, 16, 32, 8, 131072, head=64, rope_scaling_factor=32.0, tied_embeddings=True, **LLAMA_3
    ),
    "Qwen2.5-1.5B": model(151936, 1536, 8960, 28, 12, 2, 131072, theta=1e6, **QWEN),
    "Qwen2.5-Math-1.5B": model(151936, 1536, 8960, 28, 12, 2, 4096, theta=1e4, **QWEN),
    "Mistral-7B-v0.1": model(32000, 4096, 14336, 32, 32, 8, 4096, theta=1e4, **MISTRAL),
    "Mistral-7B-v0.3": model(32768, 4096, 14336, 32, 32, 8, 32768, theta=1e6, **MISTRAL),
    "Mistral-Nemo": model(131072, 5120, 14336, 40, 32, 8, 131072, theta=1e6, **MISTRAL),
}  # fmt: skip

# Heads of a size that does not follow from the others.
SMALL = replace(
    MODELS["Llama-3.1-8B"], vocab_size=64, hidden_size=32, ffn_hidden_size=48, num_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_size=16,
)  # fmt: skip


def in_transformers_5(config: Config) -> Config:
    """`config` in the newer spelling."""
    renamed = {"torch_dtype": "dtype"}
    old = ("rope_theta", "rope_scaling")
    newer = {renamed.get(key, key): value for key, value in config.items() if key not in old}
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    return newer | {"rope_parameters": rope | (config.get("rope_scaling") or {})}
