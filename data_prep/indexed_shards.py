"""Megatron's indexed token files (`<prefix>.bin` and `<prefix>.idx`): write them whole, read and check them.

Megatron's own builder keeps a Python list entry a document and writes in place; here the index costs 4
bytes a document while writing, files appear only when they are complete, and their checksums (xxh3, 128 bits)
are taken on the way.

Layout of an .idx file, little-endian: magic (9 bytes), version 1 (u64), dtype code (u8), sequences N (u64),
documents plus one (u64), N lengths in tokens (i32), N byte offsets into the .bin (i64), N + 1 document
boundaries (i64). Here every document is one sequence, its tokens followed by EOS.
"""

import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import xxhash

from data_prep.errors import UserError
from data_prep.output_files import partial_path, publish_file

FORMAT_VERSION = 2
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
INDEX_VERSION = 1
DTYPE_CODES: dict[int, np.dtype] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
UINT16_VOCABULARY_LIMIT = 65_500  # Megatron's own limit for two bytes a token
INDEX_CHUNK_DOCUMENTS = 1 << 20
REMEDY = "make the shard again"


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the number type that Megatron chooses: uint16 below 65,500 tokens, else int32."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCABULARY_LIMIT else np.dtype(np.int32)


def bin_path(prefix: Path) -> Path:
    """Path of the tokens; a prefix may hold dots."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Path of the index."""
    return prefix.with_name(prefix.name + ".idx")


