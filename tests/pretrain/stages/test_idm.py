"""Stage idm (and base): what the loss is made of, and who sees what of the future.

Shapes: S sequence, B batch, H hidden, V vocabulary, A actions.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.actions import masked_mean, shift_to_previous
from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext
from pretrain.stages.contract import Batch, Stage, StageLoss
from pretrain.stages.idm import count_actions, prediction_losses
from pretrain.stages.registry import stage_class
from tests.pretrain.megatron_outputs import loss_on_one_rank
from tests.pretrain.tiny_runs import VOCAB_SIZE, tiny_recipe

S, B, A = 12, 3, 16


def recipe(stage: str = "idm", **actions: Any) -> RunConfig:
    """A tiny run of the stage."""
    start = None if stage == "base" else Path("start")
    return tiny_recipe(stage, Path("run"), Path("data"), start, actions=actions)


def build(config: RunConfig, context: ParallelContext) -> tuple[Stage, ColaModel]:
    """The stage and its model as at the start of training."""
    stage_type = stage_class(config)
    model = ColaModel(config, context.groups, (*stage_type.frozen_parts, *stage_type.trained_parts))
    model.freeze_all_but(stage_type.trained_parts)
    return stage_type(config, context.data_parallel_mean), model


def randomised(model: ColaModel) -> ColaModel:
    """With weights so large that every term of the formulas matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.1
            centre = 0.0 if parameter.dim() > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + centre)
    return model


def random_batch() -> Batch:
    """Samples of consecutive tokens, so that the labels are the tokens shifted."""
    tokens = torch.randint(VOCAB_SIZE, (B, S + 1), generator=torch.Generator().manual_seed(2))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.tensor([4, 9, 1]))


@pytest.fixture(scope="module", params=["reference", "residual"])
def trained(request: pytest.FixtureRequest, context: ParallelContext) -> tuple[Stage, ColaModel]:
    """Stage and model far from the start."""
    stage, model = build(recipe(output=request.param), context)
    return stage, randomised(model).eval()


def loss_of(stage: Stage, model: ColaModel, batch: Batch | None = None) -> StageLoss:
    """Of one micro-batch."""
    return loss_on_one_rank(stage, model, batch or random_batch())


def test_residual_form_starts_with_the_loss_of_the_base(context: ParallelContext) -> None:
    """To the last bit, in training and in evaluation; the reference form starts elsewhere."""
    stage, model = build(recipe(output="residual"), context)
    training, evaluation = loss_of(stage, model.train()), loss_of(stage, model.eval())
    base_loss = evaluation.means["base_loss"]
    assert torch.equal(evaluation.means["prediction_loss"], base_loss)
    assert torch.equal(training.means["prediction_loss"], base_loss)
    stage, model = build(recipe(output="reference"), context)
    assert not torch.isclose(loss_of(stage, model.eval()).means["prediction_loss"], base_loss, rtol=1e-6)


def test_prediction_loss_is_that_of_the_forms_formula(trained: tuple[Stage, ColaModel]) -> None:
    """reference: W_lm (norm(s) - h); residual: W_lm s. Each is far from the other, the fault twin."""
    stage, model = trained
    batch = random_batch()
    hidden_SBH = model.base.hidden(batch.tokens_BS)
    logits_SBA = shift_to_previous(model.idm(hidden_SBH, model.base.rotary(S)))
    choice_SBA = torch.nn.functional.one_hot(logits_SBA.argmax(-1), A).float()
    state_SBH = model.world_model(hidden_SBH, choice_SBA)
    scale_SB1 = torch.rsqrt(state_SBH.square().mean(-1, keepdim=True) + 1e-5)
    normed_SBH = state_SBH * scale_SB1 * model.base.decoder.final_layernorm.weight
    losses = {}
    for form, read_SBH in (("reference", normed_SBH - hidden_SBH), ("residual", state_SBH)):
        logits_BVS = (read_SBH @ model.base.output_layer.weight.T).permute(1, 2, 0)
        losses_BS = torch.nn.functional.cross_entropy(logits_BVS, batch.labels_BS, reduction="none")
        losses[form] = masked_mean(losses_BS.T).detach()
    found = loss_of(stage, model).means["prediction_loss"]
    torch.testing.assert_close(found, losses.pop(stage.config.actions.output), rtol=1e-4, atol=1e-4)
    (other_form,) = losses.values()
    assert not torch.isclose(found, other_form, rtol=1e-2)


@pytest.mark.parametrize("regulariser", ["token", "usage"])
def test_loss_is_prediction_plus_weighted_regulariser(context: ParallelContext, regulariser: str) -> None:
    """Twice the coefficient is twice the part, and the coefficient does nothing else."""
    means = []
    for coefficient in (0.5, 1.0):
        config = recipe(regulariser=regulariser, regulariser_coefficient=coefficient)
        stage, model = build(config, context)
        result = loss_of(stage, model.train())
        torch.testing.assert_close(result.loss, result.means["prediction_loss"] + result.means["regulariser"])
        means.append(result.means)
    torch.testing.assert_close(means[1]["regulariser"], 2 * means[0]["regulariser"])
    assert float(means[0]["regulariser"]) < -0.1
    assert torch.equal(means[1]["prediction_loss"], means[0]["prediction_loss"])


