"""Stage `policy`: imitate the IDM's argmax actions without seeing the next token (paper algorithm 1).

Shapes: S sequence, B batch, H hidden, A actions.
"""

import torch

from pretrain.actions import masked_mean, shift_to_previous, straight_through_one_hot
from pretrain.model.cola import ColaModel
from pretrain.stages.contract import Batch, Stage, StageLoss
from pretrain.stages.idm import count_actions, prediction_losses


class PolicyStage(Stage):
    """Cross-entropy of the policy at t against the action the IDM reads at t+1."""

    trained_parts = ("policy",)
    frozen_parts = ("base", "idm", "world_model")

    def loss(self, model: ColaModel, batch: Batch) -> StageLoss:
        """Action loss and accuracy; at evaluation also the next-token loss under the greedy policy."""
        with torch.no_grad():
            hidden_SBH = model.base.hidden(batch.tokens_BS)
            rotary = model.base.rotary(batch.tokens_BS.shape[1])
            idm_logits_SBA = shift_to_previous(model.idm(hidden_SBH, rotary))
        policy_logits_SBA = model.policy(hidden_SBH, rotary)
        labels_SB = idm_logits_SBA.argmax(-1)
        losses_SB = torch.nn.functional.cross_entropy(
            policy_logits_SBA.flatten(0, 1), labels_SB.flatten(), reduction="none"
        ).view_as(labels_SB)
        loss = masked_mean(losses_SB)
        accuracy = masked_mean((policy_logits_SBA.argmax(-1) == labels_SB).float())
        means = {"loss": loss.detach(), "action_accuracy": accuracy}
        if not model.training:
            choice_SBA = straight_through_one_hot(policy_logits_SBA, None, temperature=1.0).one_hot_SBA
            losses_SB = prediction_losses(self.config.actions.output, model, hidden_SBH, choice_SBA, batch)
            means["prediction_loss"] = masked_mean(losses_SB)
        return StageLoss(loss, means, count_actions(labels_SB, idm_logits_SBA.shape[-1]))
