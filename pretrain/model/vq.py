"""VQ-VAE assignment of actions, the alternative the paper reports as collapsing (ablation only).

The IDM's A outputs are read as an A-dimensional embedding; the nearest of A codes is the action.
Shapes: S sequence, B batch, A actions.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.actions import masked_mean
from pretrain.cpu_redirects import weight_device

COMMITMENT_WEIGHT = 0.25  # van den Oord et al. 2017, section 3.2


class VectorQuantiser(MegatronModule):
    """Nearest-code choice with straight-through gradients and the two VQ-VAE losses."""

    def __init__(self, config: TransformerConfig, num_actions: int) -> None:
        super().__init__(config=config)
        self.codes_AA = torch.nn.Parameter(
            config.init_method(
                torch.empty(num_actions, num_actions, dtype=config.params_dtype, device=weight_device())
            )
        )

    def nearest(self, logits_SBA: torch.Tensor) -> torch.Tensor:
        """Index [S, B] of the code nearest to each embedding."""
        codes_AA = self.codes_AA.float()  # like the logits, also where weights are bf16
        return (logits_SBA @ codes_AA.T * 2 - codes_AA.square().sum(-1)).argmax(-1)

    def forward(self, logits_SBA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The quantised embedding [S, B, A] for the world model, and the VQ loss."""
        code_SBA = self.codes_AA.float()[self.nearest(logits_SBA)]
        codebook_loss = (logits_SBA.detach() - code_SBA).square().mean(-1)
        commitment_loss = (logits_SBA - code_SBA.detach()).square().mean(-1)
        loss = masked_mean(codebook_loss + COMMITMENT_WEIGHT * commitment_loss)
        return logits_SBA + (code_SBA - logits_SBA).detach(), loss
