"""Laws of choosing actions: exact one-hots with soft gradients, samples of the softmax, noise, shift.

The regularisers have their own file, test_regularisers.py. Shapes: S sequence, B batch, A actions.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.actions import (
    gumbel_noise,
    masked_mean,
    shift_to_previous,
    straight_through_one_hot,
)

EULER_GAMMA = 0.5772156649
TEMPERATURES = [0.5, 2.0, 50.0]


def random_tensor(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def gradient(function_of_logits: torch.Tensor, logits_SBA: torch.Tensor) -> torch.Tensor:
    """Gradient of a scalar."""
    return torch.autograd.grad(function_of_logits, logits_SBA)[0]


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.01, *TEMPERATURES, 1e4]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
)
def test_forward_value_is_exactly_one_hot(seed: int, temperature: float, scale: float) -> None:
    """To the last bit, at the largest perturbed logit, for every temperature and size of logits."""
    logits_SBA, noise_SBA = (
        random_tensor(5, 3, 8, seed=seed, scale=scale),
        gumbel_noise(seed, torch.arange(3), 5, 8),
    )
    choice = straight_through_one_hot(logits_SBA.requires_grad_(), noise_SBA, temperature)
    largest_SB = (logits_SBA + noise_SBA).argmax(-1)
    assert torch.equal(choice.one_hot_SBA, torch.nn.functional.one_hot(largest_SB, 8).float())
    assert torch.equal(choice.relaxed_SBA, torch.softmax((logits_SBA + noise_SBA) / temperature, -1))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_is_that_of_the_relaxed_softmax(temperature: float) -> None:
    logits_SBA, weights_SBA = random_tensor(5, 3, 8).requires_grad_(), random_tensor(5, 3, 8, seed=1)
    noise_SBA = gumbel_noise(7, torch.arange(3), 5, 8)
    choice = straight_through_one_hot(logits_SBA, noise_SBA, temperature)
    found = gradient((choice.one_hot_SBA * weights_SBA).sum(), logits_SBA)
    soft_SBA = torch.softmax((logits_SBA + noise_SBA) / temperature, -1)
    torch.testing.assert_close(found, gradient((soft_SBA * weights_SBA).sum(), logits_SBA))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_other_gradients_are_far_off(temperature: float) -> None:
    """The fault twins: the softmax without its temperature, and without the noise."""
    logits_SBA, weights_SBA = random_tensor(5, 3, 8).requires_grad_(), random_tensor(5, 3, 8, seed=1)
    noise_SBA = gumbel_noise(7, torch.arange(3), 5, 8)
    choice = straight_through_one_hot(logits_SBA, noise_SBA, temperature)
    found = gradient((choice.one_hot_SBA * weights_SBA).sum(), logits_SBA)
    for soft_SBA in (
        torch.softmax(logits_SBA + noise_SBA, -1),
        torch.softmax(logits_SBA / temperature, -1),
    ):
        faulty = gradient((soft_SBA * weights_SBA).sum(), logits_SBA)
        assert float((faulty - found).norm() / found.norm()) > 0.01


def test_without_noise_the_action_is_the_argmax() -> None:
    logits_SBA = random_tensor(5, 3, 8)
    for temperature in TEMPERATURES:
        choice = straight_through_one_hot(logits_SBA, None, temperature)
        assert torch.equal(choice.one_hot_SBA.argmax(-1), logits_SBA.argmax(-1))


def test_choices_are_made_in_fp32() -> None:
    """bf16 logits choose as their fp32 values do: noise is not rounded to bf16, where it would tie."""
    logits_SBA = random_tensor(5, 3, 8).bfloat16()
    noise_SBA = gumbel_noise(7, torch.arange(3), 5, 8)
    choice, exact = (straight_through_one_hot(x, noise_SBA, 2.0) for x in (logits_SBA, logits_SBA.float()))
    assert choice.one_hot_SBA.dtype == torch.float32
    assert torch.equal(choice.one_hot_SBA, exact.one_hot_SBA)
    assert torch.equal(choice.relaxed_SBA, exact.relaxed_SBA)


def distance_of_samples(perturbed_SBA: torch.Tensor, probabilities_A: torch.Tensor) -> float:
    """Total variation distance between how often each action is the largest and its probability."""
    counts_A = torch.bincount(perturbed_SBA.argmax(-1).flatten(), minlength=probabilities_A.numel())
    return float((counts_A / counts_A.sum() - probabilities_A).abs().sum() / 2)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_samples_are_distributed_as_the_softmax(temperature: float) -> None:
    """Whatever the temperature, which shapes only gradients. Sampling noise alone gives about 0.005."""
    logits_A = torch.tensor([0.0, -1.0, 2.0, 1.0, -3.0, 0.5, 1.5, -0.5])
    noise_SBA = gumbel_noise(3, torch.arange(400), 100, 8)
    samples_SBA = straight_through_one_hot(logits_A.expand(100, 400, 8), noise_SBA, temperature).one_hot_SBA
    assert distance_of_samples(samples_SBA, torch.softmax(logits_A, 0)) < 0.015


@pytest.mark.parametrize("temperature", [0.5, 50.0])
def test_noise_added_after_the_temperature_gives_another_distribution(temperature: float) -> None:
    """The fault twin: argmax(logits / temperature + noise) follows the tempered softmax."""
    logits_A = torch.tensor([0.0, -1.0, 2.0, 1.0, -3.0, 0.5, 1.5, -0.5])
    noise_SBA = gumbel_noise(3, torch.arange(400), 100, 8)
    assert distance_of_samples(logits_A / temperature + noise_SBA, torch.softmax(logits_A, 0)) > 0.15


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_noise_is_a_function_of_seed_sample_position_and_action(seed: int, data: st.DataObject) -> None:
    """Splitting, reordering or repeating the batch, or cutting sequence or action set, moves nothing."""
    samples_B = torch.tensor(data.draw(st.lists(st.integers(0, 2**40), min_size=2, max_size=6)))
    whole_SBA = gumbel_noise(seed, samples_B, 7, 5)
    cut = data.draw(st.integers(1, len(samples_B) - 1))
    parts = [gumbel_noise(seed, part_B, 7, 5) for part_B in (samples_B[:cut], samples_B[cut:])]
    assert torch.equal(torch.cat(parts, dim=1), whole_SBA)
    order = torch.tensor(data.draw(st.permutations(range(len(samples_B)))))
    assert torch.equal(gumbel_noise(seed, samples_B[order], 7, 5), whole_SBA[:, order])
    assert torch.equal(gumbel_noise(seed, samples_B, 4, 3), whole_SBA[:4, :, :3])


def test_noise_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = gumbel_noise(3, torch.arange(2), 4, 8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(gumbel_noise(3, torch.arange(2), 4, 8), first)


def test_no_two_places_share_their_noise() -> None:
    """Every (seed, sample, position) has its own row of 64 numbers; no action's column repeats another's."""
    noise = torch.stack([gumbel_noise(seed, torch.arange(20), 30, 64) for seed in (0, 1, 2, 42, 43)])
    rows = noise.view(-1, 64)
    assert len(rows.unique(dim=0)) == 5 * 20 * 30
    assert float((rows[1:] == rows[:-1]).float().mean()) < 1e-4
    assert len(rows.T.unique(dim=0)) == 64


def test_seed_plus_sample_is_not_what_counts() -> None:
    """Sample 1 of seed 0 is not sample 0 of seed 1, nor does one sample's noise run on in the next."""
    noise = {seed: gumbel_noise(seed, torch.arange(4), 50, 8) for seed in (0, 1)}
    assert not bool(torch.isclose(noise[0][:, 1], noise[1][:, 0]).all(-1).any())
    assert not bool(torch.isclose(noise[0][1:, 0], noise[0][:-1, 1]).all(-1).any())
    assert not bool(torch.isclose(noise[0][..., 1:], noise[0][..., :-1]).all(-1).any())


