"""The SwiGLU MLP of a decoder block where there are no fused kernels: gate and up as two products.

Megatron makes one product of twice the width and cuts the result; on a CPU that product takes 5 % longer than two, and
what is then done with halves of rows 2 times as long. Its gradient, written for a compiler, would take fourteen passes.
For the backward pass gate and up are kept, but not what they multiply to, which one pass makes again.

Shapes: S sequence, B batch, T tokens, H hidden, F MLP width (this rank's part).
"""

from typing import cast

import torch
from megatron.core.transformer.mlp import MLP
from torch.autograd.function import BackwardCFunction

from pretrain.cpu_products import gated_product, multiply, multiply_for_weight
from pretrain.model.tensor_region import enter_tensor_region, leave_tensor_region


class GatedMlp(MLP):
    """Megatron's MLP, parameters and checkpoint keys included, with another forward pass."""

    def forward(self, hidden_SBH: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        """What the MLP adds to the residual stream [S, B, H], and no bias."""
        region_SBH = enter_tensor_region(hidden_SBH, self.config, self.tp_group)
        part_SBH = _GatedProducts.apply(region_SBH, self.linear_fc1.weight, self.linear_fc2.weight)
        return leave_tensor_region(part_SBH, self.config, self.tp_group), None


class _GatedProducts(torch.autograd.Function):
    """(silu(x W_gate) * (x W_up)) W_down [S, B, H]; the first weight's rows are those of gate, then those of up."""

    @staticmethod
    def forward(
        ctx: BackwardCFunction, input_SBH: torch.Tensor, weight: torch.Tensor, down_weight: torch.Tensor
    ) -> torch.Tensor:
        gate_weight, up_weight = weight.chunk(2)
        input_TH = input_SBH.flatten(0, 1)
        if any(cast(tuple[bool, bool, bool], ctx.needs_input_grad)):
            gate_TF, up_TF = multiply(input_TH, gate_weight), multiply(input_TH, up_weight)
            ctx.save_for_backward(input_TH, weight, down_weight, gate_TF, up_TF)
            product_TF = torch.nn.functional.silu(gate_TF).mul_(up_TF)
        else:
            product_TF = gated_product(input_TH, gate_weight, up_weight)
        return multiply(product_TF, down_weight).unflatten(0, input_SBH.shape[:2])

    @staticmethod
    def backward(ctx: BackwardCFunction, *gradients_SBH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input_TH, weight, down_weight, gate_TF, up_TF = cast(tuple[torch.Tensor, ...], ctx.saved_tensors)
        wants_input, wants_weight, wants_down = cast(tuple[bool, bool, bool], ctx.needs_input_grad)
        gradient_TH, shape = gradients_SBH[0].flatten(0, 1).contiguous(), gradients_SBH[0].shape[:2]
        input_gradient = weight_gradient = down_gradient = None
        silu_TF = torch.nn.functional.silu(gate_TF)
        if wants_down:
            down_gradient = multiply_for_weight(gradient_TH, silu_TF * up_TF)
        product_gradient_TF = multiply(gradient_TH, down_weight.T)
        up_gradient_TF = silu_TF.mul_(product_gradient_TF)
        gate_gradient_TF = product_gradient_TF.mul_(up_TF)
        torch.ops.aten.silu_backward.grad_input(gate_gradient_TF, gate_TF, grad_input=gate_gradient_TF)
        gate_weight, up_weight = weight.chunk(2)
        if wants_input:
            input_gradient_TH = multiply(gate_gradient_TF, gate_weight.T)
            input_gradient_TH += multiply(up_gradient_TF, up_weight.T)
            input_gradient = input_gradient_TH.unflatten(0, shape)
        if wants_weight:
            weight_gradient = torch.empty_like(weight)
            for part, rows in zip((gate_gradient_TF, up_gradient_TF), weight_gradient.chunk(2), strict=True):
                torch.mm(part.T, input_TH, out=rows)
        return input_gradient, weight_gradient, down_gradient
