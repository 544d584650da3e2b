"""Find the train documents that also stand in a validation split: exactly, and at a fraction of reading's cost.

Of every validation document two numbers are kept: a sketch (a hash of its length and of six of its tokens),
which numpy computes for thousands of documents at once, and the hash of all its tokens. Only where a train
document's sketch is that of a validation document are all its tokens hashed.
"""

from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np
import xxhash

from data_prep.blending.keys import mix
from data_prep.blending.sources import SourceSplit, scan_documents, waiting_bar
from data_prep.errors import IntegrityError
from data_prep.indexed_shards import bin_path

SKETCH_FACTOR = np.uint64(0xD6E8FEB86659FD93)
DIGEST = np.dtype("V16")  # xxh3, 128 bits: no enemy picks the documents
READ_TOKENS = 1 << 24


def documents_within(lengths_tokens: np.ndarray, limit_tokens: int) -> Iterator[slice]:
    """Cut a row of documents into parts of at most `limit_tokens`, or of a single longer document."""
    ends = np.cumsum(lengths_tokens, dtype=np.int64)
    start = 0
    while start < len(ends):
        begin_tokens = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, begin_tokens + limit_tokens, side="right"))
        stop = max(stop, start + 1)
        yield slice(start, stop)
        start = stop


def sketch_documents(tokens: np.ndarray, lengths_tokens: np.ndarray) -> np.ndarray:
    """Hash length and six tokens of each document.

    Args:
        tokens: the documents, one after another. [sum of lengths].
        lengths_tokens: [documents] integers, all at least 1.

    Returns:
        [documents] uint64.
    """
    lengths = lengths_tokens.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    sketches = lengths.astype(np.uint64)
    for place in (0, np.minimum(1, lengths - 1), lengths // 4, lengths // 2, 3 * lengths // 4, lengths - 2):
        sketches *= SKETCH_FACTOR
        sketches ^= tokens[starts + np.maximum(place, 0)].astype(np.uint64)
    return mix(sketches)


class ValidationDocuments:
    """All documents of some validation splits, as their sketches and hashes: 24 bytes a document."""

    def __init__(self, sketches: np.ndarray, digests: np.ndarray) -> None:
        """Takes a sketch (uint64) and a digest (DIGEST) for each document, in any order."""
        self._sketches = np.unique(sketches)
        self._digests = np.unique(digests)

    @classmethod
    def read(cls, splits: Iterable[SourceSplit], dtype: np.dtype) -> Self:
        """Read all documents of the splits. Raises IntegrityError when a file is shorter than its index says."""
        sketches, digests = [np.empty(0, np.uint64)], [np.empty(0, DIGEST)]
        splits = list(splits)
        total = sum(split.documents for split in splits)
        with waiting_bar("validation", total, "doc") as bar:
            for split in splits:
                for tokens, lengths in _read_documents(split, dtype):
                    sketches.append(sketch_documents(tokens, lengths))
                    digests.append(_digest_documents(tokens, lengths))
                    bar.update(len(lengths))
        return cls(np.concatenate(sketches), np.concatenate(digests))

    def contain(self, tokens: np.ndarray, lengths_tokens: np.ndarray) -> np.ndarray:
        """Say of each document whether it is one of these.

        Args:
            tokens: the documents, one after another. [sum of lengths].
            lengths_tokens: [documents] integers, all at least 1.

        Returns:
            [documents] bool.
        """
        found = _is_in(sketch_documents(tokens, lengths_tokens), self._sketches)
        ends = np.cumsum(lengths_tokens, dtype=np.int64)
        for number in np.flatnonzero(found):
            document = tokens[ends[number] - lengths_tokens[number] : ends[number]]
            digest = _digest_documents(document, np.array([len(document)]))
            found[number] = _is_in(digest, self._digests)[0]
        return found


def _is_in(values: np.ndarray, sorted_values: np.ndarray) -> np.ndarray:
    if not len(sorted_values):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    return sorted_values[places] == values


def _digest_documents(tokens: np.ndarray, lengths_tokens: np.ndarray) -> np.ndarray:
    """Hash of all tokens of each document. [documents] DIGEST."""
    ends = np.cumsum(lengths_tokens, dtype=np.int64)
    data = tokens.data.cast("B")
    size = tokens.dtype.itemsize
    digests = [
        xxhash.xxh3_128_digest(data[begin:end])
        for begin, end in zip(((ends - lengths_tokens) * size).tolist(), (ends * size).tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype=DIGEST)


def _read_documents(split: SourceSplit, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all documents of a split as (tokens one after another, lengths in tokens)."""
    for stretch in scan_documents(split):
        path = bin_path(split.prefix(stretch.unit))
        with path.open("rb") as stream:
            stream.seek(stretch.first_offset_tokens * dtype.itemsize)
            for part in documents_within(stretch.lengths_tokens, READ_TOKENS):
                lengths = stretch.lengths_tokens[part]
                tokens = np.fromfile(stream, dtype=dtype, count=int(lengths.sum()))
                if len(tokens) < lengths.sum():
                    raise IntegrityError(f"{path} ends too early; tokenize the source again")
                yield tokens, lengths
