"""Small CoLA models with large random weights, on which a mistake shows.

With the usual small initial weights attention is nearly flat, and a wrong rotary scaling, head order or mask
hardly changes the output; so weights here are large, head size is 64, and the norms are not all ones.
These files and the tests of the model need only torch, transformers 5 or 4, and pytest.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from checkpoint_tools.huggingface.configuration_cola import ColaConfig
from checkpoint_tools.huggingface.modeling_cola import ColaForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500000.0}


def tiny_config(**fields: Any) -> ColaConfig:
    """Two layers everywhere, two heads of 64 on one key-value head, 64 actions; `fields` replace any."""
    return ColaConfig(
        **{
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_parameters": LLAMA3_ROPE,
            "num_idm_layers": 2,
            "num_policy_layers": 2,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **fields,
        }
    )


def random_cola(seed: int = 0, attn_implementation: str = "sdpa", **fields: Any) -> ColaForCausalLM:
    """A model of `tiny_config(**fields)` in evaluation mode; the same seed gives the same weights."""
    config = tiny_config(**fields)
    config._attn_implementation = attn_implementation
    model = ColaForCausalLM(config).eval()
    randomise(model, seed)
    return model


def rope_fields(config: ColaConfig) -> dict[str, Any]:
    """The rotary fields of a configuration, under the names that this version of transformers has for them."""
    if hasattr(config, "rope_parameters"):
        return {"rope_parameters": config.rope_parameters}
    return {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}


def save_with_tokenizer(model: ColaForCausalLM, folder: Path) -> PreTrainedTokenizerFast:
    """Write the model's folder, and in it a tokenizer of one token a word: " w2", " w3", ..., and </s>, <unk>."""
    words = {f" w{number}": number for number in range(2, model.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(" ", behavior="merged_with_next")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return fast


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every weight a large random value, by its name's place in the alphabet and the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(std=0.2, generator=generator)


def random_tokens(batch: int, tokens: int, seed: int = 0, vocab_size: int = 320) -> torch.Tensor:
    """Token ids [batch, tokens]."""
    return torch.randint(vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate_with_actions(
    model: ColaForCausalLM, tokens_BS: torch.Tensor, new_tokens: int, **keywords: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, S + new_tokens], and the actions taken [B, new_tokens]."""
    output = model.generate(tokens_BS, max_new_tokens=new_tokens, return_dict_in_generate=True, **keywords)
    assert isinstance(output, ModelOutput)
    return output["sequences"], output["actions"]


def greatest_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Of two tensors of one shape, element by element; of integers, how many differ."""
    assert left.shape == right.shape, f"{list(left.shape)} against {list(right.shape)}"
    if left.is_floating_point():
        return float((left.float() - right.float()).abs().max())
    return float((left != right).sum())
