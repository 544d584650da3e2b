"""Checksums of a model folder's files, wherever they come from.

Ours are in XXH128SUMS (`xxhsum --check XXH128SUMS`): xxh3 runs at the speed of memory, SHA-256 would take a third of an
export. Others' are in SHA256SUMS (`sha256sum --check`), or in the Hub's cache, where a file is a link to a blob that is
named by its SHA-256. They find damage, not malice.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import xxhash

from data_prep.checksum_list import CHECKSUM_LIST, parse_checksums
from data_prep.errors import UserError
from data_prep.output_files import Digest, file_checksum

HUB_BLOB = re.compile(r"(?:.*/)?blobs/(?P<sum>[0-9a-f]{64})")


DIGESTS: Mapping[str, Callable[[], Digest]] = {"SHA256SUMS": hashlib.sha256, CHECKSUM_LIST: xxhash.xxh3_128}


def recorded_sums(folder: Path, shards: Iterable[Path]) -> dict[Path, tuple[str, str]]:
    """By file: the name of a list of `DIGESTS`, which says of what kind the checksum is, and the checksum.

    Raises:
        UserError: a list cannot be used.
    """
    sums = {path: ("SHA256SUMS", checksum) for path, checksum in _hub_sums(shards).items()}
    for name in DIGESTS:
        sums |= {path: (name, checksum) for path, checksum in _listed_sums(folder, name).items()}
    return sums


def file_sum(path: Path, kind: str, report: Callable[[int], object] = lambda count: None) -> str:
    """Checksum of a file's bytes; `report` is told how many were read."""
    return file_checksum(path, DIGESTS[kind](), report)


def _listed_sums(folder: Path, name: str) -> dict[Path, str]:
    path, digits = folder / name, len(DIGESTS[name]().hexdigest())
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    sums = {}
    for file, checksum in parse_checksums(path, lines, digits, "; download it again"):
        refuse_other_folders(path, file)
        sums[folder / file] = checksum
    return sums


def _hub_sums(shards: Iterable[Path]) -> dict[Path, str]:
    links = ((path, HUB_BLOB.fullmatch(os.readlink(path))) for path in shards if path.is_symlink())
    return {path: match["sum"] for path, match in links if match}


def refuse_other_folders(path: Path, name: str) -> None:
    """Raise unless `name`, which the list or index at `path` gives to a file, is one of a file beside it."""
    if "/" in name or ".." in name:
        raise UserError(
            f"{path}: names {name!r}, which is not in the folder: it is no plain file name; download it again"
        )
