"""Turning heads in two passes is turning them, gradients included, and comes in attention's order.

Shapes: S sequence, B batch, N heads, D head size.
"""

import pytest
import torch

from pretrain.cpu_products import fast_on_cpu
from pretrain.model.rotation import _Rotation, rotate

S, B, N, D = 5, 3, 2, 8


def angles(sign: float = 1.0) -> torch.Tensor:
    """Of each position and pair of channels [S, 1, 1, D]."""
    half = torch.outer(torch.arange(S, dtype=torch.float32), 1.0 / torch.tensor([1.0, 3.0, 9.0, 27.0]))
    return sign * torch.cat((half, half), -1)[:, None, None]


def heads() -> torch.Tensor:
    """A part of a wider tensor, as Megatron hands them over."""
    return torch.randn(S, B, N, 2 * D, generator=torch.Generator().manual_seed(3))[..., :D]


def turned_as_complex_numbers(heads_SBND: torch.Tensor, angles_S11D: torch.Tensor) -> torch.Tensor:
    """Channels d and d + D/2 are a number's real and imaginary part."""
    numbers = torch.complex(*heads_SBND.chunk(2, -1)) * torch.exp(1j * angles_S11D[..., : D // 2])
    return torch.cat((numbers.real, numbers.imag), -1)


@pytest.mark.parametrize("fast", [True, False])
def test_heads_are_turned_by_their_angles(fast: bool) -> None:
    """And gradients back; the twin, turned the other way, is another."""
    gradient_SBND = torch.randn(S, B, N, D, generator=torch.Generator().manual_seed(4))
    wanted_heads, found_heads = (heads().requires_grad_() for _ in range(2))
    wanted_SBND = turned_as_complex_numbers(wanted_heads, angles())
    wanted_SBND.backward(gradient_SBND)
    if fast:
        with fast_on_cpu():
            found_SBND = rotate(found_heads, angles())
        assert found_SBND.transpose(0, 1).is_contiguous(), "a sample's rows one after another"
    else:
        found_SBND = rotate(found_heads, angles())
    found_SBND.backward(gradient_SBND)
    torch.testing.assert_close(found_SBND, wanted_SBND)
    torch.testing.assert_close(found_heads.grad, wanted_heads.grad)
    assert not torch.allclose(turned_as_complex_numbers(heads(), angles(-1.0)), found_SBND)


def test_the_gradient_is_that_of_finite_differences() -> None:
    tables = angles().double().cos(), angles().double().sin()
    assert torch.autograd.gradcheck(lambda x: _Rotation.apply(x, *tables), heads().double().requires_grad_())


def test_angles_that_leave_channels_out_are_refused() -> None:
    with pytest.raises(AssertionError, match="every channel"):
        rotate(heads(), angles()[..., : D // 2])
