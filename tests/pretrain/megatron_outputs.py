"""What a Megatron CoLA model computes, in the batch-first layout of the Hugging Face side.

Shapes: B batch, S sequence, H hidden, V vocabulary, A actions.
"""

from dataclasses import dataclass

import torch

from pretrain.actions import shift_to_previous
from pretrain.model.cola import ColaModel
from pretrain.stages.contract import Batch, Stage, StageLoss
from pretrain.stages.idm import prediction_losses


def loss_on_one_rank(stage: Stage, model: ColaModel, batch: Batch) -> StageLoss:
    """One micro-batch where one pipeline stage holds everything."""
    result = stage.forward(model, batch, None)
    assert isinstance(result, StageLoss)
    return result


@dataclass
class MegatronOutputs:
    """All parts of one forward pass, no gradient."""

    model: ColaModel
    output_form: str
    tokens_BS: torch.Tensor
    action_shift: int = 1

    def __post_init__(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.hidden_SBH = self.model.base.hidden(self.tokens_BS)
            rotary = self.model.base.rotary(self.tokens_BS.shape[1])
            self.idm_logits_SBA = self.model.idm(self.hidden_SBH, rotary)
            self.policy_logits_BSA = self.model.policy(self.hidden_SBH, rotary).transpose(0, 1)
            self.hidden_BSH = self.hidden_SBH.transpose(0, 1)
            self.base_logits_BSV = self.model.base.logits(self.hidden_SBH).transpose(0, 1)

    def inferred_actions(self) -> torch.Tensor:
        """The IDM's argmax actions [B, S], shifted as in training (by one, unless a fault is wanted)."""
        logits_SBA = self.idm_logits_SBA
        for _ in range(self.action_shift):
            logits_SBA = shift_to_previous(logits_SBA)
        return logits_SBA.argmax(-1).T

    @torch.no_grad()
    def world_logits(self, actions_BS: torch.Tensor) -> torch.Tensor:
        """World-model logits [B, S, V] by the stage's own path to the head."""
        captured: list[torch.Tensor] = []
        base = self.model.base

        def capture(state_SBH: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
            captured.append(base.logits(state_SBH))
            return torch.zeros(captured[0].shape[:2])

        base.token_losses = capture  # type: ignore[method-assign]
        one_hot = torch.nn.functional.one_hot(actions_BS.T, self.model.world_model.codebook_AH.shape[0])
        batch = Batch(self.tokens_BS, self.tokens_BS, torch.arange(len(self.tokens_BS)))
        prediction_losses(self.output_form, self.model, self.hidden_SBH, one_hot.float(), batch)
        del base.token_losses
        return captured[0].transpose(0, 1)
