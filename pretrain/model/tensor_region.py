"""Entering and leaving the region in which every tensor-parallel rank holds a share of the weights.

Entered once for all the products that read one tensor, where Megatron's own layers would each communicate.
Shapes: S sequence, B batch, H hidden.
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.cpu_products import product


def enter_tensor_region(
    state_SBH: torch.Tensor, config: TransformerConfig, group: dist.ProcessGroup
) -> torch.Tensor:
    """All positions [S, B, H] on every rank; in the backward pass the ranks' gradients are summed."""
    return _enter(state_SBH, config.sequence_parallel, group)


def _enter(state_SBH: torch.Tensor, sequence_parallel: bool, group: dist.ProcessGroup | None) -> torch.Tensor:
    if sequence_parallel:
        return gather_from_sequence_parallel_region(state_SBH, tensor_parallel_output_grad=True, group=group)
    return copy_to_tensor_model_parallel_region(state_SBH, group=group)


def leave_tensor_region(
    part_SBH: torch.Tensor, config: TransformerConfig, group: dist.ProcessGroup
) -> torch.Tensor:
    """The sum of the ranks' parts; under sequence parallelism of this rank's positions only."""
    if config.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(part_SBH, group=group)
    return reduce_from_tensor_model_parallel_region(part_SBH, group=group)


def linear_in_region(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None = None,
    **_: object,
) -> torch.Tensor:
    """Stands in for the function that computes Megatron's parallel linear layers; its names and meanings."""
    if sequence_parallel or allreduce_dgrad:
        input = _enter(input, sequence_parallel, tp_group)
    output = product(input, weight)
    return output if bias is None else output + bias


class RegionLinear(ColumnParallelLinear):
    """A column-parallel product of a tensor that is in the region already; without bias, output left split.

    Megatron's own always computes a gradient for its input; this one skips it for an input that needs none, the
    frozen base's state.
    """

    def __init__(
        self, input_size: int, output_size: int, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(
            input_size, output_size, config=config, init_method=config.init_method, bias=False,
            disable_grad_reduce=True, tp_group=groups.tp,
        )  # fmt: skip
        self.sequence_parallel = False

    def forward(self, input_SBH: torch.Tensor) -> tuple[torch.Tensor, None]:
        """This rank's columns [S, B, columns], first of a pair as in Megatron's linear layers."""
        return product(input_SBH, self.weight), None
