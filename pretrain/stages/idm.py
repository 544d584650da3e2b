"""Stage `idm`: inverse dynamics model, codebook and merge layers on a frozen base (paper eq. 2-3, algorithm 1).

Shapes: S sequence, B batch, H hidden, A actions.
"""

from typing import ClassVar

import torch

from pretrain.actions import (
    gumbel_noise,
    masked_mean,
    shift_to_previous,
    straight_through_one_hot,
    token_entropy_regulariser,
    usage_entropy_regulariser,
)
from pretrain.model.cola import ColaModel
from pretrain.stages.contract import Batch, Carry, Stage, StageLoss, frozen_hidden


class IdmStage(Stage):
    """Predict the next token from the state and the action that the IDM reads one token later."""

    trained_parts: ClassVar[tuple[str, ...]] = ("idm", "world_model")
    frozen_parts: ClassVar[tuple[str, ...]] = ("base",)

    def forward(self, model: ColaModel, batch: Batch, carry: Carry | None) -> Carry | StageLoss:
        """Prediction loss plus regulariser; at evaluation, argmax actions and the base's own loss beside it."""
        hidden_SBH = frozen_hidden(model, batch, carry)
        assert hidden_SBH is not None, "the world model needs it on the last pipeline stage"
        idm = carry.idm if carry else None
        if "idm" in model.parts:
            idm = model.idm(hidden_SBH if idm is None else idm, model.base.rotary(batch.tokens_BS.shape[1]))
        if not model.base.has_head:
            return Carry(hidden_SBH, idm)
        assert idm is not None, "the last pipeline stage follows the whole IDM"
        return self.loss(model, batch, hidden_SBH, shift_to_previous(idm))

    def loss(
        self, model: ColaModel, batch: Batch, hidden_SBH: torch.Tensor, idm_logits_SBA: torch.Tensor
    ) -> StageLoss:
        """From the base's state and the action logits of each next token, to the loss."""
        choice_SBA, likeliest_SB, regulariser = self.choose(model, idm_logits_SBA, batch)
        losses_SB = prediction_losses(self.config.actions.output, model, hidden_SBH, choice_SBA, batch)
        prediction_loss = masked_mean(losses_SB)
        loss = prediction_loss + regulariser
        means = {"loss": loss, "prediction_loss": prediction_loss, "regulariser": regulariser}
        if not model.training:
            means["base_loss"] = masked_mean(model.base.token_losses(hidden_SBH, batch.labels_BS))
        counts_A = count_actions(likeliest_SB, idm_logits_SBA.shape[-1])
        return StageLoss(loss, {k: v.detach() for k, v in means.items()}, counts_A)

    def choose(
        self, model: ColaModel, idm_logits_SBA: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The straight-through actions [S, B, A], the noiseless argmax [S, B], and the weighted regulariser."""
        actions = self.config.actions
        noise_SBA = None
        if model.training:
            sequence_length, _, num_actions = idm_logits_SBA.shape
            noise_SBA = gumbel_noise(self.config.seed, batch.sample_index_B, sequence_length, num_actions)
        choice = straight_through_one_hot(idm_logits_SBA, noise_SBA, actions.temperature)
        if actions.regulariser == "token":
            regulariser = token_entropy_regulariser(choice.relaxed_SBA)
        else:
            regulariser = usage_entropy_regulariser(idm_logits_SBA, self.mean_over_ranks)
        likeliest_SB = idm_logits_SBA.argmax(-1)
        return choice.one_hot_SBA, likeliest_SB, actions.regulariser_coefficient * regulariser


class VqIdmStage(IdmStage):
    """The same stage with VQ-VAE assignment instead of Gumbel-softmax (ablation)."""

    trained_parts = ("idm", "world_model", "quantiser")

    def choose(
        self, model: ColaModel, idm_logits_SBA: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The straight-through quantised embedding [S, B, A], the nearest codes [S, B], and the VQ loss."""
        quantised_SBA, loss = model.quantiser(idm_logits_SBA)
        return quantised_SBA, model.quantiser.nearest(idm_logits_SBA), loss


def prediction_losses(
    output: str, model: ColaModel, hidden_SBH: torch.Tensor, choice_SBA: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Next-token losses [S, B] of the world model under the given actions, through the frozen head.

    `reference` subtracts h from the re-normalised state, as the released code does; `residual` does neither.
    """
    state_SBH = model.world_model(hidden_SBH, choice_SBA)
    if output == "reference":
        state_SBH = model.base.final_norm(state_SBH) - hidden_SBH
    return model.base.token_losses(state_SBH, batch.labels_BS)


def count_actions(actions_SB: torch.Tensor, num_actions: int) -> torch.Tensor:
    """How often each action occurs at the positions that have a next token; [A], fp32."""
    return torch.bincount(actions_SB[:-1].flatten(), minlength=num_actions).float()