def distance_from_gumbel(noise: torch.Tensor) -> float:
    """Largest distance from the distribution function exp(-exp(-x)) (Kolmogorov and Smirnov)."""
    ordered = noise.flatten().double().sort().values
    expected = torch.exp(-torch.exp(-ordered))
    return float((expected - (torch.arange(ordered.numel()) + 0.5) / ordered.numel()).abs().max())


def test_noise_is_standard_gumbel() -> None:
    """Mean Euler's gamma, variance pi^2 / 6, and the whole distribution function; always finite."""
    noise_SBA = gumbel_noise(42, torch.arange(64), 64, 64)
    count = noise_SBA.numel()
    assert bool(torch.isfinite(noise_SBA).all())
    assert abs(float(noise_SBA.mean()) - EULER_GAMMA) < 5 * 1.2825 / count**0.5
    assert abs(float(noise_SBA.var()) - torch.pi**2 / 6) < 0.025
    assert distance_from_gumbel(noise_SBA) < 2 / count**0.5


@pytest.mark.parametrize("fault", ["negated", "narrower", "exponential"])
def test_other_noise_is_not_gumbel(fault: str) -> None:
    """The fault twins: the wrong sign, 1 % too narrow, one logarithm forgotten."""
    noise_SBA = gumbel_noise(42, torch.arange(64), 64, 64)
    faulty = {"negated": -noise_SBA, "narrower": 0.99 * noise_SBA, "exponential": torch.exp(-noise_SBA)}
    assert distance_from_gumbel(faulty[fault]) > 2 / noise_SBA.numel() ** 0.5


