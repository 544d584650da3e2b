"""Read scattered documents of many files straight to their places in one buffer.

For documents of a few kilobytes that stand in the page cache, a system call a document costs about what the
copying costs, and unlike a memory map it works on network file systems and notices a file that was cut. Where
the disk or a network has to be waited for, several threads wait at the same time.
"""

import os
import resource
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from data_prep.blending.gather import Documents
from data_prep.blending.sources import SourceSplit
from data_prep.errors import IntegrityError
from data_prep.indexed_shards import bin_path

MAX_OPEN_FILES = 1 << 17
OTHER_OPEN_FILES = 64  # left to the rest of the process
READ_THREADS = 8  # cost next to nothing where nothing has to be waited for


def allow_open_files() -> int:
    """Raise the process's own limit of open files as far as it may; return how many a reader may keep."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(most - OTHER_OPEN_FILES, 1)


class DocumentReader(AbstractContextManager["DocumentReader"]):
    """Reads documents of the units of some splits, which are numbered through.

    Files stay open as long as the limit allows, the first ones first: a segment goes through the units in
    ascending order, and keeping the latest instead would never find the next one open.
    """

    def __init__(self, splits: list[SourceSplit], dtype: np.dtype) -> None:
        self._splits = splits
        self._dtype = dtype
        self._first_units = np.cumsum([0] + [len(split.units) for split in splits])
        self._files: dict[int, int] = {}
        self._max_files = allow_open_files()
        self._threads = ThreadPoolExecutor(READ_THREADS)
        self._buffer = np.empty(0, dtype)

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown()
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def sources_of(self, units: np.ndarray) -> np.ndarray:
        """The place of each unit's source in the list of splits."""
        return np.searchsorted(self._first_units, units, side="right") - 1

    def read(self, documents: Documents) -> np.ndarray:
        """Return the tokens of documents, one after another, in a buffer that the next call overwrites.

        Raises:
            IntegrityError: a file has become shorter, or is gone.
        """
        ends = np.cumsum(documents.lengths_tokens, dtype=np.int64)
        if ends[-1] > len(self._buffer):
            self._buffer = np.empty(ends[-1], self._dtype)
        view = self._buffer.data.cast("B")
        order = np.lexsort((documents.offsets_tokens, documents.units))
        size = self._dtype.itemsize
        ends_bytes = ends * size
        begins_bytes = ends_bytes - documents.lengths_tokens.astype(np.int64) * size
        offsets_bytes = documents.offsets_tokens * size

        def read_part(part: np.ndarray) -> None:
            columns = (documents.units, offsets_bytes, begins_bytes, ends_bytes)
            self._read_places(zip(*(column[part].tolist() for column in columns), strict=True), view)

        for _ in self._threads.map(read_part, np.array_split(order, READ_THREADS)):
            pass  # raises what a part raised
        return self._buffer[: ends[-1]]

    def _read_places(self, places: Iterable[tuple[int, int, int, int]], view: memoryview) -> None:
        """Read documents, each given as (unit, offset in it, begin and end in `view`), all in bytes."""
        current, file, read = -1, -1, os.preadv  # local names: this loop is the speed of blending
        try:
            for unit, offset, begin, end in places:
                if unit != current:
                    self._release(current, file)
                    file = -1
                    file, current = self._open(unit), unit
                if read(file, (view[begin:end],), offset) != end - begin:
                    self._read_in_parts(file, view[begin:end], offset, unit)
        finally:
            self._release(current, file)

    def _open(self, unit: int) -> int:
        kept = self._files.get(unit)
        if kept is not None:
            return kept
        try:
            file = os.open(self._path(unit), os.O_RDONLY)
        except FileNotFoundError as error:
            raise IntegrityError(f"{self._path(unit)} is missing; tokenize the source again") from error
        if len(self._files) >= self._max_files:
            return file
        kept = self._files.setdefault(unit, file)
        if kept != file:  # another thread was faster
            os.close(file)
        return kept

    def _release(self, unit: int, file: int) -> None:
        """Close a file that is not kept open."""
        if file >= 0 and self._files.get(unit) != file:
            os.close(file)

    def _read_in_parts(self, file: int, view: memoryview, offset: int, unit: int) -> None:
        """Read what came only in part; a system call may take less than it is asked for."""
        while view:
            count = os.preadv(file, (view,), offset)
            if count == 0:
                raise IntegrityError(f"{self._path(unit)} ends too early; tokenize the source again")
            view, offset = view[count:], offset + count

    def _path(self, unit: int) -> Path:
        source = int(np.searchsorted(self._first_units, unit, side="right")) - 1
        return bin_path(self._splits[source].prefix(unit - int(self._first_units[source])))
