"""Send what is written of a file to the disk in the background, so that the sync at its end has little left to do."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path


class BackgroundFlush(AbstractContextManager["BackgroundFlush"]):
    """Flushes a growing file from a thread, which costs no processor time: it waits for the disk.

    Raises (from `start` and at the end of the block):
        OSError: the disk failed or is full. The kernel says so once, and not again to who opens the file later.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._thread = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._thread.shutdown()
        os.close(self._file)
        if self._flush is not None and kind is None:
            self._flush.result()

    def start(self) -> None:
        """Flush what was written so far, unless an earlier flush still runs."""
        if self._flush is not None:
            if not self._flush.done():
                return
            self._flush.result()
        self._flush = self._thread.submit(self._flush_now)

    def _flush_now(self) -> None:
        os.fdatasync(self._file)
        # What is on the disk is not read again here: the page cache is better used for the sources.
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
