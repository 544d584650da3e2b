"""Products with weights where there is no GPU: oneDNN's instead of MKL's, while a run trains.

On a processor of AMD with AVX-512, oneDNN's takes 10 to 20 % less time forward and for the input's gradient. For the
weight's gradient it takes more, but of a layer that narrows by half and more (docs/benchmarks.md). torch itself would
only take oneDNN for lower precisions; what it offers is the operator that its compiler uses. oneDNN rounds otherwise,
and over long rows twice as much, so whatever compares a model with another library's computes with MKL, as that does.

Shapes: T tokens, I input size, O output size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch.autograd.function import BackwardCFunction

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_fast = False


@contextmanager
def fast_on_cpu() -> Iterator[None]:
    """Compute in the fastest way, though other libraries round otherwise; as before afterwards."""
    global _fast
    before, _fast = _fast, True
    try:
        yield
    finally:
        _fast = before


def is_fast(tensor: torch.Tensor) -> bool:
    """Whether what is computed from `tensor` may be computed in ways that are faster in fp32 on a CPU."""
    return _fast and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def multiply(input_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """input times the weight's transpose [T, O], by the faster library; not known to autograd."""
    if not _onednn_takes(input_TI):
        return input_TI @ weight_OI.T
    return torch.ops.mkldnn._linear_pointwise(input_TI, weight_OI, None, "none", [], "")


def multiply_for_weight(gradient_TO: torch.Tensor, input_TI: torch.Tensor) -> torch.Tensor:
    """The weight's gradient [O, I] from the output's and the input, by the faster library."""
    if input_TI.shape[1] < 2 * gradient_TO.shape[1] or not _onednn_takes(input_TI):
        return gradient_TO.T @ input_TI
    return torch.ops.mkldnn._linear_pointwise(gradient_TO.T, input_TI.T, None, "none", [], "")


def gated_product(input_TI: torch.Tensor, gate_OI: torch.Tensor, up_OI: torch.Tensor) -> torch.Tensor:
    """silu(input gate) * (input up) [T, O], in two passes of which nothing is kept; not known to autograd."""
    if not _onednn_takes(input_TI):
        gate_TO = torch.nn.functional.silu(input_TI @ gate_OI.T, inplace=True)
        return gate_TO.mul_(input_TI @ up_OI.T)
    gate_TO = torch.ops.mkldnn._linear_pointwise(input_TI, gate_OI, None, "swish", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(input_TI, gate_TO, up_OI, None, "mul")


def _onednn_takes(input_TI: torch.Tensor) -> bool:
    return _HAS_ONEDNN and is_fast(input_TI)


def product(input_SBI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """input times the weight's transpose [S, B, O]; keeps of both only what the backward pass needs."""
    if input_SBI.stride(0) < input_SBI.stride(1):  # attention's order: multiplied as it lies, not copied
        return product(input_SBI.transpose(0, 1), weight_OI).transpose(0, 1).contiguous()
    return _Product.apply(input_SBI.flatten(0, -2), weight_OI).unflatten(0, input_SBI.shape[:-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: BackwardCFunction, input_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        wants_input, wants_weight = cast(tuple[bool, bool], ctx.needs_input_grad)
        kept = (input_TI if wants_weight else None, weight_OI if wants_input else None)
        ctx.save_for_backward(*cast(tuple[torch.Tensor, torch.Tensor], kept))
        return multiply(input_TI, weight_OI)

    @staticmethod
    def backward(ctx: BackwardCFunction, *gradients_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input_TI, weight_OI = cast(tuple[torch.Tensor | None, torch.Tensor | None], ctx.saved_tensors)
        gradient_TO = gradients_TO[0].contiguous()
        input_gradient = None if weight_OI is None else multiply(gradient_TO, weight_OI.T)
        weight_gradient = None if input_TI is None else multiply_for_weight(gradient_TO, input_TI)
        return input_gradient, weight_gradient