@pytest.mark.parametrize("neighbour", ["position", "sample", "action", "seed"])
def test_noise_of_neighbours_is_uncorrelated(neighbour: str) -> None:
    noise = torch.stack([gumbel_noise(seed, torch.arange(32), 32, 64) for seed in (5, 6)])
    axis = {"seed": 0, "position": 1, "sample": 2, "action": 3}[neighbour]
    first, second = noise.narrow(axis, 0, noise.shape[axis] - 1), noise.narrow(axis, 1, noise.shape[axis] - 1)
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(float(correlation)) < 5 / first.numel() ** 0.5


def test_the_action_at_a_position_is_read_one_token_later() -> None:
    """And the last position, which has no later token, keeps its own."""
    logits_SBA = random_tensor(6, 2, 4)
    shifted_SBA = shift_to_previous(logits_SBA)
    for position in range(5):
        assert torch.equal(shifted_SBA[position], logits_SBA[position + 1])
    assert torch.equal(shifted_SBA[5], logits_SBA[5])
    wrong_way_SBA = torch.cat([logits_SBA[:1], logits_SBA[:-1]])
    assert not bool((shifted_SBA[:-1] == wrong_way_SBA[:-1]).any())


def test_a_token_is_read_by_the_position_before_it_and_by_no_other() -> None:
    """Gradient of each shifted position with respect to the logits: one position, the next one."""
    logits_SBA = random_tensor(6, 2, 4).requires_grad_()
    for position in range(5):
        reads_S = gradient(shift_to_previous(logits_SBA)[position].sum(), logits_SBA).abs().sum((1, 2))
        assert reads_S.nonzero().flatten().tolist() == [position + 1]


@settings(deadline=None, max_examples=30)
@given(sequence_length=st.integers(2, 9), batch=st.integers(1, 4), seed=st.integers(0, 1000))
def test_masked_mean_leaves_out_the_last_position(sequence_length: int, batch: int, seed: int) -> None:
    """It is the mean of the others, and the last one has no gradient."""
    values_SB = random_tensor(sequence_length, batch, seed=seed).requires_grad_()
    mean = masked_mean(values_SB)
    torch.testing.assert_close(mean, values_SB[:-1].mean())
    gradient_SB = gradient(mean, values_SB)
    expected_SB = torch.full_like(values_SB, 1 / ((sequence_length - 1) * batch))
    expected_SB[-1] = 0
    torch.testing.assert_close(gradient_SB, expected_SB)
    with torch.no_grad():
        values_SB[-1] = torch.nan
    assert torch.isfinite(masked_mean(values_SB)), "what stands at the last position must not matter at all"
    assert not torch.isclose(mean, values_SB.mean())
