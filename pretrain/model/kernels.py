"""Whose modules the model is made of: Transformer Engine's where it can run, else Megatron's local ones and ours.

Both kinds have the same tensors under the same checkpoint names, so weights pass between them; only the names of two
norms differ in the module (`local_name`).
Shapes: S sequence, B batch, H hidden.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from pretrain.cpu_redirects import on_cuda
from pretrain.model.attention import ScaledDotProductCoreAttention
from pretrain.model.gated_mlp import GatedMlp
from pretrain.model.norm import RmsNorm
from pretrain.model.specs import InitMethod, seeded, uses_transformer_engine
from pretrain.model.tensor_region import RegionLinear, enter_tensor_region
from pretrain.placement import BlockHalves

# Transformer Engine keeps these norms in the linear layers that they feed.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def local_name(parameter_name: str) -> str:
    """The name of a parameter as it is in a model of the local modules, whoever's modules it is in."""
    for fused, own in _FUSED_NORMS.items():
        if parameter_name.endswith(f".{fused}"):
            return parameter_name.removesuffix(fused) + own
    return parameter_name


class SelfSeededLayer(TransformerLayer):
    """A decoder block whose initial weights depend on the part's seed and its number, not on who else is built.

    Of its `halves`, attention and MLP, one may be on another pipeline stage.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        halves: BlockHalves,
        **options: Any,
    ) -> None:
        layout, stage = config.pipeline_model_parallel_layout, options["pg_collection"].pp.rank()
        blocks_before = layout.get_layer_offset(pp_rank=stage) if layout else 0
        with seeded(torch.initial_seed() + blocks_before + layer_number):
            super().__init__(config, submodules, layer_number=layer_number, **options)
        # Both halves are built first, since their initial weights are drawn one after the other.
        if not halves.attention:
            self.input_layernorm, self.self_attention = IdentityOp(), IdentityOp()
            self.self_attn_bda = IdentityFuncOp()
        if not halves.mlp:
            self.pre_mlp_layernorm, self.mlp = IdentityOp(), IdentityOp()
            self.mlp_bda = IdentityFuncOp()
        if not on_cuda() and type(self.mlp) is MLP:  # Megatron gives only its own class a group
            self.mlp.__class__ = GatedMlp


def block_submodules(blocks: Sequence[BlockHalves]) -> TransformerBlockSubmodules:
    """Llama decoder blocks, whole or by half, and a final norm."""
    if uses_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        spec, norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        spec, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), ModuleSpec(module=RmsNorm)
        layer = spec.submodules
        layer.self_attention.submodules.core_attention = ScaledDotProductCoreAttention
        layer.input_layernorm = layer.pre_mlp_layernorm = RmsNorm
    spec.module = SelfSeededLayer
    layers = [replace(spec, params={"halves": halves}) for halves in blocks]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def column_linear(
    input_size: int, output_size: int, config: TransformerConfig, groups: ProcessGroupCollection
) -> torch.nn.Module:
    """A column-parallel product of what `enter_for_columns` returns; output left split, returned first of a pair."""
    if not uses_transformer_engine():
        return RegionLinear(input_size, output_size, config, groups)
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear(
        input_size, output_size, config=config, init_method=config.init_method, gather_output=False,
        bias=False, skip_bias_add=False, is_expert=False, tp_group=groups.tp,
    )  # fmt: skip


def enter_for_columns(
    state_SBH: torch.Tensor, config: TransformerConfig, groups: ProcessGroupCollection
) -> torch.Tensor:
    """What `column_linear`s of this machine read: Transformer Engine's enter the tensor region themselves."""
    return state_SBH if uses_transformer_engine() else enter_tensor_region(state_SBH, config, groups.tp)


def row_linear(
    input_size: int,
    output_size: int,
    config: TransformerConfig,
    init_method: InitMethod,
    groups: ProcessGroupCollection,
) -> torch.nn.Module:
    """A row-parallel product out of the tensor region; returned first of a pair."""
    linear = RowParallelLinear
    if uses_transformer_engine():
        from megatron.core.extensions.transformer_engine import TERowParallelLinear

        linear = TERowParallelLinear
    return linear(
        input_size, output_size, config=config, init_method=init_method, bias=False,
        input_is_parallel=True, skip_bias_add=False, is_expert=False, tp_group=groups.tp,
    )  # fmt: skip
