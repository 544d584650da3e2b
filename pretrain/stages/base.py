"""Stage `base`: plain Llama pre-training, which gives small recipes the base that later stages freeze."""

from pretrain.model.cola import ColaModel
from pretrain.stages.contract import Batch, Carry, Stage, StageLoss


class BaseStage(Stage):
    """Next-token cross-entropy on every position."""

    trained_parts = ("base",)
    frozen_parts = ()

    def forward(self, model: ColaModel, batch: Batch, carry: Carry | None) -> Carry | StageLoss:
        """Mean next-token loss, nats."""
        hidden_SBH = model.base.hidden(batch.tokens_BS, carry.hidden_SBH if carry else None)
        if not model.base.has_head:
            return Carry(hidden_SBH)
        loss = model.base.token_losses(hidden_SBH, batch.labels_BS).mean()
        return StageLoss(loss, {"loss": loss.detach(), "prediction_loss": loss.detach()})
