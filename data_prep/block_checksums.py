"""Checksums of a .bin in blocks: a reader can check what it reads of a shard without reading the rest.

`<prefix>.xxh` holds the xxh3 (64 bits, 8 bytes, little-endian) of each 64 KiB of the .bin beside it, in order; the
last block is what is left. That is an eight-thousandth of the .bin. A blend lists a checksum of the .xxh itself.
"""

from array import array
from pathlib import Path

import xxhash

from data_prep.errors import InputDataError, UserError

# Larger: more to read for a document. Smaller: more checksums in the memory of every process.
BLOCK_BYTES = 1 << 16
CHECKSUM_BYTES = 8
REMEDY = "restore the file from a copy or blend again with --overwrite"


def blocks_path(prefix: Path) -> Path:
    """Path of the checksums of a shard's blocks."""
    return prefix.with_name(prefix.name + ".xxh")


class BlockChecksums:
    """Takes the bytes of a .bin in pieces of any size, and the checksums of its blocks."""

    def __init__(self) -> None:
        self._checksums = array("Q")
        self._block = xxhash.xxh3_64()
        self._block_bytes = 0

    def add(self, data: memoryview) -> None:
        """Append bytes."""
        while data:
            piece = data[: BLOCK_BYTES - self._block_bytes]
            self._block.update(piece)
            self._block_bytes += len(piece)
            if self._block_bytes == BLOCK_BYTES:
                self._end_block()
            data = data[len(piece) :]

    def _end_block(self) -> None:
        self._checksums.append(self._block.intdigest())
        self._block.reset()
        self._block_bytes = 0

    def write(self, path: Path) -> str:
        """Write the checksums of all bytes so far, which end here; return the written file's own (xxh3, 128 bits)."""
        if self._block_bytes:
            self._end_block()
        content = self._checksums.tobytes()
        path.write_bytes(content)
        return xxhash.xxh3_128_hexdigest(content)


def check_blocks_size(prefix: Path, bin_bytes: int) -> None:
    """Raise UserError unless there is a checksum for every block of a .bin of `bin_bytes`, from the size alone."""
    path = blocks_path(prefix)
    if not path.is_file():
        raise UserError(f"{path} is missing; {REMEDY}")
    expected_bytes = -(-bin_bytes // BLOCK_BYTES) * CHECKSUM_BYTES
    if (actual_bytes := path.stat().st_size) != expected_bytes:
        raise UserError(f"{path} has {actual_bytes} bytes instead of {expected_bytes}; {REMEDY}")


def read_block_checksums(prefix: Path, xxh3_128: str) -> memoryview:
    """Read the checksums of a shard's blocks: a sequence of integers that takes 8 bytes for each.

    Args:
        prefix: the shard's path without an ending.
        xxh3_128: what the blend lists as the checksum of the .xxh file.

    Raises:
        InputDataError: the file is not what was written, or cannot be read.
    """
    path = blocks_path(prefix)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputDataError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    if xxhash.xxh3_128_hexdigest(content) != xxh3_128:
        raise InputDataError(f"{path}: was changed after it was written (its checksum differs); {REMEDY}")
    return memoryview(content).cast("Q")
