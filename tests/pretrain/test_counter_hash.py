"""mix64 is splitmix64's finaliser, a bijection; uniforms are strictly between 0 and 1 and uncorrelated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.counter_hash import GOLDEN_GAMMA, mix64, uniform_from_bits

# Outputs published with splitmix64 for the seeds 0 and 1234567.
SPLITMIX64 = {
    0: [16294208416658607535, 7960286522194355700, 487617019471545679],
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
}
INT64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)


def weyl_sequence(length: int, seed: int = 0) -> torch.Tensor:
    """The counters splitmix64 scrambles: seed + i * golden gamma, i from 1."""
    return seed + torch.arange(1, length + 1) * GOLDEN_GAMMA


def unmix64(value: int) -> int:
    """Inverse of splitmix64's finaliser on unsigned integers, derived from its definition."""
    for shift, multiplier in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9)):
        value = undo_xor_shift(value, shift) * pow(multiplier, -1, 2**64) % 2**64
    return undo_xor_shift(value, 30)


def undo_xor_shift(value: int, shift: int) -> int:
    """The x with x ^ (x >> shift) == value."""
    result = value
    for _ in range(64 // shift):
        result = value ^ (result >> shift)
    return result


def lag_correlation(values: torch.Tensor, lag: int) -> float:
    """Correlation of a sequence with itself `lag` places on."""
    return float(torch.corrcoef(torch.stack([values[:-lag], values[lag:]]).double())[0, 1])


@pytest.mark.parametrize("seed", SPLITMIX64)
def test_mix_of_the_weyl_sequence_is_splitmix64(seed: int) -> None:
    unsigned = [value % 2**64 for value in mix64(weyl_sequence(3, seed)).tolist()]
    assert unsigned == SPLITMIX64[seed]


@settings(deadline=None, max_examples=50)
@given(st.lists(INT64, min_size=1, max_size=50))
def test_mix_has_an_inverse(values: list[int]) -> None:
    """So distinct inputs have distinct outputs, over all of int64."""
    mixed = mix64(torch.tensor(values)).tolist()
    assert [unmix64(value % 2**64) for value in mixed] == [value % 2**64 for value in values]


def test_the_inverse_notices_a_shift_that_copies_the_sign() -> None:
    """The fault twin: torch's own shift on negative numbers is another function."""
    values = torch.tensor([-1, -(2**62), -12345])
    faulty = (values ^ (values >> 30)) * -4658895280553007687
    faulty = (faulty ^ (faulty >> 27)) * -7723592293110705685
    faulty = faulty ^ (faulty >> 31)
    assert all(
        unmix64(mixed % 2**64) != value % 2**64
        for mixed, value in zip(faulty.tolist(), values.tolist(), strict=True)
    )


@settings(deadline=None, max_examples=20)
@given(first=INT64, step=st.sampled_from([1, 2, 2**32, GOLDEN_GAMMA]))
def test_many_distinct_inputs_stay_distinct(first: int, step: int) -> None:
    inputs = torch.arange(10_000) * step + first
    assert mix64(inputs).unique().numel() == 10_000


@settings(deadline=None, max_examples=30)
@given(st.integers(min_value=0, max_value=63))
def test_one_input_bit_moves_half_of_the_output_bits(bit: int) -> None:
    values = weyl_sequence(500)
    flipped = values ^ torch.tensor(1 << bit if bit < 63 else -(2**63))
    difference = (mix64(values) ^ mix64(flipped)).tolist()
    moved = sum((value % 2**64).bit_count() for value in difference) / len(difference)
    assert 30.5 < moved < 33.5


def test_mix_leaves_its_input_and_shape_alone() -> None:
    values = torch.arange(6).view(2, 3)
    assert mix64(values).shape == (2, 3)
    assert torch.equal(values, torch.arange(6).view(2, 3))


@settings(deadline=None, max_examples=50)
@given(st.lists(INT64, min_size=1, max_size=50))
def test_uniforms_are_strictly_inside_the_unit_interval(bits: list[int]) -> None:
    uniforms = uniform_from_bits(torch.tensor([*bits, 0, -1, -(2**63), 2**63 - 1]))
    assert uniforms.dtype == torch.float32
    assert bool((uniforms > 0).all()) and bool((uniforms < 1).all())
    assert bool(torch.isfinite(torch.log(uniforms)).all()) and bool((torch.log(uniforms) < 0).all())


def test_uniforms_use_the_whole_interval_evenly() -> None:
    """The outermost values, the moments, and the largest distance from the uniform distribution function."""
    assert float(uniform_from_bits(torch.tensor(0))) == 2.0**-24
    assert float(uniform_from_bits(torch.tensor(-1))) == 1 - 2.0**-24
    count = 200_000
    uniforms = uniform_from_bits(mix64(weyl_sequence(count))).double().sort().values
    distance = (uniforms - (torch.arange(count) + 0.5) / count).abs().max()
    assert float(distance) < 2 / count**0.5


def test_neighbouring_counters_are_uncorrelated() -> None:
    count = 200_000
    uniforms = uniform_from_bits(mix64(weyl_sequence(count)))
    plain_counters = uniform_from_bits(mix64(torch.arange(count)))
    for lag in (1, 2, 3, 64):
        assert abs(lag_correlation(uniforms, lag)) < 5 / count**0.5
        assert abs(lag_correlation(plain_counters, lag)) < 5 / count**0.5


def test_counters_that_are_not_mixed_are_correlated() -> None:
    """The fault twin of the test above: a golden-ratio sequence has correlation -0.42 with its neighbour."""
    assert lag_correlation(uniform_from_bits(weyl_sequence(10_000)), 1) < -0.3
