"""The order of the samples, which Megatron works out once a run and keeps in files: believed only if they are whole.

Megatron loads such a file by its name alone, half-written or not, and would run a pickle that stands in it. Here the
folder has a list of checksums, written after the files. A folder that does not agree with its list, or
holds anything but arrays of numbers, is deleted, and the order is worked out again: it depends on the seed and the
shards alone.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch.distributed as dist

from data_prep.checksum_list import (
    CHECKSUM_LIST,
    files_of,
    find_damage,
    list_whole_folder,
    read_checksum_list,
)
from data_prep.errors import StorageError, UserError


@contextmanager
def whole_index_cache(folder: Path) -> Iterator[None]:
    """Before the block, delete a cache that is not whole; after it, list what the block wrote. Collective.

    Raises:
        StorageError: the block could not write its files.
    """
    is_first_rank = dist.get_rank() == 0
    if is_first_rank and folder.exists() and (fault := find_fault(folder)):
        print(f"{folder}: {fault}; the order of the samples is worked out again", flush=True)
        shutil.rmtree(folder)
    dist.barrier()
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not isinstance(error.__cause__, OSError):
            raise
        # Megatron makes a bare Exception of it; numpy's own names neither the file nor the reason.
        raise StorageError(
            f"{folder}: cannot be written ({error.__cause__}); make room or give another run_folder"
        ) from error
    if is_first_rank and not is_listed(folder):
        list_whole_folder(folder)


def find_fault(folder: Path) -> str | None:
    """What keeps a cache from being believed; None if nothing does."""
    if damage := find_damage(folder):
        return damage
    for path in sorted(folder.glob("*.npy")):
        try:
            np.lib.format.open_memmap(path, mode="r")  # takes no objects, which would be pickles
        except ValueError as error:
            return f"{path.name} is no array of numbers ({error})"
    return None


def is_listed(folder: Path) -> bool:
    """Whether every file is on the list: nothing was written since."""
    path = folder / CHECKSUM_LIST
    return path.exists() and sorted(read_checksum_list(path)) == files_of(folder)
