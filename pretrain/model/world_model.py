"""The language world model: a codebook and merge MLPs between the base's hidden state and its head.

The merge MLP of the paper reads the concatenation [state; action embedding]. Only A embeddings exist, so the
action's half of the product is a table of A rows, made once a micro-batch; a token picks its row. The same sum, at
half the FLOPs of the gate and up projections.

Shapes: S sequence, B batch, H hidden, A actions, F MLP width (this rank's part).
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.config import RunConfig
from pretrain.model.specs import InitMethod, normal_init, transformer_config


class MergeLayer(MegatronModule):
    """s + W_down(silu(W_gate [s; a]) * (W_up [s; a])): one residual SwiGLU over state and action."""

    def __init__(
        self, config: TransformerConfig, down_init_method: InitMethod, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.tp_group = groups.tp
        hidden_size, ffn_hidden_size = config.hidden_size, config.ffn_hidden_size

        def column() -> ColumnParallelLinear:
            return ColumnParallelLinear(
                hidden_size, ffn_hidden_size, config=config, init_method=config.init_method, bias=False,
                tp_group=groups.tp,
            )  # fmt: skip

        self.gate_state, self.gate_action = column(), column()
        self.up_state, self.up_action = column(), column()
        self.down = RowParallelLinear(
            ffn_hidden_size,
            hidden_size,
            config=config,
            init_method=down_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=groups.tp,
        )

    def forward(
        self, state_SBH: torch.Tensor, one_hot_SBA: torch.Tensor, codes_AH: torch.Tensor
    ) -> torch.Tensor:
        """The next state [S, B, H]; `one_hot_SBA` selects (and carries gradients to) the actions."""
        gate_table_AF, up_table_AF = self.gate_action(codes_AH)[0], self.up_action(codes_AH)[0]
        gate_SBF = self.gate_state(state_SBH)[0] + one_hot_SBA @ gate_table_AF
        up_SBF = self.up_state(state_SBH)[0] + one_hot_SBA @ up_table_AF
        return state_SBH + self.down(torch.nn.functional.silu(gate_SBF) * up_SBF)[0]


class MergeLayers(MegatronModule):
    """The merge layers in a row. Not a ModuleList: Megatron would save a list's tensors as if they were not split."""

    def __init__(
        self, config: TransformerConfig, down_init_method: InitMethod, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.tp_group = groups.tp
        for index in range(config.num_layers):
            self.add_module(str(index), MergeLayer(config, down_init_method, groups))

    def forward(
        self, state_SBH: torch.Tensor, one_hot_SBA: torch.Tensor, codes_AH: torch.Tensor
    ) -> torch.Tensor:
        """The state [S, B, H] after the last layer."""
        for merge in self.children():
            state_SBH = merge(state_SBH, one_hot_SBA, codes_AH)
        return state_SBH


class WorldModel(MegatronModule):
    """Codebook and merge layers: (hidden state, action) -> the state the base's head reads."""

    def __init__(self, config: RunConfig, groups: ProcessGroupCollection) -> None:
        layer_config = transformer_config(config, config.actions.num_merge_layers)
        super().__init__(config=layer_config)
        self.tp_group = groups.tp
        num_actions, hidden_size = config.actions.num_actions, config.model.hidden_size
        dtype = layer_config.params_dtype
        self.codebook_AH = torch.nn.Parameter(
            layer_config.init_method(torch.empty(num_actions, hidden_size, dtype=dtype))
        )
        # Zero at the start of the residual form, so that step 0 is exactly the base.
        down_init = normal_init(0.0) if config.actions.output == "residual" else layer_config.init_method
        self.merge_layers = MergeLayers(layer_config, down_init, groups)

    def forward(self, hidden_SBH: torch.Tensor, one_hot_SBA: torch.Tensor) -> torch.Tensor:
        """State [S, B, H] after the merge layers."""
        # Each rank's table rows give part of the gradient of the choice; the copy sums them over the ranks.
        choice_SBA = copy_to_tensor_model_parallel_region(
            one_hot_SBA.to(hidden_SBH.dtype), group=self.tp_group
        )
        return self.merge_layers(hidden_SBH, choice_SBA, self.codebook_AH)
