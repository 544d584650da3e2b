"""Laws of the regularisers of pretrain/actions.py: range, sign, last position, gradient over ranks.

Shapes: S sequence, B batch, H input width, A actions.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.actions import token_entropy_regulariser, usage_entropy_regulariser

ACTIONS = 8
Regulariser = Callable[[torch.Tensor], torch.Tensor]


def token_regulariser(logits_SBA: torch.Tensor) -> torch.Tensor:
    """Of the softmax itself as the relaxed sample."""
    return token_entropy_regulariser(torch.softmax(logits_SBA, -1))


def usage_regulariser(logits_SBA: torch.Tensor) -> torch.Tensor:
    """On a single rank."""
    return usage_entropy_regulariser(logits_SBA, lambda local_A: local_A.detach())


REGULARISERS = [token_regulariser, usage_regulariser]


def random_logits(seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    """Logits [6, 3, A]."""
    return torch.randn(6, 3, ACTIONS, generator=torch.Generator().manual_seed(seed)) * scale


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of the last axis, nats."""
    return -torch.xlogy(probabilities, probabilities).sum(-1)


def certain_logits(actions_SB: torch.Tensor) -> torch.Tensor:
    """Logits whose softmax is one-hot in fp32."""
    return 100.0 * torch.nn.functional.one_hot(actions_SB, ACTIONS)


@pytest.mark.parametrize("regulariser", REGULARISERS)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 0.1, 3.0, 1e4]))
def test_a_regulariser_lies_between_minus_the_largest_entropy_and_zero(
    regulariser: Regulariser, seed: int, scale: float
) -> None:
    value = float(regulariser(random_logits(seed, scale)))
    assert -math.log(ACTIONS) - 1e-5 <= value <= 1e-6


