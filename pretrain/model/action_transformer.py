"""A stack of Llama blocks over the base's hidden state, ending in action logits: the IDM and the policy.

Shapes: S sequence, B batch, H hidden, A actions.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from pretrain.config import RunConfig
from pretrain.model.specs import layer_spec, transformer_config


class ActionTransformer(MegatronModule):
    """`num_layers` causal decoder blocks, a norm of their own, and a linear head over the actions."""

    def __init__(self, config: RunConfig, num_layers: int, groups: ProcessGroupCollection) -> None:
        stack_config = transformer_config(config, num_layers)
        super().__init__(config=stack_config)
        self.tp_group = groups.tp
        self.blocks = TransformerBlock(config=stack_config, spec=layer_spec(), pg_collection=groups)
        self.head = ColumnParallelLinear(
            config.model.hidden_size,
            config.actions.num_actions,
            config=stack_config,
            init_method=stack_config.init_method,
            bias=False,
            gather_output=True,
            tp_group=groups.tp,
        )

    def forward(self, hidden_SBH: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Action logits [S, B, A] in fp32, the whole action set on every rank."""
        state_SBH = self.blocks(hidden_states=hidden_SBH, attention_mask=None, rotary_pos_emb=rotary)
        return self.head(state_SBH)[0].float()
