"""Fingerprints of weights: one 64-bit number a tensor, the same for every layout of ranks.

A tensor's fingerprint is the sum, modulo 2^64, of each element's bits times an odd pseudo-random weight of its place
along every axis; where rows are long, of each 8 bytes', which is faster. A sum can be added up shard by shard, so no
rank ever needs a whole tensor; and since odd numbers have inverses modulo 2^64, any change of a single element changes
it. It guards against mistakes and decay, not against an adversary; it runs at the speed of memory.
"""

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, apply_factories, is_main_replica
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

from pretrain.counter_hash import GOLDEN_GAMMA, mix64

BITS_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A row of so many elements, or a multiple, is taken in words of 8 bytes: no layout of ranks cuts it within a word.
_WORD_ROW_ELEMENTS = 64
_CHUNK_ELEMENTS = 1 << 18  # of 64 bits each, so that they stay in the cache


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
    """Sum of one shard's elements, each weighted by its place in the whole tensor."""
    offset = list(shard.global_offset[shard.prepend_axis_num :])
    data = dequantize_fp8_tensor(shard.data) if is_float8tensor(shard.data) else shard.data
    bits = data.detach().contiguous().view(BITS_VIEW[data.element_size()])
    if offset and shard.global_shape[-1] % _WORD_ROW_ELEMENTS == 0:
        bits, elements = _in_words(bits), 8 // data.element_size()
        assert offset[-1] % elements == 0, f"{shard.key} is cut within a word of {elements} elements"
        offset[-1] //= elements
    weights = [
        _place_weights(axis, start, length, bits.device)
        for axis, (start, length) in enumerate(zip(offset, bits.shape, strict=True))
    ]
    if not weights:  # a scalar
        return int(bits) * int(_place_weights(0, 0, 1, bits.device))
    sums = _weighted_row_sums(bits.reshape(-1, bits.shape[-1]), weights.pop()).view(bits.shape[:-1])
    while weights:
        sums = (sums * weights.pop()).sum(-1)
    return int(sums)


def _in_words(bits: torch.Tensor) -> torch.Tensor:
    """The same bytes as 64-bit integers, fewer along the last axis."""
    aligned = bits.storage_offset() * bits.element_size() % 8 == 0
    return (bits if aligned else bits.clone()).view(torch.int64)


def _weighted_row_sums(rows_RW: torch.Tensor, weights_W: torch.Tensor) -> torch.Tensor:
    """Product of a matrix and a vector, modulo 2^64; torch has none for integers on GPUs."""
    sums_R = torch.empty(len(rows_RW), dtype=torch.int64, device=rows_RW.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, rows_RW.shape[-1]))
    products = torch.empty(rows, rows_RW.shape[-1], dtype=torch.int64, device=rows_RW.device)
    for part, part_sums in zip(rows_RW.split(rows), sums_R.split(rows), strict=True):
        torch.sum(torch.mul(part, weights_W, out=products[: len(part)]), -1, out=part_sums)
    return sums_R


def _place_weights(axis: int, start: int, length: int, device: torch.device) -> torch.Tensor:
    """Odd 64-bit numbers of the places `start`, `start` + 1, ... along `axis`."""
    places = torch.arange(start + 1, start + 1 + length, device=device) + (axis << 48)
    return mix64(places * GOLDEN_GAMMA) | 1


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
