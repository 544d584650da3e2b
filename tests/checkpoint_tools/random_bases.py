"""Small random bases of every supported family, as transformers saves them, and a random published CoLA folder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from tests.checkpoint_tools.random_cola import LLAMA3_ROPE, random_cola

VOCAB_SIZE = 1024
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,  # heads of 128
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    # Large, so that attention is far from flat and a wrong rotation or head order shows.
    "initializer_range": 0.08,
}


@dataclass(frozen=True)
class Family:
    """How a random model of a family is made."""

    config: Callable[..., Any]
    model: Callable[[Any], PreTrainedModel]
    fields: dict[str, Any]
    dtype: torch.dtype = torch.float32


FAMILIES = {
    "llama": Family(LlamaConfig, LlamaForCausalLM, {}),
    "llama31": Family(LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}, torch.bfloat16),
    "llama32": Family(
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True},
    ),
    "qwen25": Family(Qwen2Config, Qwen2ForCausalLM, {}, torch.bfloat16),
    "qwen25_tied": Family(Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "mistral": Family(
        MistralConfig,
        MistralForCausalLM,
        {"sliding_window": None, "hidden_size": 256, "head_dim": 128},
        torch.bfloat16,
    ),
}
# Tied embeddings cannot share one tensor between the first and the last pipeline stage as Megatron saves it.


def random_base(folder: Path, family: str, tokenizer: Path, seed: int = 0) -> Path:
    """Save a random model of `family`, with the files of `tokenizer`; biases and norms are not what they start as."""
    made = FAMILIES[family]
    torch.manual_seed(seed)
    model = made.model(made.config(**{**SIZES, **made.fields}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.to(made.dtype).save_pretrained(folder)  # type: ignore[arg-type]  # of a wrapped method
    copy_tokenizer_files(tokenizer, folder)
    return folder


def published_folder(folder: Path, tokenizer: Path, seed: int = 0, **fields: Any) -> Path:
    """A random CoLA model as the authors published theirs: their config.json, many shards, an index of fewer."""
    model = random_cola(seed, vocab_size=VOCAB_SIZE, output_form="reference", **fields)
    model.save_pretrained(folder, max_shard_size="200KB")
    config = model.config
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["IntentionForCausalLM"],
                "model_type": "llama",
                "num_code": config.num_actions,
                "num_action_layer": config.num_idm_layers,
                "num_dyna_layer": config.num_merge_layers,
                "num_policy_layer": config.num_policy_layers,
                "v": 1,
                "vocab_size": VOCAB_SIZE,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_hidden_layers,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "hidden_act": "silu",
                "rms_norm_eps": config.rms_norm_eps,
                "max_position_embeddings": config.max_position_embeddings,
                "rope_theta": 500000.0,
                "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
                "tie_word_embeddings": False,
                "torch_dtype": "float32",
            }
        )
    )
    for file in folder.glob("*_cola.py"):
        file.unlink()
    index = folder / "model.safetensors.index.json"
    fields_of_index = json.loads(index.read_text())
    shards = sorted(set(fields_of_index["weight_map"].values()))
    fields_of_index["weight_map"] = dict.fromkeys(fields_of_index["weight_map"], shards[0])
    index.write_text(json.dumps(fields_of_index))
    copy_tokenizer_files(tokenizer, folder)
    return folder


def copy_tokenizer_files(tokenizer: Path, folder: Path) -> None:
    """Beside the model, where transformers looks for them."""
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
