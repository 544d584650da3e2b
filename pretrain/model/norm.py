"""RMSNorm for machines without Transformer Engine, on which Megatron's own wrapper refuses sequence parallelism.

Shapes: S sequence, B batch, H hidden.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.cpu_products import is_fast
from pretrain.cpu_redirects import weight_device


class RmsNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in the form Megatron's specs construct."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, device=weight_device(), dtype=config.params_dtype)
        # Megatron sums such gradients over the tensor-parallel ranks, each of which sees a part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, state_SBH: torch.Tensor) -> torch.Tensor:
        """The normed state [S, B, H]; of a frozen part, while a CPU trains, in three passes instead of torch's six."""
        if torch.is_grad_enabled() or not is_fast(state_SBH):
            return super().forward(state_SBH)
        length_SB1 = torch.linalg.vector_norm(state_SBH, dim=-1, keepdim=True)
        inverse_SB1 = length_SB1.square_().div_(state_SBH.shape[-1]).add_(self.eps or 0.0).rsqrt_()
        return (state_SBH * inverse_SB1).mul_(self.weight)
