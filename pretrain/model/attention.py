"""Core attention on torch's scaled_dot_product_attention.

Megatron's local core attention builds the S x S score matrix; this one does not, on CPU and on GPUs alike.

Shapes: S sequence, B batch, N query heads, G key/value heads (both of this tensor-parallel rank), D head size,
P = N * D.
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
        """Attend causally; returns [S, B, P]."""
        assert attention_mask is None and packed_seq_params is None, "causal full sequences only"
        # A sequence's rows one after another: the kernel is 5 % faster, and the joint tensor of the value is freed.
        query_BNSD, key_BGSD, value_BGSD = (
            heads.transpose(0, 1).contiguous().transpose(1, 2) for heads in (query_SBND, key_SBGD, value_SBGD)
        )
        context_BNSD = torch.nn.functional.scaled_dot_product_attention(
            query_BNSD,
            key_BGSD,
            value_BGSD,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        context_SBP = context_BNSD.permute(2, 0, 1, 3).flatten(2)
        # A CPU's products read the kernel's own order, so that the backward pass keeps one copy for both.
        return context_SBP.contiguous() if context_SBP.is_cuda else context_SBP
