"""Process groups: the one module that reads Megatron's global parallel state.

Everything else receives a `ParallelContext`. gloo serves CPU ranks, NCCL serves GPUs.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain import cpu_redirects

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """This process's place among the ranks."""

    rank: int
    world_size: int
    tensor_parallel_size: int
    pipeline_rank: int
    pipeline_size: int
    data_parallel_rank: int
    data_parallel_size: int
    data_parallel_group: dist.ProcessGroup
    groups: ProcessGroupCollection
    device: torch.device

    @property
    def is_first_rank(self) -> bool:
        """True on the rank that writes logs and manifests."""
        return self.rank == 0

    def data_parallel_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of `values` over the data-parallel ranks; a new tensor without gradient."""
        mean = values.detach().clone()
        if self.data_parallel_size > 1:
            dist.all_reduce(mean, group=self.data_parallel_group)
            mean /= self.data_parallel_size
        return mean

    def from_last_stage(self, value: Value) -> Value:
        """The `value` of the last pipeline stage, which alone knows the losses. Collective; must pickle."""
        if self.pipeline_size == 1:
            return value
        holder = [value]
        ranks = dist.get_process_group_ranks(self.groups.pp)
        dist.broadcast_object_list(holder, src=ranks[-1], group=self.groups.pp)
        return holder[0]

    def from_first_rank(self, value: Value) -> Value:
        """The `value` of the first rank, on all of them. Collective; must pickle."""
        holder = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def highest(self, values: Sequence[int]) -> list[int]:
        """The highest of each of `values` over all ranks. Collective."""
        if self.world_size == 1:
            return list(values)
        highest = torch.tensor(values, device=self.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return highest.tolist()


def launched_world_size() -> int:
    """Ranks torchrun started; 1 without torchrun. Known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's rank under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def parallel_context(
    tensor_parallel_size: int, seed: int, pipeline_parallel_size: int = 1
) -> Iterator[ParallelContext]:
    """Start torch.distributed and Megatron's groups, yield the context, and tear both down again.

    A process group that the caller has started already is used and left standing.
    """
    cpu_redirects.use_one_thread_a_rank()
    if cpu_redirects.on_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    starts_process_group = not dist.is_initialized()
    if starts_process_group:
        _initialize_process_group()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size,
        pipeline_model_parallel_size=pipeline_parallel_size,
        get_embedding_ranks=_no_shared_embedding,
        get_position_embedding_ranks=_no_shared_embedding,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    try:
        yield ParallelContext(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            data_parallel_group=parallel_state.get_data_parallel_group(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pipeline_size=pipeline_parallel_size,
            groups=ProcessGroupCollection.use_mpu_process_groups(),
            device=cpu_redirects.training_device(),
        )
    finally:
        gc.collect()  # models hold their groups, and groups threads
        parallel_state.destroy_model_parallel()
        if starts_process_group:
            dist.destroy_process_group()


def _no_shared_embedding(ranks: list[int], *_: object) -> list[int]:
    """Megatron sums gradients of embeddings shared by first and last stage; ours never are (config_checks)."""
    return ranks[:1]


def _initialize_process_group() -> None:
    backend = "nccl" if cpu_redirects.on_cuda() else "gloo"
    # NCCL would otherwise guess the device of each collective that comes without a tensor.
    device = cpu_redirects.training_device() if cpu_redirects.on_cuda() else None
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=device)
    else:  # a single process needs no rendezvous
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
