"""A checksum of tokenized documents that does not depend on their order or files, to compare three formats."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data_prep.indexed_shards import bin_path, read_index


class TokenDigest(NamedTuple):
    """What was written, in a form that can be compared."""

    documents: int
    tokens: int
    checksum: int
    """Sum of the documents' own checksums, modulo 2^64."""


def digest_documents(documents: Iterator[np.ndarray]) -> TokenDigest:
    """Sum up documents of int32 tokens, EOS included."""
    count = tokens = checksum = 0
    for document in documents:
        count += 1
        tokens += len(document)
        checksum = (checksum + xxhash.xxh3_64_intdigest(document.tobytes())) % 2**64
    return TokenDigest(count, tokens, checksum)


def _cut(tokens: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    begin = 0
    for end in ends.tolist():
        yield tokens[begin:end]
        begin = end


def indexed_documents(folder: Path) -> Iterator[np.ndarray]:
    """Documents of all .bin/.idx pairs under a folder."""
    for path in sorted(folder.rglob("*.idx")):
        prefix = path.with_suffix("")
        index = read_index(prefix)
        if index.tokens:
            tokens = np.memmap(bin_path(prefix), dtype=index.dtype, mode="r")
            yield from _cut(tokens, np.cumsum(index.lengths_tokens, dtype=np.int64))


def datatrove_documents(folder: Path) -> Iterator[np.ndarray]:
    """Documents of all .ds files under a folder; their index holds the documents' ends."""
    for path in sorted(folder.rglob("*.ds")):
        tokens = np.memmap(path, dtype=np.int32, mode="r")
        yield from _cut(tokens, np.fromfile(f"{path}.index", dtype=np.uint64).astype(np.int64))
