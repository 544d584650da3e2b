"""From our configuration to Megatron's: `TransformerConfig`, precision, initial weights.

Built last and never changed afterwards: Megatron derives fields when it is constructed and does not notice edits.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.backends import find_backends
from pretrain.config import RunConfig
from pretrain.cpu_redirects import on_cuda
from pretrain.placement import place_layers
from pretrain.planning.parameters import trained_parts

InitMethod = Callable[[torch.Tensor], torch.Tensor]


@cache
def uses_transformer_engine() -> bool:
    """True where models are built of Transformer Engine's modules."""
    return find_backends().layer_spec == "transformer_engine"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from `seed`, whatever was drawn before, and leave the generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield


def transformer_config(config: RunConfig, part: str) -> TransformerConfig:
    """Megatron's configuration of `part`: Llama blocks of the base's width, counted over all pipeline stages."""
    model, actions, parallel = config.model, config.actions, config.parallel
    layers = {"base": model.num_layers, "idm": actions.num_idm_layers, "policy": actions.num_policy_layers}
    fp8 = fp8_recipe(config, part)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=layers.get(part, actions.num_merge_layers),
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
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        pipeline_model_parallel_layout=_megatron_layout(config, part),
        deterministic_mode=config.training.deterministic,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        init_method=normal_init(weight_std(config)),
        output_layer_init_method=normal_init(residual_projection_std(config)),
        use_cpu_initialization=not on_cuda(),
        fp8=None if fp8 == "off" else "hybrid",
        fp8_recipe="delayed" if fp8 == "off" else fp8,
        # A frozen base is quantised once: its weights are FP8, without another copy.
        fp8_param=fp8 != "off" and is_frozen_base(config, part),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=True,  # keeps 3 F-wide tensors a token for the backward pass instead of 5
        bias_dropout_fusion=False,
        apply_rope_fusion=uses_transformer_engine(),  # one pass over queries and keys instead of six
    )


def is_frozen_base(config: RunConfig, part: str) -> bool:
    """Whether `part` is a base that this run does not train."""
    return part == "base" and config.stage != "base"


def fp8_recipe(config: RunConfig, part: str) -> str:
    """FP8 recipe of `part`; frozen action modules stay in `training.precision`, so that labels are exact."""
    if is_frozen_base(config, part):
        return config.training.base_fp8
    return config.training.fp8 if part in trained_parts(config) else "off"


def _megatron_layout(config: RunConfig, part: str) -> list[list[str]] | None:
    """Our placement of a stack of blocks, in Megatron's words; None where there is one stage, or no such stack."""
    if config.parallel.pipeline_parallel_size == 1 or part == "world_model":
        return None
    # Megatron numbers a stage's blocks on from the rows before. A block that is cut is in the row of its MLP, so that
    # both halves get its number.
    placement, stages = place_layers(config), range(config.parallel.pipeline_parallel_size)
    rows = [["decoder"] * placement.halves_on(part, stage).mlp for stage in stages]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    return rows


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
