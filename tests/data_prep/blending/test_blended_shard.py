"""A shard of a blend: the pair that Megatron reads, and a checksum of every block of it; all or nothing."""

from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_prep.blending.blended_shard import BlendedShardWriter
from data_prep.block_checksums import BLOCK_BYTES, read_block_checksums
from data_prep.indexed_shards import check_pair
from data_prep.output_files import file_checksum


def test_three_files_that_fit(tmp_path: Path) -> None:
    tokens = np.arange(40_000, dtype=np.int32)
    with BlendedShardWriter(tmp_path, "train/a", tokens.dtype) as writer:
        for part in np.split(tokens, 4):
            writer.add(part)
        shard = writer.publish()
    prefix = tmp_path / "train/a"
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["a.bin", "a.idx", "a.xxh"]
    assert (shard.prefix, shard.documents, shard.tokens, shard.bin_bytes) == ("train/a", 4, 40_000, 160_000)
    assert check_pair(prefix) == (4, 40_000)
    for ending, checksum in (
        ("bin", shard.bin_xxh3_128),
        ("idx", shard.idx_xxh3_128),
        ("xxh", shard.blocks_xxh3_128),
    ):
        assert file_checksum(tmp_path / f"train/a.{ending}") == checksum
    data = tokens.tobytes()
    assert list(read_block_checksums(prefix, shard.blocks_xxh3_128)) == [
        xxhash.xxh3_64_intdigest(data[begin : begin + BLOCK_BYTES])
        for begin in range(0, len(data), BLOCK_BYTES)
    ]


def write_until_interrupted(folder: Path) -> None:
    with BlendedShardWriter(folder, "train/a", np.dtype(np.int32)) as writer:
        writer.add(np.arange(9, dtype=np.int32))
        raise KeyboardInterrupt


def test_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_until_interrupted(tmp_path)
    assert list((tmp_path / "train").iterdir()) == []
