"""Stage `policy`: imitate the IDM's argmax actions without seeing the next token (paper algorithm 1).

Shapes: S sequence, B batch, H hidden, A actions.
"""

import torch

from pretrain.actions import masked_mean, shift_to_previous, straight_through_one_hot
from pretrain.model.cola import ColaModel
from pretrain.stages.contract import Batch, Carry, Stage, StageLoss, frozen_hidden
from pretrain.stages.idm import count_actions, prediction_losses


class PolicyStage(Stage):
    """Cross-entropy of the policy at t against the action the IDM reads at t+1."""

    trained_parts = ("policy",)
    frozen_parts = ("base", "idm", "world_model")

    def forward(self, model: ColaModel, batch: Batch, carry: Carry | None) -> Carry | StageLoss:
        """Action loss and accuracy; at evaluation also the next-token loss under the greedy policy."""
        hidden_SBH, (_, idm, labels_SB, policy) = self.frozen_part(model, batch, carry or Carry())
        if "policy" in model.parts:
            state = hidden_SBH if policy is None else policy
            policy = model.policy(state, model.base.rotary(batch.tokens_BS.shape[1]))
        if not model.base.has_head:
            return Carry(hidden_SBH, idm, labels_SB, policy)
        assert labels_SB is not None and policy is not None, "the last pipeline stage ends the policy"
        return self.loss(model, batch, hidden_SBH, policy, labels_SB)

    @torch.no_grad()
    def frozen_part(self, model: ColaModel, batch: Batch, carry: Carry) -> tuple[torch.Tensor | None, Carry]:
        """The base's state, and the carry with the IDM's state or, once the IDM has ended, the labels."""
        hidden_SBH = frozen_hidden(model, batch, carry)
        if "idm" not in model.parts:
            return hidden_SBH, carry
        state = hidden_SBH if carry.idm is None else carry.idm
        idm = model.idm(state, model.base.rotary(batch.tokens_BS.shape[1]))
        if not model.idm.ends_here:
            return hidden_SBH, carry._replace(idm=idm)
        return hidden_SBH, Carry(labels_SB=shift_to_previous(idm).argmax(-1))

    def loss(
        self,
        model: ColaModel,
        batch: Batch,
        hidden_SBH: torch.Tensor | None,
        policy_logits_SBA: torch.Tensor,
        labels_SB: torch.Tensor,
    ) -> StageLoss:
        """From the policy's logits and the IDM's actions to the loss."""
        losses_SB = torch.nn.functional.cross_entropy(
            policy_logits_SBA.flatten(0, 1), labels_SB.flatten(), reduction="none"
        ).view_as(labels_SB)
        loss = masked_mean(losses_SB)
        accuracy = masked_mean((policy_logits_SBA.argmax(-1) == labels_SB).float())
        means = {"loss": loss.detach(), "action_accuracy": accuracy}
        if not model.training:
            assert hidden_SBH is not None, "handed on to the last pipeline stage for evaluation"
            choice_SBA = straight_through_one_hot(policy_logits_SBA, None, temperature=1.0).one_hot_SBA
            losses_SB = prediction_losses(self.config.actions.output, model, hidden_SBH, choice_SBA, batch)
            means["prediction_loss"] = masked_mean(losses_SB)
        return StageLoss(loss, means, count_actions(labels_SB, self.config.actions.num_actions))
