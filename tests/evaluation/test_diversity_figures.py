"""Self-BLEU and distinct-n on cases small enough to count by hand."""

import pytest

from evaluation.diversity_figures import distinct_n, diversity, self_bleu


def test_equal_continuations_have_self_bleu_one() -> None:
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)


def test_unrelated_continuations_have_self_bleu_zero() -> None:
    assert self_bleu([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]) == 0


def test_self_bleu_counted_by_hand() -> None:
    # 5 of 6 tokens, 4 of 5 pairs, 3 of 4 triples and 2 of 3 quadruples are in the other; lengths are equal.
    expected = (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert self_bleu([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 9]]) == pytest.approx(expected)


def test_more_alike_means_more_self_bleu() -> None:
    alike = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 9]]
    apart = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 13, 14, 15, 16, 17, 9]]
    assert self_bleu(alike) > self_bleu(apart) > 0


def test_distinct_counts_over_all_continuations() -> None:
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 1) == pytest.approx(4 / 6)
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct_n([[7, 7, 7, 7]], 1) == pytest.approx(1 / 4)


def test_figures_are_means_over_prompts() -> None:
    same, different = [[1, 2, 3, 4]] * 2, [[1, 2, 3, 4], [5, 6, 7, 8]]
    figures = diversity([same, different])
    assert figures.self_bleu == pytest.approx(0.5)
    assert figures.distinct_1 == pytest.approx((0.5 + 1) / 2)
    assert figures.distinct_2 == pytest.approx((0.5 + 1) / 2)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1"):
        self_bleu([[1, 2, 3]])
    with pytest.raises(ValueError, match="2 tokens"):
        distinct_n([[1], [2]], 2)
