"""Checksums of blocks: the same however the bytes arrive, one for every block, and a list that is itself checked."""

from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_prep.block_checksums import (
    BLOCK_BYTES,
    BlockChecksums,
    blocks_path,
    check_blocks_size,
    read_block_checksums,
)
from data_prep.errors import InputDataError, UserError

SIZES_BYTES = (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 7)


def random_bytes(size_bytes: int) -> bytes:
    return np.random.default_rng(size_bytes).bytes(size_bytes)


@pytest.mark.parametrize("size_bytes", SIZES_BYTES)
@pytest.mark.parametrize("piece_bytes", [1000, BLOCK_BYTES, 10 * BLOCK_BYTES])
def test_checksums_are_those_of_the_blocks(tmp_path: Path, size_bytes: int, piece_bytes: int) -> None:
    data = random_bytes(size_bytes)
    checksums = BlockChecksums()
    for start in range(0, size_bytes, piece_bytes):
        checksums.add(memoryview(data)[start : start + piece_bytes])
    prefix = tmp_path / "shard.v1"
    own = checksums.write(blocks_path(prefix))
    assert blocks_path(prefix).name == "shard.v1.xxh"
    check_blocks_size(prefix, size_bytes)
    assert list(read_block_checksums(prefix, own)) == [
        xxhash.xxh3_64_intdigest(data[start : start + BLOCK_BYTES])
        for start in range(0, size_bytes, BLOCK_BYTES)
    ]


def test_golden_bytes(tmp_path: Path) -> None:
    """The format does not change unnoticed: blends that are on disk have it."""
    checksums = BlockChecksums()
    checksums.add(memoryview(bytes(BLOCK_BYTES)))
    checksums.add(memoryview(b"the rest"))
    checksums.write(tmp_path / "x.xxh")
    assert (tmp_path / "x.xxh").read_bytes().hex() == "aa5cb602d302b233b7f516e3f2d7599e"


def test_a_list_that_was_changed_is_refused(tmp_path: Path) -> None:
    checksums = BlockChecksums()
    checksums.add(memoryview(random_bytes(2 * BLOCK_BYTES)))
    prefix = tmp_path / "shard"
    own = checksums.write(blocks_path(prefix))
    content = blocks_path(prefix).read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        blocks_path(prefix).write_bytes(changed)
        with pytest.raises(InputDataError, match=r"shard\.xxh: was changed after it was written"):
            read_block_checksums(prefix, own)
    blocks_path(prefix).write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"shard\.xxh has 8 bytes instead of 16; restore"):
        check_blocks_size(prefix, 2 * BLOCK_BYTES)
    blocks_path(prefix).unlink()
    with pytest.raises(UserError, match=r"shard\.xxh is missing; restore"):
        check_blocks_size(prefix, 2 * BLOCK_BYTES)
    with pytest.raises(InputDataError, match=r"shard\.xxh: cannot be read \(No such file"):
        read_block_checksums(prefix, own)
