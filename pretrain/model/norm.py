"""RMSNorm for machines without Transformer Engine, on which Megatron's own wrapper refuses sequence parallelism.

Shapes: S sequence, B batch, H hidden.
"""

from typing import cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import BackwardCFunction

from pretrain.cpu_products import is_fast
from pretrain.cpu_redirects import weight_device


class RmsNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in the form Megatron's specs construct."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, device=weight_device(), dtype=config.params_dtype)
        # Megatron sums such gradients over the tensor-parallel ranks, each of which sees a part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, state_SBH: torch.Tensor) -> torch.Tensor:
        """The normed state [S, B, H]; while a CPU trains in three passes, of which the input alone is kept."""
        return (
            _Norm.apply(state_SBH, self.weight, self.eps)
            if is_fast(state_SBH)
            else super().forward(state_SBH)
        )


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight: half of torch's passes, and one tensor kept instead of two."""

    @staticmethod
    def forward(
        ctx: BackwardCFunction, state_SBH: torch.Tensor, weight_H: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        length_SB1 = torch.linalg.vector_norm(state_SBH, dim=-1, keepdim=True)
        inverse_SB1 = length_SB1.square_().div_(state_SBH.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(state_SBH, weight_H, inverse_SB1)
        return (state_SBH * inverse_SB1).mul_(weight_H)

    @staticmethod
    def backward(ctx: BackwardCFunction, *gradients_SBH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        state_SBH, weight_H, inverse_SB1 = cast(tuple[torch.Tensor, ...], ctx.saved_tensors)
        wants_state, wants_weight, _ = cast(tuple[bool, bool, bool], ctx.needs_input_grad)
        gradient_SBH, weight_gradient = gradients_SBH[0], None
        normed_SBH = state_SBH * inverse_SB1
        product_SBH = normed_SBH * gradient_SBH
        if wants_weight:
            weight_gradient = product_SBH.sum((0, 1))
        if not wants_state:
            return None, weight_gradient, None
        mean_SB1 = (product_SBH @ weight_H)[..., None].div_(state_SBH.shape[-1])
        state_gradient = torch.mul(gradient_SBH, weight_H, out=product_SBH)
        state_gradient.addcmul_(normed_SBH, mean_SB1, value=-1).mul_(inverse_SB1)
        return state_gradient, weight_gradient, None
