"""Fingerprints of weights: one 64-bit number a tensor, the same for every layout of ranks.

A tensor's fingerprint is the sum, modulo 2^64, of a bijective mix of each element's bits and its global index. A
sum can be added up shard by shard, so no rank ever needs a whole tensor; and since the mix is a bijection, any change
of a single element changes it. It guards against mistakes and decay, not against an adversary.
"""

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, apply_factories, is_main_replica
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

from pretrain.counter_hash import GOLDEN_GAMMA, mix64

_BITS_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_ELEMENTS = 1 << 24


def fingerprint_tensors(sharded_state: ShardedStateDict) -> dict[str, str]:
    """Fingerprint of every tensor of a Megatron sharded state dict, over all ranks (a collective call).

    An FP8 tensor has the fingerprint of the values that its bytes and scales stand for.

    Returns:
        Hexadecimal fingerprints by checkpoint key; layers that share a key are told apart as `key[layer]`.
    """
    sums: dict[str, int] = {}
    for entry, value in sharded_state.items():
        # Splits fused tensors into the shards a checkpoint would hold; one entry at a time, for it may take copies.
        state = {entry: value}
        apply_factories(state)
        for shard in _sharded_tensors(state):
            if is_main_replica(shard.replica_id):
                name = _tensor_name(shard)
                sums[name] = sums.get(name, 0) + _shard_sum(shard)
    return {name: f"{total % 2**64:016x}" for name, total in sorted(_sum_over_ranks(sums).items())}


def differing_tensors(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names whose fingerprints differ or that only one side has."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def _sharded_tensors(state: object) -> list[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        return [state]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [shard for child in children for shard in _sharded_tensors(child)]


def _tensor_name(shard: ShardedTensor) -> str:
    layer = shard.global_offset[: shard.prepend_axis_num]
    return shard.key + "".join(f"[{index}]" for index in layer)


def _shard_sum(shard: ShardedTensor) -> int:
    """Sum of mixed elements of one shard, each counted at its place in the whole tensor."""
    axes = shard.prepend_axis_num
    global_shape, offset = shard.global_shape[axes:], shard.global_offset[axes:]
    data = dequantize_fp8_tensor(shard.data) if is_float8tensor(shard.data) else shard.data
    data = data.detach().contiguous()
    bits = data.view(_BITS_VIEW[data.element_size()]).flatten()
    total = 0
    for first in range(0, bits.numel(), _CHUNK_ELEMENTS):
        part = bits[first : first + _CHUNK_ELEMENTS].long()
        local = torch.arange(first, first + part.numel(), device=data.device)
        index, stride = torch.zeros_like(local), 1
        for size, start, length in reversed(list(zip(global_shape, offset, data.shape, strict=True))):
            index += (local % length + start) * stride
            local, stride = local // length, stride * size
        total += int(mix64(mix64(part) + (index + 1) * GOLDEN_GAMMA).sum())
    return total


def _sum_over_ranks(sums: dict[str, int]) -> dict[str, int]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return sums
    every_rank: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every_rank, sums)
    totals: dict[str, int] = {}
    for rank_sums in every_rank:
        for name, value in rank_sums.items():
            totals[name] = totals.get(name, 0) + value
    return totals
