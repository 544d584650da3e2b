"""From IDM logits to discrete actions: noise, straight-through one-hot, shift, regularisers.

Everything is fp32. Shapes: S sequence, B batch, A actions.
Sources: paper section 3.1, equations 2-3 and algorithm 1; the temperature is the released code's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from pretrain.counter_hash import GOLDEN_GAMMA, mix64, uniform_from_bits


class ActionChoice(NamedTuple):
    """Actions with the gradient path back to the logits they came from."""

    one_hot_SBA: torch.Tensor
    """Forward value exactly one-hot; gradients flow through `relaxed_SBA`."""
    relaxed_SBA: torch.Tensor
    """The softmax the gradient sees."""


def shift_to_previous(idm_logits_SBA: torch.Tensor) -> torch.Tensor:
    """Give position t the logits read at t+1, where the IDM has seen the token to be predicted.

    The last position keeps its own: it has no next token, and `masked_mean` leaves it out of every loss.
    """
    return torch.cat([idm_logits_SBA[1:], idm_logits_SBA[-1:]])


def masked_mean(values_SB: torch.Tensor) -> torch.Tensor:
    """Mean over all positions but the last, which has no next token; a scalar."""
    return values_SB[:-1].mean()


def gumbel_noise(
    seed: int, sample_index_B: torch.Tensor, sequence_length: int, num_actions: int
) -> torch.Tensor:
    """Gumbel(0, 1) noise [S, B, A], a pure function of seed, sample, position and action.

    So the same sample gets the same noise on every layout of ranks and after every resume.
    """
    device = sample_index_B.device
    state_B = mix64(mix64(sample_index_B.long()) + seed * GOLDEN_GAMMA % 2**63)
    state_SB = mix64(state_B + torch.arange(1, sequence_length + 1, device=device)[:, None] * GOLDEN_GAMMA)
    bits_SBA = mix64(state_SB[..., None] + torch.arange(1, num_actions + 1, device=device) * GOLDEN_GAMMA)
    return -torch.log(-torch.log(uniform_from_bits(bits_SBA)))


def straight_through_one_hot(
    logits_SBA: torch.Tensor, noise_SBA: torch.Tensor | None, temperature: float
) -> ActionChoice:
    """Choose one action a position; `noise_SBA` None gives the argmax (evaluation)."""
    perturbed_SBA = logits_SBA.float() if noise_SBA is None else logits_SBA.float() + noise_SBA
    relaxed_SBA = torch.softmax(perturbed_SBA / temperature, dim=-1)
    hard_SBA = torch.nn.functional.one_hot(perturbed_SBA.argmax(-1), logits_SBA.shape[-1]).to(relaxed_SBA)
    return ActionChoice(hard_SBA + (relaxed_SBA - relaxed_SBA.detach()), relaxed_SBA)


def token_entropy_regulariser(relaxed_SBA: torch.Tensor) -> torch.Tensor:
    """Mean negative entropy of the relaxed samples, in [-ln A, 0]; adding it to a loss rewards entropy."""
    return masked_mean((relaxed_SBA * torch.log(relaxed_SBA + 1e-8)).sum(-1))


def usage_entropy_regulariser(
    logits_SBA: torch.Tensor, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Negative entropy of the mean action distribution of this micro-batch over all data-parallel ranks.

    `mean_over_ranks` averages a detached tensor. The gradient treats the rank's own mean as if it were the whole
    mean: gradients are averaged over ranks afterwards, so together they are the gradient of the global entropy.
    """
    probabilities_SBA = torch.softmax(logits_SBA.float(), dim=-1)
    positions = (logits_SBA.shape[0] - 1) * logits_SBA.shape[1]
    local_A = probabilities_SBA[:-1].sum((0, 1)) / positions
    usage_A = local_A + (mean_over_ranks(local_A) - local_A).detach()
    return (usage_A * torch.log(usage_A + 1e-8)).sum()
