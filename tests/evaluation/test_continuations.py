"""Continuations are what the model says under the actions asked for."""

import pytest
import torch

from evaluation.continuations import (
    base_language_model,
    base_samples,
    first_actions,
    fixed_actions,
    policy_actions,
    random_actions,
)
from evaluation.huggingface_model import ExportedModel
from tests.checkpoint_tools.random_cola import random_cola, random_tokens
from tests.evaluation.tiny_demo import EOS_ID, WORDS

# P prompts, M continuations, N new tokens.
VOCAB_SIZE = len(WORDS) + 2
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return random_tokens(2, 5, seed=1, vocab_size=VOCAB_SIZE)


@torch.no_grad()
def greedy(exported: ExportedModel, prompt_S: torch.Tensor, actions: list[int | None]) -> list[int]:
    """One token after the other without a cache; None lets the policy choose. End-of-text is held back."""
    tokens_1S = prompt_S.unsqueeze(0)
    for action in actions:
        if action is None:
            action = int(exported.model.policy_logits(tokens_1S)[0, -1].argmax())
        logits_V = exported.model.forward_world_model(tokens_1S, action)[0, -1]
        logits_V[EOS_ID] = -torch.inf
        tokens_1S = torch.cat([tokens_1S, logits_V.argmax().view(1, 1)], dim=1)
    return tokens_1S[0, len(prompt_S) :].tolist()


def test_fixed_actions_hold_for_the_whole_text(exported: ExportedModel, prompts: torch.Tensor) -> None:
    tokens_PMN = fixed_actions(exported.model, prompts, [3, 11, 0], NEW_TOKENS)
    assert tokens_PMN.shape == (2, 3, NEW_TOKENS)
    for p, prompt_S in enumerate(prompts):
        for m, action in enumerate((3, 11, 0)):
            assert tokens_PMN[p, m].tolist() == greedy(exported, prompt_S, [action] * NEW_TOKENS)


def test_first_actions_leave_the_rest_to_the_policy(exported: ExportedModel, prompts: torch.Tensor) -> None:
    tokens_PMN = first_actions(exported.model, prompts, [3, 11], NEW_TOKENS)
    policy: list[int | None] = [None] * (NEW_TOKENS - 1)
    for p, prompt_S in enumerate(prompts):
        for m, action in enumerate((3, 11)):
            assert tokens_PMN[p, m].tolist() == greedy(exported, prompt_S, [action, *policy])


def test_sampling_follows_the_global_seed(exported: ExportedModel, prompts: torch.Tensor) -> None:
    for sample in (random_actions, policy_actions, base_samples):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first = sample(exported.model, prompts, 4, NEW_TOKENS)
            other = sample(exported.model, prompts, 4, NEW_TOKENS)
            torch.manual_seed(0)
            again = sample(exported.model, prompts, 4, NEW_TOKENS)
        assert first.shape == (2, 4, NEW_TOKENS)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert EOS_ID not in first


def test_base_alone_says_what_the_model_calls_its_base(
    exported: ExportedModel, prompts: torch.Tensor
) -> None:
    base = base_language_model(exported.model)
    with torch.no_grad():
        logits = base(prompts).logits
        assert torch.allclose(logits, exported.model.base_logits(prompts), atol=1e-5)
        assert not torch.allclose(logits, exported.model.forward_world_model(prompts, 0), atol=1e-1)
    shared = exported.model.state_dict()["lm_head.weight"]
    assert base.lm_head.weight.data_ptr() == shared.data_ptr(), "weights are shared, not copied"


def test_a_base_with_biases_keeps_them(prompts: torch.Tensor) -> None:
    """A Qwen2.5 base; without its biases it says something else."""
    model = random_cola(qkv_bias=True)
    base = base_language_model(model)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(base(prompts).logits, model.base_logits(prompts), atol=1e-5)
        for layer in base.model.layers:
            layer.self_attn.q_proj.bias.zero_()
        assert not torch.allclose(
            base(prompts).logits, random_cola(qkv_bias=True).base_logits(prompts), atol=1e-1
        )