def test_gradients_reach_what_is_trained_and_nothing_else(context: ParallelContext) -> None:
    """IDM, codebook and merge layers; the base has none."""
    stage, model = build(recipe(), context)
    loss_of(stage, randomised(model).train()).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("base."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and bool(parameter.grad.any()), name


@torch.no_grad()
def losses_by_position(stage: Stage, model: ColaModel, batch: Batch) -> torch.Tensor:
    """Prediction losses [S, B] with argmax actions."""
    hidden_SBH = model.base.hidden(batch.tokens_BS)
    logits_SBA = shift_to_previous(model.idm(hidden_SBH, model.base.rotary(S)))
    choice_SBA = torch.nn.functional.one_hot(logits_SBA.argmax(-1), A).float()
    return prediction_losses(stage.config.actions.output, model, hidden_SBH, choice_SBA, batch)


def test_the_action_of_a_position_sees_one_token_ahead_and_no_further(
    trained: tuple[Stage, ColaModel],
) -> None:
    """With labels held fixed, changing token t moves losses from t - 1 on, never before."""
    stage, model = trained
    batch = random_batch()
    touched = set()
    for new_token in range(30):
        changed_BS = batch.tokens_BS.clone()
        changed_BS[0, 6] = new_token
        before, after = (
            losses_by_position(stage, model, batch._replace(tokens_BS=tokens))
            for tokens in (batch.tokens_BS, changed_BS)
        )
        touched |= set((before != after)[:, 0].nonzero().flatten().tolist())
    assert touched == set(range(5, S))


def test_the_last_position_has_no_loss(trained: tuple[Stage, ColaModel]) -> None:
    """Its label plays no part; that of the position before does."""
    stage, model = trained
    batch, losses = random_batch(), []
    for position in (None, S - 1, S - 2):
        labels_BS = batch.labels_BS.clone()
        if position is not None:
            labels_BS[:, position] = (labels_BS[:, position] + 1) % VOCAB_SIZE
        losses.append(loss_of(stage, model, batch._replace(labels_BS=labels_BS)).loss)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_training_draws_noise_by_sample_and_evaluation_none(context: ParallelContext) -> None:
    stage, model = build(recipe(output="reference"), context)
    randomised(model)
    batch = random_batch()
    renumbered = batch._replace(sample_index_B=batch.sample_index_B + 1)
    for mode, same in ((model.train, False), (model.eval, True)):
        mode()
        assert torch.equal(loss_of(stage, model, batch).loss, loss_of(stage, model, batch).loss)
        assert torch.equal(loss_of(stage, model, batch).loss, loss_of(stage, model, renumbered).loss) == same


def test_actions_are_counted_where_there_is_a_next_token() -> None:
    actions_SB = torch.tensor([(1, 1), (1, 3), (4, 3), (0, 0)])
    assert count_actions(actions_SB, 5).tolist() == [0, 3, 0, 2, 1]


def test_counts_are_of_the_likeliest_actions_in_training_too(context: ParallelContext) -> None:
    """Not of the sampled ones, which at the start are spread evenly whatever the IDM thinks."""
    stage, model = build(recipe(), context)
    randomised(model)
    logits_SBA = shift_to_previous(
        model.idm(model.base.hidden(random_batch().tokens_BS), model.base.rotary(S))
    )
    expected_A = torch.bincount(logits_SBA[:-1].argmax(-1).flatten(), minlength=A).float()
    for mode in (model.train, model.eval):
        mode()
        counts_A = loss_of(stage, model).action_counts_A
        assert counts_A is not None and torch.equal(counts_A, expected_A)


def test_vq_assignment_trains_codes_and_needs_no_noise(context: ParallelContext) -> None:
    """The regulariser reported is the VQ loss, unweighted; actions are counted by their nearest code."""
    config = recipe(assignment="vq", output="reference", regulariser_coefficient=0.5)
    stage, model = build(config, context)
    assert stage.trained_parts == ("idm", "world_model", "quantiser")
    result = loss_of(stage, randomised(model).train())
    batch = random_batch()
    renumbered = loss_of(stage, model, batch._replace(sample_index_B=batch.sample_index_B + 1))
    assert torch.equal(result.loss, renumbered.loss)
    idm_logits_SBA = shift_to_previous(model.idm(model.base.hidden(batch.tokens_BS), model.base.rotary(S)))
    torch.testing.assert_close(result.means["regulariser"], model.quantiser(idm_logits_SBA)[1].detach())
    nearest_SB = model.quantiser.nearest(idm_logits_SBA)
    assert result.action_counts_A is not None
    assert torch.equal(result.action_counts_A, count_actions(nearest_SB, A))
    assert not torch.equal(result.action_counts_A, count_actions(idm_logits_SBA.argmax(-1), A))
    result.loss.backward()
    gradient_AA = model.quantiser.codes_AA.grad
    assert gradient_AA is not None and bool(gradient_AA.any())


def test_base_stage_is_the_mean_over_all_positions(context: ParallelContext) -> None:
    """Every position has a label there, the last one too."""
    stage, model = build(recipe("base"), context)
    batch = random_batch()
    losses_SB = model.base.token_losses(model.base.hidden(batch.tokens_BS), batch.labels_BS)
    found = loss_of(stage, model).loss
    torch.testing.assert_close(found, losses_SB.mean())
    assert not torch.isclose(found, masked_mean(losses_SB), rtol=1e-5)


def test_a_stage_is_told_by_the_recipe() -> None:
    names = {
        (stage, assignment): stage_class(
            dataclasses.replace(recipe(assignment=assignment), stage=stage)  # type: ignore[arg-type]
        ).__name__
        for stage, assignment in (("base", "gumbel"), ("idm", "gumbel"), ("idm", "vq"), ("policy", "gumbel"))
    }
    assert list(names.values()) == ["BaseStage", "IdmStage", "VqIdmStage", "PolicyStage"]
