"""The held-out figures equal what their definitions say, computed the long way."""

import math

import pytest
import torch

from evaluation.held_out_figures import (
    HeldOutFigures,
    kl_divergence,
    measure,
    plan_chunks,
    random_actions,
    score_positions,
    usage_perplexity,
)
from evaluation.huggingface_model import ExportedModel
from tests.checkpoint_tools.random_cola import random_tokens
from tests.evaluation.known_cola import KnownCola
from tests.evaluation.tiny_demo import NUM_ACTIONS, WORDS

# N blocks, B batch, S sequence, C = S-1 positions, V vocabulary, A actions.
VOCAB_SIZE = len(WORDS) + 2
BLOCK_TOKENS = 12
SMALL_CHUNK_GIB = BLOCK_TOKENS * VOCAB_SIZE * 4 * 3 / 1024**3  # three actions at once, one block
LARGE_CHUNK_GIB = 1.0
LOSSES = ("base_loss", "idm_loss", "mixture_loss", "greedy_loss", "random_loss")


@pytest.fixture(scope="module")
def blocks() -> dict[str, torch.Tensor]:
    tokens_NS = random_tokens(5, BLOCK_TOKENS, seed=3, vocab_size=VOCAB_SIZE)
    return {"first": tokens_NS[:3], "second": tokens_NS[3:]}


@pytest.fixture(scope="module")
def figures(exported: ExportedModel, blocks: dict[str, torch.Tensor]) -> HeldOutFigures:
    return measure(exported.model, blocks, chunk_gib=SMALL_CHUNK_GIB, seed=0, progress=False)


def next_token_loss(log_probs_BSV: torch.Tensor, tokens_BS: torch.Tensor) -> float:
    """Mean over t <= S-2 of -log p(token t+1), one position at a time."""
    total = [
        -log_probs_BSV[b, t, tokens_BS[b, t + 1]].item()
        for b in range(tokens_BS.shape[0])
        for t in range(tokens_BS.shape[1] - 1)
    ]
    return sum(total) / len(total)


@torch.no_grad()
def mixture_log_probs(
    exported: ExportedModel, tokens_BS: torch.Tensor, weights_BSA: torch.Tensor
) -> torch.Tensor:
    worlds = [
        exported.model.forward_world_model(tokens_BS, k).double().log_softmax(-1) for k in range(NUM_ACTIONS)
    ]
    return torch.logsumexp(torch.stack(worlds, dim=2) + weights_BSA.double().log().unsqueeze(-1), dim=2)


@torch.no_grad()
def test_mixture_equals_a_sum_over_every_action(
    exported: ExportedModel, blocks: dict[str, torch.Tensor], figures: HeldOutFigures
) -> None:
    tokens_NS = torch.cat(list(blocks.values()))
    policy_BSA = exported.model.policy_logits(tokens_NS).softmax(-1)
    mixture = mixture_log_probs(exported, tokens_NS, policy_BSA)
    base = exported.model.base_logits(tokens_NS).double().log_softmax(-1)
    assert figures.mixture_loss == pytest.approx(next_token_loss(mixture, tokens_NS), rel=1e-4)
    kl_mixture_base = (mixture.exp() * (mixture - base)).sum(-1)[:, :-1].mean().item()
    kl_base_mixture = (base.exp() * (base - mixture)).sum(-1)[:, :-1].mean().item()
    assert figures.kl_mixture_base == pytest.approx(kl_mixture_base, rel=1e-4)
    assert figures.kl_base_mixture == pytest.approx(kl_base_mixture, rel=1e-4)

    # The fault that this would miss least: actions weighted alike instead of by the policy.
    evenly = mixture_log_probs(exported, tokens_NS, torch.full_like(policy_BSA, 1 / NUM_ACTIONS))
    assert figures.mixture_loss != pytest.approx(next_token_loss(evenly, tokens_NS), rel=1e-2)


@torch.no_grad()
def test_losses_are_over_the_positions_that_have_a_next_token(
    exported: ExportedModel, blocks: dict[str, torch.Tensor], figures: HeldOutFigures
) -> None:
    tokens_NS = torch.cat(list(blocks.values()))
    model = exported.model
    assert figures.tokens == tokens_NS.shape[0] * (BLOCK_TOKENS - 1)
    base = model.base_logits(tokens_NS).log_softmax(-1)
    assert figures.base_loss == pytest.approx(next_token_loss(base, tokens_NS), rel=1e-5)
    # Whatever stands at the last position must not matter, so it gets an action that the IDM did not choose.
    actions_NC = model.infer_actions(tokens_NS)
    for last in (0, NUM_ACTIONS - 1):
        actions_NS = torch.cat([actions_NC, torch.full((len(tokens_NS), 1), last)], dim=1)
        world = model.forward_world_model(tokens_NS, actions_NS).log_softmax(-1)
        assert figures.idm_loss == pytest.approx(next_token_loss(world, tokens_NS), rel=1e-5)
    # The fault twin: actions one place off, as they would be without the shift.
    unshifted_NS = torch.cat([torch.zeros(len(tokens_NS), 1, dtype=torch.long), actions_NC], dim=1)
    world = model.forward_world_model(tokens_NS, unshifted_NS).log_softmax(-1)
    assert figures.idm_loss != pytest.approx(next_token_loss(world, tokens_NS), rel=1e-3)


