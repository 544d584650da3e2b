"""A 64-bit mixing function on integer tensors.

Counter-based randomness needs it (the same noise for a sample wherever it is computed), and so do fingerprints.
"""

import torch

_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # splitmix64's, as signed 64-bit integers
GOLDEN_GAMMA = -7046029254386353131  # odd, so i -> i * GOLDEN_GAMMA visits every 64-bit value


def mix64(values: torch.Tensor) -> torch.Tensor:
    """Scramble int64 `values` by the splitmix64 finaliser, a bijection; same shape, new tensor."""
    values = (values ^ _shift_right(values, 30)) * _MULTIPLIERS[0]
    values = (values ^ _shift_right(values, 27)) * _MULTIPLIERS[1]
    return values ^ _shift_right(values, 31)


def uniform_from_bits(bits: torch.Tensor) -> torch.Tensor:
    """fp32 numbers strictly between 0 and 1 from the top 23 of 64 random `bits`; same shape."""
    return (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's own copies the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
