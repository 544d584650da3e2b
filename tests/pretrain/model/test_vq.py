"""VQ assignment: the nearest code, a straight-through gradient, and the two losses of VQ-VAE.

Shapes: S sequence, B batch, A actions.
"""

from pathlib import Path

import pytest
import torch

from pretrain.actions import masked_mean
from pretrain.model.cola import ColaModel
from pretrain.model.specs import transformer_config
from pretrain.model.vq import VectorQuantiser
from pretrain.parallel import ParallelContext
from tests.pretrain.tiny_runs import tiny_recipe

S, B, A = 7, 3, 16


@pytest.fixture
def quantiser() -> VectorQuantiser:
    """Codes of unlike lengths, so that nearest and best aligned differ."""
    recipe = tiny_recipe("idm", Path("run"), Path("data"), Path("base"), actions={"assignment": "vq"})
    quantiser = VectorQuantiser(transformer_config(recipe, "world_model"), A)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        lengths_A1 = torch.linspace(0.2, 3.0, A)[:, None]
        quantiser.codes_AA.copy_(torch.randn(A, A, generator=generator) * lengths_A1)
    return quantiser


@pytest.fixture(name="logits_SBA")
def random_logits() -> torch.Tensor:
    """What an IDM might give."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(S, B, A, generator=generator).requires_grad_()


def test_the_action_is_the_code_at_the_smallest_distance(
    quantiser: VectorQuantiser, logits_SBA: torch.Tensor
) -> None:
    """By measuring all distances; the fault twin, the best aligned code, is another one."""
    distances = torch.cdist(logits_SBA.flatten(0, 1), quantiser.codes_AA).view(S, B, A)
    assert torch.equal(quantiser.nearest(logits_SBA), distances.argmin(-1))
    aligned_SB = (logits_SBA @ quantiser.codes_AA.T).argmax(-1)
    assert float((quantiser.nearest(logits_SBA) != aligned_SB).float().mean()) > 0.3


def test_a_code_is_its_own_nearest(quantiser: VectorQuantiser) -> None:
    """And is then quantised without loss."""
    embedding, loss = quantiser(quantiser.codes_AA[:, None].detach())
    assert quantiser.nearest(quantiser.codes_AA[:, None]).flatten().tolist() == list(range(A))
    torch.testing.assert_close(embedding[:, 0], quantiser.codes_AA.detach())
    assert not bool(loss)


def test_the_embedding_is_the_code_and_its_gradient_goes_straight_through(
    quantiser: VectorQuantiser, logits_SBA: torch.Tensor
) -> None:
    """The logits receive the gradient unchanged, the codes none of it."""
    embedding_SBA, _ = quantiser(logits_SBA)
    torch.testing.assert_close(embedding_SBA, quantiser.codes_AA[quantiser.nearest(logits_SBA)])
    weights_SBA = torch.randn(S, B, A, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(
        (embedding_SBA * weights_SBA).sum(), [logits_SBA, quantiser.codes_AA], allow_unused=True
    )
    torch.testing.assert_close(found[0], weights_SBA)
    assert found[1] is None


def test_the_loss_pulls_codes_to_embeddings_and_a_quarter_as_much_back(
    quantiser: VectorQuantiser, logits_SBA: torch.Tensor
) -> None:
    """Both distances have the same value; codes feel the first, logits the second with weight 0.25."""
    _, loss = quantiser(logits_SBA)
    nearest_SB = quantiser.nearest(logits_SBA)
    difference_SBA = (logits_SBA - quantiser.codes_AA[nearest_SB]).detach()
    torch.testing.assert_close(loss, 1.25 * masked_mean(difference_SBA.square().mean(-1)))
    to_logits_SBA, to_codes_AA = torch.autograd.grad(loss, [logits_SBA, quantiser.codes_AA])
    slope_SBA = 2 * difference_SBA / (A * (S - 1) * B)
    slope_SBA[-1] = 0
    torch.testing.assert_close(to_logits_SBA, 0.25 * slope_SBA)
    expected_AA = torch.zeros(A, A).index_add(0, nearest_SB.flatten(), -slope_SBA.flatten(0, 1))
    torch.testing.assert_close(to_codes_AA, expected_AA)


def test_the_last_position_plays_no_part_in_the_loss(
    quantiser: VectorQuantiser, logits_SBA: torch.Tensor
) -> None:
    changed_SBA = logits_SBA.detach().clone()
    changed_SBA[-1] += 10
    assert torch.equal(quantiser(logits_SBA)[1], quantiser(changed_SBA)[1])
    changed_SBA[0] += 10
    assert not torch.equal(quantiser(logits_SBA)[1], quantiser(changed_SBA)[1])


def test_codes_of_a_bf16_model_quantise_fp32_logits(
    context: ParallelContext, logits_SBA: torch.Tensor
) -> None:
    """The IDM's logits are fp32 in either precision."""
    recipe = tiny_recipe("idm", Path("run"), Path("data"), Path("base"), training={"precision": "bf16"})
    quantiser = ColaModel(recipe, context.groups, ("quantiser",)).quantiser
    assert quantiser.codes_AA.dtype == torch.bfloat16
    embedding_SBA, loss = quantiser(logits_SBA)
    assert embedding_SBA.dtype == loss.dtype == torch.float32
    (to_codes_AA,) = torch.autograd.grad(loss, [quantiser.codes_AA])
    assert bool(to_codes_AA.any())
