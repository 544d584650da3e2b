"""The language world model: a codebook and merge MLPs between the base's hidden state and its head.

The merge MLP of the paper reads the concatenation [state; action embedding]. Only A embeddings exist, so the
action's half of the product is a table of A rows, made once a micro-batch; a token picks its row. The same sum, at
half the FLOPs of the gate and up projections.

Shapes: S sequence, B batch, H hidden, A actions, F MLP width (this rank's part).
"""

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.config import RunConfig
from pretrain.cpu_redirects import weight_device
from pretrain.model.kernels import column_linear, enter_for_columns, row_linear
from pretrain.model.specs import InitMethod, normal_init, transformer_config
from pretrain.model.tensor_region import RegionLinear


class MergeLayer(MegatronModule):
    """s + W_down(silu(W_gate [s; a]) * (W_up [s; a])): one residual SwiGLU over state and action."""

    def __init__(
        self, config: TransformerConfig, down_init_method: InitMethod, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.tp_group = groups.tp
        hidden_size, ffn_hidden_size = config.hidden_size, config.ffn_hidden_size
        self.groups = groups
        self.gate_state, self.up_state = (
            column_linear(hidden_size, ffn_hidden_size, config, groups) for _ in range(2)
        )
        self.gate_action, self.up_action = (
            RegionLinear(hidden_size, ffn_hidden_size, config, groups) for _ in range(2)
        )
        self.down = row_linear(ffn_hidden_size, hidden_size, config, down_init_method, groups)

    def forward(
        self, state_SBH: torch.Tensor, one_hot_SBA: torch.Tensor, codes_AH: torch.Tensor
    ) -> torch.Tensor:
        """The next state [S, B, H]; `one_hot_SBA` selects (and carries gradients to) the actions.

        Choices and codes are in the tensor region and hold all positions; the state holds this rank's.
        """
        input_SBH = enter_for_columns(state_SBH, self.config, self.groups)
        gate_SBF = self.gate_state(input_SBH)[0] + one_hot_SBA @ self.gate_action(codes_AH)[0]
        up_SBF = self.up_state(input_SBH)[0] + one_hot_SBA @ self.up_action(codes_AH)[0]
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
        layer_config = transformer_config(config, "world_model")
        super().__init__(config=layer_config)
        self.tp_group = groups.tp
        num_actions, hidden_size = config.actions.num_actions, config.model.hidden_size
        dtype = layer_config.params_dtype
        self.codebook_AH = torch.nn.Parameter(
            layer_config.init_method(
                torch.empty(num_actions, hidden_size, dtype=dtype, device=weight_device())
            )
        )
        # Zero at the start of the residual form, so that step 0 is exactly the base.
        down_init = normal_init(0.0) if config.actions.output == "residual" else layer_config.init_method
        self.merge_layers = MergeLayers(layer_config, down_init, groups)

    def forward(self, hidden_SBH: torch.Tensor, one_hot_SBA: torch.Tensor) -> torch.Tensor:
        """State [S, B, H] after the merge layers."""
        # Each rank's table rows give part of the gradient of choice and codes; the copies sum them over the ranks.
        choice_SBA, codes_AH = (
            copy_to_tensor_model_parallel_region(tensor, group=self.tp_group)
            for tensor in (one_hot_SBA.to(hidden_SBH.dtype), self.codebook_AH)
        )
        with get_fp8_context(self.config):
            return self.merge_layers(hidden_SBH, choice_SBA, codes_AH)
