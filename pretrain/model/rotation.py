"""Rotary positions where there is no GPU: turning queries and keys with few passes over them.

Shapes: S sequence, B batch, N heads, D head size.
"""

from typing import cast

import torch
from torch.autograd.function import BackwardCFunction

from pretrain.cpu_products import is_fast


def rotate(heads_SBND: torch.Tensor, angles: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """Stands in for Megatron's function, which takes cosines and sines anew for queries and keys of every block.

    Turns each pair of channels d and d + D/2 by its angle [S, 1, 1, D]. While a CPU trains, in two passes and into
    attention's order; else rounded as in other implementations.
    """
    assert angles.shape[-1] == heads_SBND.shape[-1], "every channel of a head is turned"
    tables = getattr(angles, "tables", None)
    if tables is None:  # one tensor of angles serves all blocks of a stack
        tables = angles.tables = angles.cos(), angles.sin()  # type: ignore[attr-defined]
    if is_fast(heads_SBND):
        return _Rotation.apply(heads_SBND, *tables)
    cosine, sine = (table.to(heads_SBND.dtype) for table in tables)
    first, second = heads_SBND.chunk(2, -1)
    return heads_SBND * cosine + torch.cat((-second, first), -1) * sine


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: BackwardCFunction, heads_SBND: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        output_BSND = torch.empty_like(heads_SBND.transpose(0, 1), memory_format=torch.contiguous_format)
        return _turn(heads_SBND, cosine, sine, output_BSND.transpose(0, 1))

    @staticmethod
    def backward(ctx: BackwardCFunction, *gradients_SBND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cosine, sine = cast(tuple[torch.Tensor, torch.Tensor], ctx.saved_tensors)
        output_SBND = torch.empty_like(gradients_SBND[0], memory_format=torch.contiguous_format)
        return _turn(gradients_SBND[0], cosine, -sine, output_SBND), None, None


def _turn(
    heads_SBND: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, output_SBND: torch.Tensor
) -> torch.Tensor:
    """Into `output_SBND`; the two halves of `cosine` and `sine` are alike."""
    torch.mul(heads_SBND, cosine, out=output_SBND)
    (first, second), (to_first, to_second) = heads_SBND.chunk(2, -1), output_SBND.chunk(2, -1)
    half_sine, _ = sine.chunk(2, -1)
    to_first.addcmul_(second, half_sine, value=-1)
    to_second.addcmul_(first, half_sine)
    return output_SBND
