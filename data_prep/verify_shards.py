"""Verify token shards byte by byte: every flipped bit, cut, missing, exchanged or stray file is found.

    python data_prep/verify_shards.py runs/demo/tokenized/wudao
    python data_prep/verify_shards.py runs/demo/tokenized --workers 2
    python data_prep/verify_shards.py runs/demo/data

The folder is a tokenized source (data_prep/tokenize_corpus.py), a blend (data_prep/blend.py), or a folder of
these. Every .bin, .idx and .xxh is read whole and compared with the checksums in its manifest, which carries a checksum
of itself; every manifest must belong to its place, every listed file must be there and no other; and no token id
may lie outside the vocabulary. All problems are printed, one line each. Nothing is written.

Exit codes: 0 all is as it was written, 2 not a folder of ours, 5 problems were found.
"""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
import xxhash

from data_prep.errors import IntegrityError, UserError, run_cli
from data_prep.indexed_shards import bin_path, check_pair, idx_path, token_dtype
from data_prep.output_files import file_checksum
from data_prep.progress import progress_bar
from data_prep.shard_inventory import (
    ExpectedShard,
    Inventory,
    check_checksum,
    find_strays,
    take_inventory,
)

BLOCK_BYTES = 1 << 20  # stays in the processor's cache between the checksum and the look at the ids


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Verify that tokenized sources or a blend are, byte by byte, what was written."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A tokenized source, a blend, or a folder of tokenized sources."""
    workers: int = 1
    """Shards that are read at the same time, a thread each."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was verified."""

    files: int
    bytes_read: int
    seconds: float
    problems: list[str]

    def summary(self) -> str:
        """One line: how much was read, how fast, what was found."""
        gigabytes = self.bytes_read / 1e9
        found = count_problems(self.problems) if self.problems else "no problem"
        return (
            f"{self.files:,} files, {gigabytes:.3f} GB in {self.seconds:.1f} s "
            f"({gigabytes / max(self.seconds, 1e-9):.2f} GB/s): {found}"
        )


def count_problems(problems: list[str]) -> str:
    """Say how many there are."""
    return f"{len(problems):,} problem" + ("s" if len(problems) > 1 else "")


def check_shard(shard: ExpectedShard, report: Callable[[int], object]) -> list[str]:
    """Read the files of a shard and compare them with its manifest.

    Args:
        shard: what they ought to be.
        report: is told the bytes read since the last call.

    Returns:
        What is wrong with them, a line each.
    """
    inventory = Inventory()
    for path, checksum in shard.checksums.items():
        with inventory.collecting_problems(path):
            check_small_file(path, checksum, shard.remedy, report)
    with inventory.collecting_problems(bin_path(shard.prefix)):
        check_bin(shard, report)
    if not inventory.problems:
        with inventory.collecting_problems(idx_path(shard.prefix)):
            check_counts(shard)
    return inventory.problems


def check_small_file(path: Path, checksum: str, remedy: str, report: Callable[[int], object]) -> None:
    """Check the bytes of a file beside the tokens. Raises IntegrityError."""
    if not path.exists():
        raise IntegrityError(f"{path}: is missing; {remedy}")
    check_checksum(path, file_checksum(path), checksum, remedy)
    report(path.stat().st_size)


def check_bin(shard: ExpectedShard, report: Callable[[int], object]) -> None:
    """Check the tokens' bytes and that every id is in the vocabulary. Raises IntegrityError."""
    path = bin_path(shard.prefix)
    if not path.exists():
        raise IntegrityError(f"{path}: is missing; {shard.remedy}")
    if (size_bytes := path.stat().st_size) != shard.bin_bytes:
        report(size_bytes)
        raise IntegrityError(
            f"{path}: has {size_bytes:,} bytes instead of {shard.bin_bytes:,}; {shard.remedy}"
        )
    with path.open("rb", buffering=0) as stream:
        checksum, largest_id = read_tokens(stream, token_dtype(shard.vocab_size).itemsize, report)
    check_checksum(path, checksum, shard.bin_xxh3_128, shard.remedy)
    if largest_id >= shard.vocab_size:
        raise IntegrityError(
            f"{path}: holds the token id {largest_id:,}, but the vocabulary has {shard.vocab_size:,}; {shard.remedy}"
        )


def check_counts(shard: ExpectedShard) -> None:
    """Check that index and manifest count the same. Raises UserError."""
    if (counts := check_pair(shard.prefix)) != (shard.documents, shard.tokens):
        raise IntegrityError(
            f"{idx_path(shard.prefix)}: counts {counts[0]:,} documents and {counts[1]:,} tokens, its manifest "
            f"{shard.documents:,} and {shard.tokens:,}; {shard.remedy}"
        )


def read_tokens(stream: FileIO, id_bytes: int, report: Callable[[int], object]) -> tuple[str, int]:
    """Read a .bin to its end. Returns its checksum and the largest id, as an unsigned number (0: no tokens)."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(BLOCK_BYTES)
    block = memoryview(buffer)
    ids = np.frombuffer(buffer, np.dtype(f"<u{id_bytes}"))
    largest_id = 0
    while count := read_block(stream, block):
        digest.update(block[:count])
        largest_id = max(largest_id, int(ids[: count // id_bytes].max(initial=0)))
        report(count)
    return digest.hexdigest(), largest_id


def read_block(stream: FileIO, block: memoryview) -> int:
    """Fill `block` as far as the stream goes, so that no token id lies across two blocks; return the bytes."""
    filled = 0
    while filled < len(block) and (count := stream.readinto(block[filled:])):
        filled += count
    return filled


def check_shards(shards: Iterable[ExpectedShard], workers: int, total_bytes: int) -> list[str]:
    """Check all shards in threads (reading and checksums leave Python's lock alone); problems in their order."""
    lock = threading.Lock()
    bar = progress_bar("verify", total_bytes, unit="B", unit_scale=True)

    def report(count: int) -> None:
        with lock:
            bar.update(count)

    with closing(bar), ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda shard: check_shard(shard, report), shards)
        return [problem for problems in found for problem in problems]


def verify(folder: Path, workers: int = 1) -> Verdict:
    """Verify a folder.

    Raises:
        UserError: the folder is not there or none of ours.
    """
    start = time.perf_counter()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a tokenized source or a blend")
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    inventory = Inventory()
    take_inventory(folder, inventory)
    strays = list(find_strays(folder, inventory.listed))
    sizes = [path.stat().st_size for path in inventory.listed if path.is_file()]
    shard_files = [path for shard in inventory.shards for path in (bin_path(shard.prefix), *shard.checksums)]
    shard_bytes = sum(path.stat().st_size for path in shard_files if path.is_file())
    problems = inventory.problems + check_shards(inventory.shards, workers, shard_bytes) + strays
    seconds = time.perf_counter() - start
    return Verdict(files=len(sizes), bytes_read=sum(sizes), seconds=seconds, problems=problems)


def main() -> None:
    """Entry point."""
    config = tyro.cli(VerifyConfig, description=__doc__)
    verdict = verify(config.folder, config.workers)
    for problem in verdict.problems:
        print(problem)
    print(verdict.summary())
    if verdict.problems:
        raise IntegrityError(
            f"{config.folder}: {count_problems(verdict.problems)}, listed above; do what each line says, then "
            "verify again"
        )


if __name__ == "__main__":
    run_cli(main)
