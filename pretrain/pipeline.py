"""Pipeline stages over a frozen base: Megatron's 1F1B schedule, with a communicator that knows what is frozen.

Across a boundary go the tensors of `Carry` that exist there; gradients come back only for the one that has any.
Between two stages of a frozen base nothing comes back at all, where Megatron's own communicator would wait for it.

Shapes: S sequence (of this rank under sequence parallelism), B batch, H hidden, A actions.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from pretrain.config import RunConfig
from pretrain.parallel import ParallelContext
from pretrain.placement import Placement, place_layers
from pretrain.stages.contract import Batch, Carry, StageLoss

# The field of Carry that has a gradient, by training stage.
TRAINED_FIELD = {"base": "hidden_SBH", "idm": "idm", "policy": "policy_SBH"}


class WireTensor(NamedTuple):
    """One tensor that crosses a boundary between two pipeline stages."""

    field: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool


def crossing(config: RunConfig, placement: Placement, cut: int, training: bool) -> list[WireTensor]:
    """What crosses from pipeline stage `cut - 1` to `cut`, in order."""
    parallel, batch = config.parallel, config.training.micro_batch_size
    length, hidden_size = config.data.sequence_length, config.model.hidden_size
    local_length = length // parallel.tensor_parallel_size if parallel.sequence_parallel else length
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    state: tuple[int, ...] = (local_length, batch, hidden_size)
    begun = {part: placement.done_before(part, cut) > 0 for part in ("idm", "policy")}
    idm_complete = begun["idm"] and placement.complete_before("idm", cut)
    tensors = []
    if not (
        begun["policy"] and training
    ):  # the policy's own state replaces it, but for the world model's loss
        tensors.append(("hidden_SBH", state, dtype))
    if begun["idm"] and not idm_complete:
        tensors.append(("idm", state, dtype))
    elif idm_complete and config.stage == "idm":
        tensors.append(("idm", (length, batch, config.actions.num_actions), torch.float32))
    elif idm_complete:
        tensors.append(("labels_SB", (length, batch), torch.int64))
    if begun["policy"]:
        tensors.append(("policy_SBH", state, dtype))
    trained = TRAINED_FIELD[config.stage]
    return [WireTensor(*tensor, has_gradient=training and tensor[0] == trained) for tensor in tensors]


class FrozenAwareCommunicator(P2PCommunicator):
    """Sends and receives `Carry`s for Megatron's schedule, which itself sees only the tensor with a gradient."""

    def __init__(
        self,
        context: ParallelContext,
        model_config: ModelParallelConfig,
        incoming: list[WireTensor],
        outgoing: list[WireTensor],
    ) -> None:
        super().__init__(context.groups.pp, model_config)
        self.device, self.incoming, self.outgoing = context.device, incoming, outgoing
        self.received: Carry | None = None
        self.to_send: Carry | None = None

    def recv_forward(self, tensor_shapes: object, is_first_stage: bool) -> list[torch.Tensor | None]:
        """Receive a `Carry`; returns its tensor with a gradient, if there is one."""
        return self._exchange(receive_forward=not is_first_stage)[0]

    def send_forward(self, output_tensors: object, is_last_stage: bool) -> None:
        """Send the `Carry` in `to_send`."""
        self._exchange(send_forward=not is_last_stage)

    def recv_backward(self, tensor_shapes: object, is_last_stage: bool) -> list[torch.Tensor | None]:
        """Receive the gradient of what was sent forward; None across a frozen boundary."""
        return self._exchange(receive_backward=not is_last_stage)[1]

    def send_backward(self, input_tensor_grads: list[torch.Tensor | None], is_first_stage: bool) -> None:
        """Send the gradient of what was received; nothing across a frozen boundary."""
        self._exchange(gradient=input_tensor_grads[0])

    def send_forward_recv_backward(
        self, output_tensors: object, tensor_shapes: object, is_last_stage: bool
    ) -> list[torch.Tensor | None]:
        """Both at once, with the next stage."""
        return self._exchange(send_forward=not is_last_stage, receive_backward=not is_last_stage)[1]

    def send_backward_recv_forward(
        self, input_tensor_grads: list[torch.Tensor | None], tensor_shapes: object, is_first_stage: bool
    ) -> list[torch.Tensor | None]:
        """Both at once, with the stage before."""
        return self._exchange(gradient=input_tensor_grads[0], receive_forward=not is_first_stage)[0]

    def _exchange(
        self,
        send_forward: bool = False,
        receive_forward: bool = False,
        receive_backward: bool = False,
        gradient: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Post all transfers, then wait; returns the input with a gradient, and the gradient of the output."""
        operations = []
        if send_forward:
            assert self.to_send is not None
            for wire in self.outgoing:
                tensor = getattr(self.to_send, wire.field).detach().contiguous()
                assert tensor.shape == wire.shape and tensor.dtype == wire.dtype, (
                    wire,
                    tensor.shape,
                    tensor.dtype,
                )
                operations.append(dist.P2POp(dist.isend, tensor, self.next_rank, self.pp_group))
        if gradient is not None:
            operations.append(dist.P2POp(dist.isend, gradient.contiguous(), self.prev_rank, self.pp_group))
        buffers = {wire.field: self._buffer(wire) for wire in self.incoming} if receive_forward else {}
        operations += [dist.P2POp(dist.irecv, b, self.prev_rank, self.pp_group) for b in buffers.values()]
        returning = [self._buffer(wire) for wire in self.outgoing if wire.has_gradient and receive_backward]
        operations += [dist.P2POp(dist.irecv, b, self.next_rank, self.pp_group) for b in returning]
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        if receive_forward:
            self.received = Carry(**buffers)
        trained = [
            buffers[wire.field].requires_grad_() for wire in self.incoming if wire.has_gradient and buffers
        ]
        return [*trained, None][:1], [*returning, None][:1]

    def _buffer(self, wire: WireTensor) -> torch.Tensor:
        return torch.empty(wire.shape, dtype=wire.dtype, device=self.device)


class Pipeline:
    """Runs the micro-batches of a step or of a validation batch through all pipeline stages."""

    def __init__(self, config: RunConfig, context: ParallelContext, model: torch.nn.Module) -> None:
        self.config, self.context, self.model = config, context, model
        self.placement = place_layers(config)

    def run(
        self,
        forward: Callable[[Batch, Carry | None], Carry | StageLoss],
        batches: Iterator[Batch],
        training: bool,
    ) -> list[StageLoss]:
        """Losses of this rank's micro-batches of one global batch; empty but on the last pipeline stage. Collective."""
        sizes, context = self.config.training, self.context
        communicator = self._communicator(training) if context.pipeline_size > 1 else None

        def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            result = forward(next(batches), communicator.received if communicator else None)
            if isinstance(result, StageLoss):
                # The schedule divides the output in place by the number of micro-batches; the log must not change.
                return result.loss.clone(), lambda output: (output, result)
            assert communicator is not None
            communicator.to_send = result
            trained = [getattr(result, wire.field) for wire in communicator.outgoing if wire.has_gradient]
            return trained[0] if trained else torch.empty(1), None

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=sizes.global_batch_size // (sizes.micro_batch_size * context.data_parallel_size),
            seq_length=self.config.data.sequence_length,
            micro_batch_size=sizes.micro_batch_size,
            forward_only=not training,
            p2p_communicator=communicator,
            pg_collection=context.groups if communicator else None,
        )

    def _communicator(self, training: bool) -> FrozenAwareCommunicator:
        rank, size = self.context.pipeline_rank, self.context.pipeline_size
        incoming = crossing(self.config, self.placement, rank, training) if rank > 0 else []
        outgoing = crossing(self.config, self.placement, rank + 1, training) if rank < size - 1 else []
        return FrozenAwareCommunicator(self.context, get_model_config(self.model), incoming, outgoing)