def test_values_are_the_mean_negative_entropies_of_their_definition() -> None:
    """token: mean of the entropies; usage: entropy of the mean. The two differ."""
    logits_SBA = random_logits()
    probabilities_SBA = torch.softmax(logits_SBA[:-1], -1)
    token, usage = -entropy(probabilities_SBA).mean(), -entropy(probabilities_SBA.mean((0, 1)))
    torch.testing.assert_close(token_regulariser(logits_SBA), token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(usage_regulariser(logits_SBA), usage, rtol=1e-5, atol=1e-6)
    assert float((token - usage).abs()) > 0.3


def test_certain_choices_that_use_all_actions_are_best_for_usage_and_worst_for_token() -> None:
    """The difference between the two: usage rewards variety over positions, token rewards doubt at each."""
    every_action_SBA = certain_logits(torch.arange(17 * ACTIONS).view(17, ACTIONS) % ACTIONS)
    assert float(usage_regulariser(every_action_SBA)) == pytest.approx(-math.log(ACTIONS), abs=1e-5)
    assert float(token_regulariser(every_action_SBA)) == pytest.approx(0.0, abs=1e-5)
    one_action_SBA = certain_logits(torch.full((17, ACTIONS), 3))
    assert float(usage_regulariser(one_action_SBA)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("regulariser", REGULARISERS)
@pytest.mark.parametrize(("direction", "grows"), [(-1, True), (1, False)])
def test_adding_it_to_the_loss_rewards_entropy(regulariser: Regulariser, direction: int, grows: bool) -> None:
    """A descent step raises the entropy it speaks of; the fault twin, a step the other way, lowers it."""
    logits_SBA = random_logits().requires_grad_()
    (gradient_SBA,) = torch.autograd.grad(regulariser(logits_SBA), logits_SBA)
    moved_SBA = logits_SBA + direction * 5.0 * gradient_SBA

    @torch.no_grad()
    def rewarded_entropy(some_logits_SBA: torch.Tensor) -> float:
        probabilities_SBA = torch.softmax(some_logits_SBA[:-1], -1)
        if regulariser is usage_regulariser:
            return float(entropy(probabilities_SBA.mean((0, 1))))
        return float(entropy(probabilities_SBA).mean())

    change = rewarded_entropy(moved_SBA) - rewarded_entropy(logits_SBA)
    assert abs(change) > 1e-3
    assert (change > 0) == grows


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_the_last_position_plays_no_part(regulariser: Regulariser) -> None:
    logits_SBA = random_logits().requires_grad_()
    changed_SBA = torch.cat([logits_SBA[:-1], random_logits(seed=1)[-1:]])
    assert torch.equal(regulariser(logits_SBA), regulariser(changed_SBA))
    (gradient_SBA,) = torch.autograd.grad(regulariser(logits_SBA), logits_SBA)
    assert not bool(gradient_SBA[-1].any())
    assert bool(gradient_SBA[:-1].any(-1).all())


def inputs_of_rank(rank: int) -> torch.Tensor:
    """Unlike each other, so that the ranks' means differ."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, 3, 4, generator=generator, dtype=torch.float64) + 2.0 * rank


def gradient_averaged_over_ranks(
    weight_HA: torch.Tensor, regulariser_of_rank: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """What data-parallel training applies: each rank's own gradient, averaged."""
    gradients = [torch.autograd.grad(regulariser_of_rank(rank), weight_HA)[0] for rank in (0, 1)]
    return (gradients[0] + gradients[1]) / 2


def weights_and_global_gradient() -> tuple[torch.Tensor, torch.Tensor]:
    """Shared weights, and the gradient of the entropy over the batches of both ranks together."""
    generator = torch.Generator().manual_seed(9)
    weight_HA = torch.randn(4, ACTIONS, generator=generator, dtype=torch.float64).requires_grad_()
    both_SBH = torch.cat([inputs_of_rank(0), inputs_of_rank(1)], dim=1)
    (expected,) = torch.autograd.grad(usage_regulariser(both_SBH @ weight_HA), weight_HA)
    return weight_HA, expected


def test_usage_gradients_averaged_over_ranks_are_those_of_the_global_entropy() -> None:
    weight_HA, expected = weights_and_global_gradient()
    means_A: list[torch.Tensor] = []

    def remember(local_A: torch.Tensor) -> torch.Tensor:
        means_A.append(local_A.detach())
        return means_A[-1]

    for rank in (0, 1):
        usage_entropy_regulariser(inputs_of_rank(rank) @ weight_HA, remember)
    global_A = (means_A[0] + means_A[1]) / 2

    def value_of_rank(rank: int) -> torch.Tensor:
        return usage_entropy_regulariser(inputs_of_rank(rank) @ weight_HA, lambda _: global_A)

    both_SBH = torch.cat([inputs_of_rank(0), inputs_of_rank(1)], dim=1)
    torch.testing.assert_close(value_of_rank(0), usage_regulariser(both_SBH @ weight_HA))
    torch.testing.assert_close(value_of_rank(1), value_of_rank(0))
    found = gradient_averaged_over_ranks(weight_HA, value_of_rank)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fault", ["each rank its own entropy", "half of the gradient"])
def test_other_treatments_of_ranks_give_another_gradient(fault: str) -> None:
    """The fault twins: no mean over ranks, and a mean whose gradient counts the rank's share twice."""
    weight_HA, expected = weights_and_global_gradient()

    def local_mean(rank: int) -> torch.Tensor:
        return torch.softmax(inputs_of_rank(rank) @ weight_HA, -1)[:-1].mean((0, 1))

    def faulty_value(rank: int) -> torch.Tensor:
        if fault == "each rank its own entropy":
            return usage_regulariser(inputs_of_rank(rank) @ weight_HA)
        mean_A = (local_mean(rank) + local_mean(1 - rank).detach()) / 2
        return (mean_A * torch.log(mean_A + 1e-8)).sum()

    found = gradient_averaged_over_ranks(weight_HA, faulty_value)
    assert float((found - expected).norm() / expected.norm()) > 0.1