def test_the_last_token_changes_the_last_position_only(exported: ExportedModel) -> None:
    tokens_BS = random_tokens(2, BLOCK_TOKENS, seed=5, vocab_size=VOCAB_SIZE)
    changed_BS = tokens_BS.clone()
    changed_BS[:, -1] = (changed_BS[:, -1] + 1) % VOCAB_SIZE
    actions_BC = random_actions(2, BLOCK_TOKENS - 1, NUM_ACTIONS, seed=0)
    before = score_positions(exported.model, tokens_BS, actions_BC, chunk_actions=4)
    after = score_positions(exported.model, changed_BS, actions_BC, chunk_actions=4)
    for name in before:
        assert before[name].shape == (2, BLOCK_TOKENS - 1)
        assert torch.equal(before[name][:, :-1], after[name][:, :-1]), name
    assert not torch.equal(before["base_loss"][:, -1], after["base_loss"][:, -1])


def test_chunking_changes_nothing(
    exported: ExportedModel, blocks: dict[str, torch.Tensor], figures: HeldOutFigures
) -> None:
    at_once = measure(exported.model, blocks, chunk_gib=LARGE_CHUNK_GIB, seed=0, progress=False)
    assert plan_chunks(SMALL_CHUNK_GIB, BLOCK_TOKENS, VOCAB_SIZE, NUM_ACTIONS) != plan_chunks(
        LARGE_CHUNK_GIB, BLOCK_TOKENS, VOCAB_SIZE, NUM_ACTIONS
    )
    for name in LOSSES:
        assert getattr(at_once, name) == pytest.approx(getattr(figures, name), rel=1e-5)
    assert at_once.action_counts == figures.action_counts


def test_random_actions_follow_the_seed(
    exported: ExportedModel, blocks: dict[str, torch.Tensor], figures: HeldOutFigures
) -> None:
    again = measure(exported.model, blocks, chunk_gib=SMALL_CHUNK_GIB, seed=0, progress=False)
    other = measure(exported.model, blocks, chunk_gib=SMALL_CHUNK_GIB, seed=1, progress=False)
    assert again == figures
    assert other.random_loss != figures.random_loss
    assert other.idm_loss == figures.idm_loss
    drawn = random_actions(100, 50, NUM_ACTIONS, seed=0)
    assert torch.bincount(drawn.flatten()).min() > 0.7 * drawn.numel() / NUM_ACTIONS


def test_sources_are_scored_apart(figures: HeldOutFigures, exported: ExportedModel) -> None:
    assert [losses.tokens for losses in figures.per_source.values()] == [33, 22]
    for name in LOSSES:
        together = sum(losses.tokens * getattr(losses, name) for losses in figures.per_source.values())
        assert together / figures.tokens == pytest.approx(getattr(figures, name))


def test_actions_accuracies_and_losses_of_a_known_model() -> None:
    # The known model's IDM reads the next token modulo 4; its policy always says action 1.
    tokens_NS = torch.tensor([[0, 1, 1, 5, 2, 1], [3, 1, 9, 1, 1, 6]])
    figures = measure(
        KnownCola(vocab_size=10, num_actions=4), {"x": tokens_NS}, chunk_gib=1, seed=0, progress=False
    )
    assert figures.action_counts == [0, 8, 2, 0]
    assert figures.alive_actions == 2
    assert figures.action_perplexity == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)))
    assert figures.policy_action_accuracy == pytest.approx(0.8)
    # Its base says token 1; under action k its world model says token k.
    assert figures.base_accuracy == pytest.approx(0.6)
    assert figures.greedy_accuracy == pytest.approx(0.6)
    assert figures.greedy_loss == pytest.approx(figures.base_loss)
    assert figures.idm_loss < figures.base_loss


def test_kl_is_zero_for_equal_distributions_and_positive_otherwise() -> None:
    log_p = torch.tensor([0.5, 0.25, 0.25]).log()
    log_q = torch.tensor([0.25, 0.25, 0.5]).log()
    assert kl_divergence(log_p, log_p).item() == 0
    assert kl_divergence(log_p, log_q).item() == pytest.approx(0.25 * math.log(2))
    log_r = torch.tensor([0.8, 0.1, 0.1]).log()
    assert kl_divergence(log_p, log_r).item() > 0
    assert kl_divergence(log_p, log_r).item() != pytest.approx(kl_divergence(log_r, log_p).item())


def test_perplexity_of_usage() -> None:
    assert usage_perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)
    assert usage_perplexity(torch.tensor([5, 5, 5, 0])) == pytest.approx(3)


@pytest.mark.parametrize(
    ("chunk_gib", "blocks", "actions"),
    [(1e-9, 1, 1), (4 * 100 * 10 / 1024**3 * 5, 1, 5), (4 * 100 * 10 / 1024**3 * 16 * 3.5, 3, 16)],
)
def test_chunks_stay_within_the_limit(chunk_gib: float, blocks: int, actions: int) -> None:
    plan = plan_chunks(chunk_gib, sequence_length=10, vocab_size=100, num_actions=16)
    assert (plan.blocks, plan.actions) == (blocks, actions)
