"""From our configuration to Megatron's: `TransformerConfig`, layer spec, initial weights.

Built last and never changed afterwards: Megatron derives fields when it is constructed and does not notice edits.
"""

import math
from collections.abc import Callable

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.config import RunConfig
from pretrain.cpu_redirects import on_cuda
from pretrain.model.attention import ScaledDotProductCoreAttention

InitMethod = Callable[[torch.Tensor], torch.Tensor]


def layer_spec() -> ModuleSpec:
    """A Llama decoder block of Megatron's own modules, with our core attention."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = ScaledDotProductCoreAttention
    return spec


def transformer_config(config: RunConfig, num_layers: int) -> TransformerConfig:
    """Megatron's configuration of a stack of `num_layers` Llama blocks of the base's width."""
    model = config.model
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=config.parallel.tensor_parallel_size,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        init_method=normal_init(weight_std(config)),
        output_layer_init_method=normal_init(residual_projection_std(config)),
        use_cpu_initialization=not on_cuda(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )


def weight_std(config: RunConfig) -> float:
    """Standard deviation of initial weights: sqrt(2 / 5H), 0.00988 at H = 4096."""
    return math.sqrt(2 / (5 * config.model.hidden_size))


def residual_projection_std(config: RunConfig) -> float:
    """Of the projections that write to the residual stream: 1 / (sqrt(H) * layers of the base)."""
    return 1 / (math.sqrt(config.model.hidden_size) * config.model.num_layers)


def normal_init(std: float) -> InitMethod:
    """An initialiser that draws from N(0, std^2) in place; std 0 gives zeros."""

    def initialise(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.init.normal_(weight, mean=0.0, std=std) if std else torch.nn.init.zeros_(weight)

    return initialise
