"""RMSNorm for machines without Transformer Engine, on which Megatron's own wrapper refuses sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.cpu_redirects import weight_device


class RmsNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in the form Megatron's specs construct."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, device=weight_device(), dtype=config.params_dtype)
        # Megatron sums such gradients over the tensor-parallel ranks, each of which sees a part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
