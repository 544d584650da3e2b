"""What a folder holds: bytes to compare runs by, and the documents of its shards as Megatron reads them."""

import hashlib
from pathlib import Path

from data_prep.indexed_shards import check_pair


def digest_of_files(folder: Path) -> dict[str, str]:
    """Checksum of every file under a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def unit_prefixes(folder: Path) -> list[Path]:
    """Prefixes of the shards in a folder, in the order of their names."""
    return [path.with_suffix("") for path in sorted(folder.glob("*.idx"))]


def documents_of(*prefixes: Path) -> list[tuple[int, ...]]:
    """All documents of some shards, through Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = []
    for prefix in prefixes:
        if check_pair(prefix) == (0, 0):
            continue  # an empty unit, which Megatron cannot map
        dataset = IndexedDataset(str(prefix))  # has to outlive the arrays: it unmaps the file when it goes
        documents += [tuple(dataset[number].tolist()) for number in range(len(dataset))]
    return documents
