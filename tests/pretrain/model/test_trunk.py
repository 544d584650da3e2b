"""The base: rotary angles of Llama 3.1, a causal hidden state, and next-token losses.

Shapes: S sequence, B batch, H hidden, V vocabulary, D head size.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.model.cola import ColaModel
from pretrain.model.trunk import LlamaTrunk
from pretrain.parallel import ParallelContext
from tests.pretrain.tiny_runs import VOCAB_SIZE, tiny_recipe

D = 32
FULL_ROTARY = {"head_size": D, "rope_theta": 500000.0}


def build(context: ParallelContext, precision: str = "fp32", **model: Any) -> LlamaTrunk:
    """A base with some model fields replaced."""
    training = {"precision": precision}
    recipe = tiny_recipe("base", Path("run"), Path("data"), model=model, training=training)
    return ColaModel(recipe, context.groups, ("base",)).base


def llama31_angles(positions: int, theta: float, factor: float | None) -> torch.Tensor:
    """Angles [S, D]: low frequencies divided by the factor, high ones kept, between them interpolated."""
    frequencies = []
    for index in range(D // 2):
        frequency = theta ** (-2 * index / D)
        turns = 8192 * frequency / (2 * math.pi)  # within the original context length
        if factor is not None:
            kept = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
            frequency = kept * frequency + (1 - kept) * frequency / factor
        frequencies.append(frequency)
    half = torch.outer(torch.arange(positions).double(), torch.tensor(frequencies, dtype=torch.float64))
    return torch.cat([half, half], dim=-1)


@pytest.mark.parametrize("theta", [500000.0, 500.5])
@pytest.mark.parametrize("factor", [None, 8.0])
def test_rotary_angles_are_those_of_llama31(
    context: ParallelContext, theta: float, factor: float | None
) -> None:
    """With scaling and without, and for a base that is no whole number; not with the faults below."""
    base = build(context, head_size=D, rope_theta=theta, rope_scaling_factor=factor)
    found = base.rotary(2048)[:, 0, 0].double()
    torch.testing.assert_close(found, llama31_angles(2048, theta, factor), rtol=1e-5, atol=1e-4)
    other_scaling = llama31_angles(2048, theta, None if factor else 8.0)
    other_theta = llama31_angles(2048, int(theta) if theta % 1 else 10000.0, factor)
    for fault in (other_scaling, other_theta):
        assert not torch.allclose(found, fault, rtol=1e-5, atol=1e-4)


def test_rotary_angles_of_a_bf16_model_are_not_rounded(context: ParallelContext) -> None:
    """bf16 frequencies would be off by whole radians at position 2000."""
    exact, bf16 = (build(context, p, **FULL_ROTARY).rotary(2048) for p in ("fp32", "bf16"))
    assert torch.equal(exact, bf16)


@pytest.fixture(scope="module")
def base(context: ParallelContext) -> LlamaTrunk:
    """With weights large enough for attention to matter."""
    base = build(context)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return base


def random_tokens() -> torch.Tensor:
    """Tokens [2, 12]."""
    return torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_token_changes_its_own_and_later_hidden_states_only(base: LlamaTrunk) -> None:
    tokens_BS = random_tokens()
    changed_BS = tokens_BS.clone()
    changed_BS[0, 5] = (changed_BS[0, 5] + 1) % VOCAB_SIZE
    changed_SB = (base.hidden(tokens_BS) != base.hidden(changed_BS)).any(-1)
    assert changed_SB.T.tolist() == [[False] * 5 + [True] * 7, [False] * 12]


@torch.no_grad()
def test_the_hidden_state_has_passed_the_final_norm_and_no_head(base: LlamaTrunk) -> None:
    """The norm's weights are ones here, so every position has a root mean square of one."""
    hidden_SBH = base.hidden(random_tokens())
    torch.testing.assert_close(hidden_SBH.square().mean(-1), torch.ones(12, 2), rtol=1e-3, atol=1e-3)
    doubled_SBH = base.final_norm(2.0 * hidden_SBH)
    torch.testing.assert_close(doubled_SBH, hidden_SBH, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_token_losses_are_cross_entropies_in_the_order_of_positions(base: LlamaTrunk) -> None:
    tokens_BS = random_tokens()
    labels_BS = tokens_BS.roll(-1, dims=1)
    hidden_SBH = base.hidden(tokens_BS)
    losses_SB = base.token_losses(hidden_SBH, labels_BS)
    logits_SBV = hidden_SBH @ base.output_layer.weight.T
    torch.testing.assert_close(base.logits(hidden_SBH), logits_SBV)
    expected_BS = torch.nn.functional.cross_entropy(logits_SBV.permute(1, 2, 0), labels_BS, reduction="none")
    torch.testing.assert_close(losses_SB, expected_BS.T)
