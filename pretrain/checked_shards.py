"""Megatron's datasets over shards whose every read is checked: the bytes trained on are the bytes that were written.

Megatron maps a .bin into memory and believes it. Here a read takes the whole blocks of 64 KiB around the document,
compares each with the checksum that was taken while blending, and cuts the tokens out of these very bytes.
"""

import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, _BinReader
from xxhash import xxh3_64_intdigest

from data_prep.blended_data import BlendedShard
from data_prep.block_checksums import BLOCK_BYTES, REMEDY, read_block_checksums
from data_prep.errors import InputDataError
from data_prep.indexed_shards import bin_path, idx_path
from data_prep.output_files import file_checksum

FIND_ALL = "data_prep/verify_shards.py finds all damage"


class CheckedReader(_BinReader):
    """Reads tokens of a .bin in whole blocks and compares each block with its checksum, at every read.

    Raises (also from `read`):
        InputDataError: names the file, the block, and what to do.
    """

    def __init__(self, prefix: Path, shard: BlendedShard, vocab_size: int) -> None:
        self._path = bin_path(prefix)
        self._vocab_size = vocab_size
        self._bin_bytes = shard.bin_bytes
        self._checksums = read_block_checksums(prefix, shard.blocks_xxh3_128)
        self._file = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def read(self, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        """Return `count` tokens from byte `offset` on, of the shard's own dtype. [count]"""
        offset, size = int(offset), int(count) * np.dtype(dtype).itemsize
        first, end = offset // BLOCK_BYTES, -(-(offset + size) // BLOCK_BYTES)
        data = self._read_blocks(first, end)
        for block in range(first, end):
            begin = (block - first) * BLOCK_BYTES
            if xxh3_64_intdigest(data[begin : begin + BLOCK_BYTES]) != self._checksums[block]:
                raise self._damage(block, "is not what was written")  # or the file was cut
        tokens = np.frombuffer(data, dtype, count, offset - first * BLOCK_BYTES)
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self._vocab_size):
            place = int(np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))[0])
            block = (offset + place * tokens.itemsize) // BLOCK_BYTES
            raise self._damage(
                block, f"holds the token id {tokens[place]}, but the vocabulary has {self._vocab_size:,}"
            )
        return tokens

    def _read_blocks(self, first: int, end: int) -> memoryview:
        try:
            return memoryview(os.pread(self._file, (end - first) * BLOCK_BYTES, first * BLOCK_BYTES))
        except OSError as error:
            raise self._damage(first, f"cannot be read ({error.strerror})") from error

    def _damage(self, block: int, what: str) -> InputDataError:
        begin, end = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self._bin_bytes)
        return InputDataError(
            f"{self._path}: block {block:,} (bytes {begin:,} to {end:,}) {what}; {REMEDY}; {FIND_ALL}"
        )


class CheckedShard(IndexedDataset):
    """One shard of a blend, read through `CheckedReader`."""

    def __init__(self, prefix: str, shard: BlendedShard, vocab_size: int) -> None:
        super().__init__(prefix, mmap=False)
        self._origin = (prefix, shard, vocab_size)
        self.bin_reader = CheckedReader(Path(prefix), shard, vocab_size)

    def __reduce__(self) -> tuple[type["CheckedShard"], tuple[str, BlendedShard, int]]:
        # A loader process that is not forked opens it anew: the base class would do so with its own reader.
        return type(self), self._origin


@dataclass
class CheckedSamplesConfig(GPTDatasetConfig):
    """Megatron's options, and the shards by the prefixes under which Megatron knows them."""

    shards: dict[str, BlendedShard] = field(default_factory=dict)


class CheckedSamples(GPTDataset):
    """Megatron's samples of a fixed length, from shards that are checked."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: CheckedSamplesConfig) -> CheckedShard:
        """Open a shard. Called by Megatron's builder."""
        return CheckedShard(dataset_path, config.shards[dataset_path], config.tokenizer.vocab_size)


def check_indexes(shards: dict[str, BlendedShard], rank: int, ranks: int) -> None:
    """Read this rank's share of the .idx files whole: a wrong boundary of documents is as bad as a wrong token.

    Raises:
        InputDataError: one is not what was written.
    """
    for prefix in sorted(shards)[rank::ranks]:
        path = idx_path(Path(prefix))
        if file_checksum(path) != shards[prefix].idx_xxh3_128:
            raise InputDataError(f"{path}: was changed after it was written; {REMEDY}; {FIND_ALL}")
