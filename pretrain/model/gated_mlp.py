"""The SwiGLU MLP of a decoder block where there are no fused kernels: gate and up as two products.

Megatron makes one product of twice the width and cuts the result; on a CPU that product takes 5 % longer than two, and
what is then done with halves of rows 2 times as long. Its gradient, written for a compiler, would take fourteen passes.

Shapes: S sequence, B batch, T tokens, H hidden, F MLP width (this rank's part).
"""

from typing import cast

import torch
from megatron.core.transformer.mlp import MLP
from torch.autograd.function import BackwardCFunction

from pretrain.model.tensor_region import enter_tensor_region


class GatedMlp(MLP):
    """Megatron's MLP, parameters and checkpoint keys included, with another forward pass."""

    def forward(self, hidden_SBH: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        """What the MLP adds to the residual stream [S, B, H], and no bias."""
        region_SBH = enter_tensor_region(hidden_SBH, self.config, self.tp_group)
        return self.linear_fc2(_GatedProduct.apply(region_SBH, self.linear_fc1.weight))


class _GatedProduct(torch.autograd.Function):
    """silu(x W_gate) * (x W_up) [S, B, F]; the weight's rows are those of gate, then those of up."""

    @staticmethod
    def forward(ctx: BackwardCFunction, input_SBH: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate_weight, up_weight = weight.chunk(2)
        input_TH = input_SBH.flatten(0, 1)
        gate_TF, up_TF = input_TH @ gate_weight.T, input_TH @ up_weight.T
        ctx.save_for_backward(input_TH, weight, gate_TF, up_TF)
        return (torch.nn.functional.silu(gate_TF) * up_TF).unflatten(0, input_SBH.shape[:2])

    @staticmethod
    def backward(ctx: BackwardCFunction, *gradients_SBF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input_TH, weight, gate_TF, up_TF = cast(tuple[torch.Tensor, ...], ctx.saved_tensors)
        gradient_TF, shape = gradients_SBF[0].flatten(0, 1), gradients_SBF[0].shape[:2]
        gate_gradient_TF = torch.ops.aten.silu_backward(gradient_TF * up_TF, gate_TF)
        up_gradient_TF = gradient_TF * torch.nn.functional.silu(gate_TF)
        gate_weight, up_weight = weight.chunk(2)
        input_gradient = weight_gradient = None
        wants_input, wants_weight = cast(tuple[bool, bool], ctx.needs_input_grad)
        if wants_input:
            input_gradient_TH = torch.addmm(gate_gradient_TF @ gate_weight, up_gradient_TF, up_weight)
            input_gradient = input_gradient_TH.unflatten(0, shape)
        if wants_weight:
            weight_gradient = torch.empty_like(weight)
            for part, rows in zip((gate_gradient_TF, up_gradient_TF), weight_gradient.chunk(2), strict=True):
                torch.mm(part.T, input_TH, out=rows)
        return input_gradient, weight_gradient
