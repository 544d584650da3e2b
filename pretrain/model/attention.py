"""Core attention on torch's scaled_dot_product_attention.

Megatron's local core attention builds the S x S score matrix; this one does not, on CPU and on GPUs alike.

Shapes: S sequence, B batch, N query heads, G key/value heads (both of this tensor-parallel rank), D head size.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class ScaledDotProductCoreAttention(MegatronModule):
    """Causal attention for Megatron's `SelfAttention`; holds no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, "only causal attention is needed here"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend causally; returns [S, B, N * D]."""
        assert attention_mask is None and packed_seq_params is None, "causal full sequences only"
        context_BNSD = torch.nn.functional.scaled_dot_product_attention(
            query_SBND.permute(1, 2, 0, 3),
            key_SBGD.permute(1, 2, 0, 3),
            value_SBGD.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()
