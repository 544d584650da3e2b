"""The chunked loss through a frozen head is torch's cross-entropy, in value and gradient, whatever the chunk.

Shapes: S sequence, B batch, H hidden, V vocabulary.
"""

import pytest
import torch

from pretrain.model import token_loss
from pretrain.model.token_loss import frozen_head_losses
from pretrain.parallel import ParallelContext

S, B, H, V = 13, 3, 16, 97


def inputs(
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """State, head, labels and the gradient of the loss of each token."""
    generator = torch.Generator().manual_seed(0)
    state_SBH = (torch.randn(S, B, H, generator=generator) * 3).to(dtype).requires_grad_()
    weight_VH = torch.randn(V, H, generator=generator).to(dtype)
    labels_SB = torch.randint(V, (S, B), generator=generator)
    return state_SBH, weight_VH, labels_SB, torch.randn(S, B, generator=generator)


def by_torch(state_SBH: torch.Tensor, weight_VH: torch.Tensor, labels_SB: torch.Tensor) -> torch.Tensor:
    """Losses [S, B] from whole logits."""
    logits = torch.nn.functional.linear(state_SBH, weight_VH).float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_SB.flatten(), reduction="none")
    return losses.view_as(labels_SB)


def gradient(losses_SB: torch.Tensor, weights_SB: torch.Tensor, state_SBH: torch.Tensor) -> torch.Tensor:
    """Of the weighted sum of the losses to the state."""
    return torch.autograd.grad((losses_SB * weights_SB).sum(), state_SBH)[0]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 39, 1024])
def test_value_and_gradient_are_those_of_torch(
    context: ParallelContext, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    """Chunks that divide the tokens, that do not, and one that holds all."""
    monkeypatch.setattr(token_loss, "CHUNK_TOKENS", chunk_tokens)
    state_SBH, weight_VH, labels_SB, weights_SB = inputs()
    losses = frozen_head_losses(state_SBH, weight_VH, labels_SB, context.groups.tp)
    expected = by_torch(state_SBH, weight_VH, labels_SB)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient(losses, weights_SB, state_SBH),
        gradient(expected, weights_SB, state_SBH),
        rtol=1e-5,
        atol=1e-6,
    )


def test_bf16_states_get_fp32_losses(context: ParallelContext) -> None:
    state_SBH, weight_VH, labels_SB, weights_SB = inputs(torch.bfloat16)
    losses = frozen_head_losses(state_SBH, weight_VH, labels_SB, context.groups.tp)
    assert losses.dtype == torch.float32
    expected = by_torch(state_SBH, weight_VH, labels_SB)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    found, wanted = gradient(losses, weights_SB, state_SBH), gradient(expected, weights_SB, state_SBH)
    assert float((found - wanted).float().norm() / wanted.float().norm()) < 0.01


@pytest.mark.parametrize("fault", ["labels of the next token", "head of another vocabulary order"])
def test_other_labels_or_another_head_show(context: ParallelContext, fault: str) -> None:
    """The fault twins are far outside of the tolerance."""
    state_SBH, weight_VH, labels_SB, weights_SB = inputs()
    faulty_labels = labels_SB.roll(1, 0) if fault == "labels of the next token" else labels_SB
    faulty_weight = weight_VH if fault == "labels of the next token" else weight_VH.roll(1, 0)
    losses = frozen_head_losses(state_SBH, faulty_weight, faulty_labels, context.groups.tp)
    expected = by_torch(state_SBH, weight_VH, labels_SB)
    assert not torch.allclose(losses, expected, rtol=1e-2)
    assert not torch.allclose(
        gradient(losses, weights_SB, state_SBH), gradient(expected, weights_SB, state_SBH), rtol=1e-2
    )


def test_nothing_as_wide_as_the_vocabulary_is_kept(context: ParallelContext) -> None:
    """Whole logits, the twin, keep it; and without gradients nothing is kept at all."""
    state_SBH, weight_VH, labels_SB, _ = inputs()

    def kept_elements(grad: bool, chunked: bool) -> int:
        kept: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)  # type: ignore[func-returns-value]
        with torch.set_grad_enabled(grad), hooks:
            if chunked:
                frozen_head_losses(state_SBH, weight_VH, labels_SB, context.groups.tp)
            else:
                by_torch(state_SBH, weight_VH, labels_SB)
        return sum(kept)

    assert kept_elements(grad=True, chunked=True) == S * B * H
    assert kept_elements(grad=True, chunked=False) >= S * B * V
    assert kept_elements(grad=False, chunked=True) == 0
