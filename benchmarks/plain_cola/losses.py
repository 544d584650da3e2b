"""The losses of the three stages in plain PyTorch, from docs/method.md.

The last position of a sequence has no next token to read an action from; stages idm and policy leave it out.
Shapes: B batch, S sequence, H hidden, A actions.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks.plain_cola.model import PlainCola
from benchmarks.plain_cola.settings import Stage


class PlainBatch(NamedTuple):
    """One micro-batch."""

    tokens_BS: torch.Tensor
    """Input tokens."""
    labels_BS: torch.Tensor
    """The next token of each position."""
    noise_BSA: torch.Tensor | None
    """Gumbel(0, 1) noise; None: argmax actions. Read by stage idm only."""


def stage_loss(model: PlainCola, stage: Stage, batch: PlainBatch) -> torch.Tensor:
    """Loss of one micro-batch, a scalar in nats."""
    if stage == "base":
        return next_token_losses(model.base_logits(model.hidden(batch.tokens_BS)), batch.labels_BS).mean()
    hidden_BSH = model.hidden(batch.tokens_BS).detach()
    return idm_loss(model, hidden_BSH, batch) if stage == "idm" else policy_loss(model, hidden_BSH)


def idm_loss(model: PlainCola, hidden_BSH: torch.Tensor, batch: PlainBatch) -> torch.Tensor:
    """Next-token loss under the IDM's actions, plus the regulariser."""
    method = model.method
    logits_BSA = shift_to_previous(model.idm_logits(hidden_BSH))
    perturbed_BSA = logits_BSA if batch.noise_BSA is None else logits_BSA + batch.noise_BSA
    relaxed_BSA = torch.softmax(perturbed_BSA / method.temperature, dim=-1)
    chosen_BSA = F.one_hot(perturbed_BSA.argmax(-1), model.sizes.num_actions).float()
    straight_through_BSA = chosen_BSA + relaxed_BSA - relaxed_BSA.detach()
    token_logits_BSV = model.world_logits(hidden_BSH, straight_through_BSA)
    prediction_loss = mean_but_last(next_token_losses(token_logits_BSV, batch.labels_BS))
    if method.regulariser == "token":
        regulariser = mean_but_last(negative_entropy(relaxed_BSA))
    else:
        regulariser = negative_entropy(torch.softmax(logits_BSA, dim=-1)[:, :-1].mean((0, 1)))
    return prediction_loss + method.regulariser_coefficient * regulariser


def policy_loss(model: PlainCola, hidden_BSH: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the policy at t against the IDM's argmax action at t + 1."""
    with torch.no_grad():
        labels_BS = shift_to_previous(model.idm_logits(hidden_BSH)).argmax(-1)
    return mean_but_last(next_token_losses(model.policy_logits(hidden_BSH), labels_BS))


def shift_to_previous(logits_BSA: torch.Tensor) -> torch.Tensor:
    """The IDM's logits of t + 1 at t; the last position keeps its own and counts nowhere."""
    return torch.cat([logits_BSA[:, 1:], logits_BSA[:, -1:]], dim=1)


def mean_but_last(values_BS: torch.Tensor) -> torch.Tensor:
    """Mean over all positions but the last."""
    return values_BS[:, :-1].mean()


def negative_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Sum of p ln p over the last axis; added to a loss it rewards entropy."""
    return (probabilities * torch.log(probabilities + 1e-8)).sum(-1)


def next_token_losses(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [B, S] of each position."""
    return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none").view_as(labels_BS)
