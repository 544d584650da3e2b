"""A fingerprint changes with any change of a tensor, and not with shards, their order, or replicas."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory

import pretrain.fingerprint
from pretrain.counter_hash import GOLDEN_GAMMA
from pretrain.fingerprint import differing_tensors, fingerprint_tensors

INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def whole(data: torch.Tensor, key: str = "weight", replica: int = 0) -> ShardedTensor:
    """A tensor that one rank holds completely."""
    return ShardedTensor.from_rank_offsets(key, data, replica_id=replica)


def shards(data: torch.Tensor, rows: int, columns: int = 1, key: str = "weight") -> list[ShardedTensor]:
    """A matrix cut into rows x columns equal blocks, each at its place."""
    return [
        ShardedTensor.from_rank_offsets(key, block.contiguous(), (0, i, rows), (1, j, columns))
        for i, band in enumerate(data.chunk(rows, dim=0))
        for j, block in enumerate(band.chunk(columns, dim=1))
    ]


def fingerprint(data: torch.Tensor) -> str:
    """Of one whole tensor."""
    return fingerprint_tensors({"x": whole(data)})["weight"]


def fingerprint_of(pieces: list[ShardedTensor]) -> str:
    """Of the one tensor that `pieces` are the shards of."""
    state: ShardedStateDict = {str(index): piece for index, piece in enumerate(pieces)}
    return fingerprint_tensors(state)["weight"]


def random_matrix(rows: int = 12, columns: int = 8, seed: int = 0) -> torch.Tensor:
    """Distinct numbers."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]), data=st.data())
def test_flipping_any_single_bit_changes_it(dtype: torch.dtype, data: st.DataObject) -> None:
    matrix = (random_matrix() * 10).to(dtype)
    flipped = matrix.clone()
    element = data.draw(st.integers(0, matrix.numel() - 1))
    bit = data.draw(st.integers(0, 8 * matrix.element_size() - 1))
    bits = flipped.view(INTEGER_OF_SIZE[matrix.element_size()]).flatten()
    top_bit = 8 * matrix.element_size() - 1
    bits[element] ^= 1 << bit if bit < top_bit else -(1 << bit)
    assert fingerprint(flipped) != fingerprint(matrix)
    bits[element] ^= 1 << bit if bit < top_bit else -(1 << bit)
    assert fingerprint(flipped) == fingerprint(matrix)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_swapping_two_rows_or_two_elements_changes_it(data: st.DataObject) -> None:
    matrix = random_matrix()
    first, second = data.draw(st.lists(st.integers(0, 11), min_size=2, max_size=2, unique=True))
    rows = torch.arange(12)
    rows[[first, second]] = rows[[second, first]]
    assert fingerprint(matrix[rows]) != fingerprint(matrix)
    swapped = matrix.flatten().clone()
    swapped[[first, second]] = swapped[[second, first]]
    assert fingerprint(swapped.view(12, 8)) != fingerprint(matrix)


def test_swaps_are_beyond_a_sum_that_ignores_places() -> None:
    """The fault twin: without the index in the mix, all of these would pass unnoticed."""
    matrix = random_matrix()
    bits = matrix.view(torch.int32).long()
    assert int(pretrain.fingerprint.mix64(bits).sum()) == int(pretrain.fingerprint.mix64(bits.flip(0)).sum())
    assert fingerprint(matrix.flip(0)) != fingerprint(matrix)


def test_moving_one_element_among_zeros_changes_it() -> None:
    """Also for the value zero everywhere else, and for minus zero."""
    names = {fingerprint(torch.zeros(12, 8))}
    for place in range(12 * 8):
        moved = torch.zeros(12 * 8)
        moved[place] = 1.0
        names.add(fingerprint(moved.view(12, 8)))
        moved[place] = -0.0
        names.add(fingerprint(moved.view(12, 8)))
    assert len(names) == 1 + 2 * 12 * 8


def test_transposing_changes_it() -> None:
    matrix = random_matrix(8, 8)
    assert fingerprint(matrix.T) != fingerprint(matrix)


def test_memory_layout_does_not_matter() -> None:
    """Values and places count, not strides."""
    matrix = random_matrix()
    assert fingerprint(matrix.T.contiguous().T) == fingerprint(matrix)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (4, 1), (1, 2), (1, 8), (2, 4), (12, 8)])
def test_the_sum_over_shards_is_that_of_the_whole(rows: int, columns: int) -> None:
    """However it is cut, and in whatever order the shards are visited."""
    matrix = random_matrix()
    pieces = shards(matrix, rows, columns)
    assert fingerprint_of(pieces) == fingerprint(matrix)
    assert fingerprint_of(pieces[::-1]) == fingerprint(matrix)


@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (1, 2)])
def test_shards_in_each_others_places_are_not_the_whole(rows: int, columns: int) -> None:
    """The fault twin: right data, wrong offsets."""
    matrix = random_matrix()
    first, second = shards(matrix, rows, columns)
    first.data, second.data = second.data, first.data
    assert fingerprint_of([first, second]) != fingerprint(matrix)