def manifest_path(prefix: Path) -> Path:
    """Path of the manifest, which is written last: where it is, the shard is complete."""
    return prefix.with_name(prefix.name + ".json")


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What a finished pair of files holds."""

    documents: int
    tokens: int
    """Tokens, the EOS of every document included."""
    bin_bytes: int
    bin_xxh3_128: str
    idx_xxh3_128: str


class ShardWriter:
    """Writes one shard; a context manager that leaves either both finished files or nothing.

    The files get their names in `publish`, so that several shards of one unit can be published together.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._lengths_tokens = array("i")
        self._tokens = 0
        self._hash = xxhash.xxh3_128()

    def __enter__(self) -> Self:
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._stream = partial_path(bin_path(self._prefix)).open("wb", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        for path in (bin_path(self._prefix), idx_path(self._prefix)):
            partial_path(path).unlink(missing_ok=True)

    def add(self, tokens: np.ndarray) -> None:
        """Append one document; its tokens end in EOS and have the shard's dtype."""
        self.add_documents(tokens, np.array([len(tokens)], dtype=np.int32))

    def add_documents(self, tokens: np.ndarray, lengths_tokens: np.ndarray) -> None:
        """Append documents that lie one after another in `tokens`, each ending in EOS.

        Args:
            tokens: [sum of lengths] in the shard's dtype.
            lengths_tokens: [documents] int32.
        """
        assert tokens.dtype == self._dtype, f"documents of {tokens.dtype} in a shard of {self._dtype}"
        data = np.ascontiguousarray(tokens).view(np.uint8).data
        self._take_checksums(data)
        while data:  # an unbuffered stream may take less than it is given
            data = data[self._stream.write(data) :]
        self._lengths_tokens.frombytes(lengths_tokens.astype(np.int32, copy=False).tobytes())
        self._tokens += len(tokens)

    def _take_checksums(self, data: memoryview) -> None:
        self._hash.update(data)

    def publish(self) -> ShardSummary:
        """Write the index, make both files durable, give them their names and say what they hold."""
        self._stream.close()
        idx_xxh3_128 = self._write_index()
        publish_file(bin_path(self._prefix))
        publish_file(idx_path(self._prefix))
        return ShardSummary(
            documents=len(self._lengths_tokens),
            tokens=self._tokens,
            bin_bytes=self._tokens * self._dtype.itemsize,
            bin_xxh3_128=self._hash.hexdigest(),
            idx_xxh3_128=idx_xxh3_128,
        )

    def _write_index(self) -> str:
        """Write the index in pieces, so that offsets and boundaries never stand in memory whole."""
        lengths = np.frombuffer(self._lengths_tokens, dtype=np.int32)
        code = next(code for code, dtype in DTYPE_CODES.items() if dtype == self._dtype)
        digest = xxhash.xxh3_128()
        with partial_path(idx_path(self._prefix)).open("wb") as stream:

            def write(data: bytes) -> None:
                stream.write(data)
                digest.update(data)

            write(HEADER.pack(MAGIC, INDEX_VERSION, code, len(lengths), len(lengths) + 1))
            write(lengths.tobytes())
            offset_bytes = 0
            for start in range(0, len(lengths), INDEX_CHUNK_DOCUMENTS):
                sizes = lengths[start : start + INDEX_CHUNK_DOCUMENTS].astype(np.int64) * self._dtype.itemsize
                ends = np.cumsum(sizes) + offset_bytes
                write((ends - sizes).tobytes())
                offset_bytes = int(ends[-1])
            for start in range(0, len(lengths) + 1, INDEX_CHUNK_DOCUMENTS):
                stop = min(start + INDEX_CHUNK_DOCUMENTS, len(lengths) + 1)
                write(np.arange(start, stop, dtype=np.int64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The index of a shard: dtype and the length of every document in tokens, EOS included."""

    dtype: np.dtype
    lengths_tokens: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of the whole shard."""
        return int(self.lengths_tokens.sum(dtype=np.int64))


def check_pair(prefix: Path) -> tuple[int, int]:
    """Check from sizes and the last entry alone that an index is whole and its .bin belongs to it.

    Megatron itself does not look: over a truncated .bin it trains on whatever stands in memory.

    Returns:
        (documents, tokens).

    Raises:
        UserError: a file is missing, is not an index, or the two do not fit.
    """
    dtype, documents = _check_index(idx_path(prefix))
    expected_bytes = 0
    if documents:
        with idx_path(prefix).open("rb") as stream:
            stream.seek(HEADER.size + 4 * (documents - 1))
            last_length = int(np.fromfile(stream, dtype=np.int32, count=1)[0])
            stream.seek(HEADER.size + 4 * documents + 8 * (documents - 1))
            last_offset = int(np.fromfile(stream, dtype=np.int64, count=1)[0])
        expected_bytes = last_offset + last_length * dtype.itemsize
    tokens = bin_path(prefix)
    if not tokens.is_file():
        raise UserError(f"{tokens} is missing; {REMEDY}")
    if tokens.stat().st_size != expected_bytes:
        actual_bytes, index_name = tokens.stat().st_size, idx_path(prefix).name
        raise UserError(
            f"{tokens} has {actual_bytes} bytes where {index_name} counts {expected_bytes}; {REMEDY}"
        )
    return documents, expected_bytes // dtype.itemsize


def _check_index(path: Path) -> tuple[np.dtype, int]:
    """Return (dtype, documents) of an index file that is whole by its size."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {REMEDY}")
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path} is not a Megatron index; {REMEDY}")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != INDEX_VERSION or code not in DTYPE_CODES or boundaries != sequences + 1:
        raise UserError(
            f"{path} is an index of another kind (version {version}, dtype code {code}); {REMEDY}"
        )
    expected_bytes = HEADER.size + 12 * sequences + 8 * boundaries
    if path.stat().st_size != expected_bytes:
        raise UserError(f"{path} has {path.stat().st_size} bytes instead of {expected_bytes}; {REMEDY}")
    return DTYPE_CODES[code], sequences


def read_index(prefix: Path) -> ShardIndex:
    """Read an index after `check_pair`. Raises UserError as that does."""
    documents, _ = check_pair(prefix)
    dtype, _ = _check_index(idx_path(prefix))
    with idx_path(prefix).open("rb") as stream:
        stream.seek(HEADER.size)
        return ShardIndex(dtype=dtype, lengths_tokens=np.fromfile(stream, dtype=np.int32, count=documents))
