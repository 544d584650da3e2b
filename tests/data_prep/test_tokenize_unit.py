"""The held-out slice has the wanted size."""

from data_prep.tokenize_unit import is_held_out


def test_held_out_share() -> None:
    held_out = sum(is_held_out(str(number).encode(), 0.03) for number in range(20_000))
    assert 500 < held_out < 700