def test_a_missing_shard_or_one_counted_twice_shows() -> None:
    matrix = random_matrix()
    first, second = shards(matrix, 2)
    assert fingerprint_of([first]) != fingerprint(matrix)
    assert fingerprint_of([first, second, first]) != fingerprint(matrix)


def test_replicas_are_counted_once() -> None:
    """A copy on another rank says so by its replica id, a number or a tuple of them."""
    matrix = random_matrix()
    tuple_replica = ShardedTensor.from_rank_offsets("weight", matrix, replica_id=(0, 1, 0))
    assert fingerprint_of([whole(matrix), whole(matrix, replica=1), tuple_replica]) == fingerprint(matrix)


def test_a_fused_tensor_is_fingerprinted_as_the_shards_it_is_saved_as() -> None:
    """Megatron fuses gate and up projections; a rank's half of each lies apart in the whole tensor."""
    matrix = random_matrix()
    gate, up = matrix.chunk(2)

    def split(key: str, fused: torch.Tensor, replica_id: int, flattened_range: None) -> list[ShardedTensor]:
        halves = fused.chunk(2)
        return [ShardedTensor.from_rank_offsets(key, half, (0, i, 2)) for i, half in enumerate(halves)]

    state = {
        "x": ShardedTensorFactory("weight", torch.cat([gate, up]), split, lambda parts: torch.cat(parts))
    }
    assert fingerprint_tensors(state)["weight"] == fingerprint(matrix)


def layer_shards(layers: list[torch.Tensor]) -> ShardedStateDict:
    """Layers as Megatron stacks them: one key, the layer as first axis."""
    return {
        f"layer{index}": ShardedTensor.from_rank_offsets(
            "weight", data, (0, index, len(layers)), prepend_axis_num=1
        )
        for index, data in enumerate(layers)
    }


def test_layers_that_share_a_key_are_told_apart() -> None:
    """Each has its own name and the number it would have alone; swapping two is noticed as both."""
    layers = [random_matrix(seed=seed) for seed in range(3)]
    found = fingerprint_tensors(layer_shards(layers))
    assert found == {f"weight[{index}]": fingerprint(data) for index, data in enumerate(layers)}
    swapped = fingerprint_tensors(layer_shards([layers[1], layers[0], layers[2]]))
    assert differing_tensors(found, swapped) == ["weight[0]", "weight[1]"]


def test_tensors_are_told_apart_by_key_in_nested_states() -> None:
    state = {"a": whole(random_matrix(), "a"), "rest": {"b": [whole(random_matrix(seed=1), "b")], "step": 3}}
    assert fingerprint_tensors(state) == {
        "a": fingerprint(random_matrix()),
        "b": fingerprint(random_matrix(seed=1)),
    }


def test_vectors_and_scalars_have_fingerprints() -> None:
    assert len({fingerprint(torch.tensor(value)) for value in (0.0, 1.0, -1.0)}) == 3
    assert fingerprint(torch.arange(5.0)) != fingerprint(torch.arange(5.0).flip(0))


def test_large_tensors_are_summed_in_chunks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fingerprint(random_matrix())
    for chunk_elements in (1, 7, 95, 96):
        monkeypatch.setattr(pretrain.fingerprint, "_CHUNK_ELEMENTS", chunk_elements)
        assert fingerprint(random_matrix()) == expected


def splitmix_finaliser(value: int) -> int:
    """mix64 on unsigned Python integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def place_weight(axis: int, place: int) -> int:
    """The odd number of a place along an axis."""
    return splitmix_finaliser((place + 1 + (axis << 48)) * GOLDEN_GAMMA % 2**64) | 1


def test_it_is_the_sum_that_checkpoints_of_this_version_hold() -> None:
    """Over elements: bits * weight of the row * weight of the column, modulo 2^64, in hexadecimal."""
    values = [[0.0, -1.5, 3e-9], [7.0, -0.0, 1e30]]
    total = 0
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            (bits,) = struct.unpack("<i", struct.pack("<f", value))
            total += bits * place_weight(0, row) * place_weight(1, column)
    assert fingerprint(torch.tensor(values)) == f"{total % 2**64:016x}"


def test_long_rows_are_taken_in_words_of_eight_bytes() -> None:
    """As the fingerprint of the same bytes in 64-bit integers; cut in columns, and at any place in memory, the same."""
    memory = torch.randn(1 + 4 * 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    matrix = memory[1:].view(4, 128)
    expected = fingerprint(matrix.clone())
    words = matrix.clone().view(torch.int64)
    total = sum(
        bits * place_weight(0, row) * place_weight(1, column)
        for row, line in enumerate(words.tolist())
        for column, bits in enumerate(line)
    )
    assert expected == f"{total % 2**64:016x}"
    assert fingerprint(matrix) == fingerprint_of(shards(matrix, 2, 4)) == expected
    matrix[2, 77] = -matrix[2, 77]
    assert fingerprint(matrix) != expected


def test_differing_tensors_are_those_changed_or_on_one_side_only() -> None:
    expected, found = {"same": "1", "changed": "2", "gone": "3"}, {"same": "1", "changed": "9", "new": "4"}
    assert differing_tensors(expected, found) == ["changed", "gone", "new"]
    assert differing_tensors(expected, dict(expected)) == []
