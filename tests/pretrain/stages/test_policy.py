"""Stage policy: imitate, at t, the action that the IDM reads at t + 1.

Shapes: S sequence, B batch, A actions.
"""

import pytest
import torch

from pretrain.actions import shift_to_previous
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext
from pretrain.stages.contract import Stage
from tests.pretrain.megatron_outputs import loss_on_one_rank
from tests.pretrain.stages.test_idm import (
    A,
    B,
    S,
    build,
    losses_by_position,
    random_batch,
    randomised,
    recipe,
)


@pytest.fixture(scope="module")
def policy(context: ParallelContext) -> tuple[Stage, ColaModel]:
    """Stage and model far from the start."""
    stage, model = build(recipe("policy", output="reference"), context)
    return stage, randomised(model).eval()


def logits(model: ColaModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the policy, and of the IDM as it reads them, [S, B, A] both."""
    hidden_SBH, rotary = model.base.hidden(random_batch().tokens_BS), model.base.rotary(S)
    return model.policy(hidden_SBH, rotary).detach(), model.idm(hidden_SBH, rotary).detach()


def cross_entropy(policy_SBA: torch.Tensor, labels_SB: torch.Tensor) -> torch.Tensor:
    """Mean over all given positions."""
    return torch.nn.functional.cross_entropy(policy_SBA.flatten(0, 1), labels_SB.flatten())


def test_loss_is_the_cross_entropy_with_the_action_read_one_token_later(
    policy: tuple[Stage, ColaModel],
) -> None:
    """Over the positions that have one; unshifted labels, the fault twin, give another loss."""
    stage, model = policy
    policy_SBA, idm_SBA = logits(model)
    found = loss_on_one_rank(stage, model, random_batch())
    torch.testing.assert_close(found.loss.detach(), cross_entropy(policy_SBA[:-1], idm_SBA[1:].argmax(-1)))
    for faulty_SB in (idm_SBA[:-1].argmax(-1), idm_SBA[1:].argmax(-1).roll(1, dims=1)):
        assert not torch.isclose(found.loss.detach(), cross_entropy(policy_SBA[:-1], faulty_SB), rtol=1e-3)
    agreement = (policy_SBA[:-1].argmax(-1) == idm_SBA[1:].argmax(-1)).float().mean()
    torch.testing.assert_close(found.means["action_accuracy"], agreement)


def test_labels_have_no_noise(policy: tuple[Stage, ColaModel]) -> None:
    """The argmax in training too: sample numbers play no part, and counts are those of the argmax."""
    stage, model = policy
    batch = random_batch()
    model.train()
    first = loss_on_one_rank(stage, model, batch)
    second = loss_on_one_rank(stage, model, batch._replace(sample_index_B=batch.sample_index_B + 1))
    model.eval()
    assert torch.equal(first.loss, second.loss)
    _, idm_SBA = logits(model)
    expected_A = torch.bincount(idm_SBA[1:].argmax(-1).flatten(), minlength=A).float()
    assert first.action_counts_A is not None and torch.equal(first.action_counts_A, expected_A)
    assert float(expected_A.sum()) == (S - 1) * B


def test_only_the_policy_has_gradients(policy: tuple[Stage, ColaModel]) -> None:
    stage, model = policy
    model.zero_grad()
    loss_on_one_rank(stage, model, random_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == name.startswith("policy."), name


def test_a_policy_equal_to_the_shifted_idm_is_always_right(
    policy: tuple[Stage, ColaModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then accuracy is one, and the next-token loss is the IDM's own; one that is a token late is neither."""
    stage, model = policy
    _, idm_SBA = logits(model)
    own_loss = losses_by_position(stage, model, random_batch())[:-1].mean()
    monkeypatch.setattr(model.policy, "forward", lambda hidden, rotary: shift_to_previous(idm_SBA))
    means = loss_on_one_rank(stage, model, random_batch()).means
    assert float(means["action_accuracy"]) == 1.0
    torch.testing.assert_close(means["prediction_loss"], own_loss)
    monkeypatch.setattr(model.policy, "forward", lambda hidden, rotary: idm_SBA)
    means = loss_on_one_rank(stage, model, random_batch()).means
    assert float(means["action_accuracy"]) < 0.9
    assert not torch.isclose(means["prediction_loss"], own_loss, rtol=1e-3)
