"""A stack of Llama blocks over the base's hidden state, ending in action logits: the IDM and the policy.

Shapes: S sequence (of this rank under sequence parallelism), B batch, H hidden, A actions.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from pretrain.config import RunConfig
from pretrain.model.kernels import block_submodules
from pretrain.model.specs import seeded, transformer_config
from pretrain.placement import place_layers

# Added to a part's seed for its head, beyond the numbers of its blocks.
HEAD_SEED = 900


class ActionTransformer(MegatronModule):
    """Causal decoder blocks, a norm of their own, and a linear head over the actions; or a pipeline stage's share."""

    def __init__(self, config: RunConfig, part: str, groups: ProcessGroupCollection) -> None:
        placement, stage = place_layers(config), groups.pp.rank()
        stack_config = transformer_config(config, part)
        super().__init__(config=stack_config)
        self.tp_group = groups.tp
        self.ends_here = placement.complete_before(part, stage + 1)
        self.blocks = TransformerBlock(
            config=stack_config,
            spec=block_submodules(placement.blocks_on(part, stage)),
            post_process=self.ends_here,
            pg_collection=groups,
        )
        if self.ends_here:
            with seeded(torch.initial_seed() + HEAD_SEED):
                self.head = ColumnParallelLinear(
                    config.model.hidden_size,
                    config.actions.num_actions,
                    config=stack_config,
                    init_method=stack_config.init_method,
                    bias=False,
                    gather_output=True,
                    tp_group=groups.tp,
                )

    def forward(self, state_SBH: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Action logits [S, B, A] in fp32, all positions and actions on every rank; the state, if blocks follow."""
        state_SBH = self.blocks(hidden_states=state_SBH, attention_mask=None, rotary_pos_emb=rotary)
        return self.head(state_SBH)[0].float() if self.ends_here else state_SBH
