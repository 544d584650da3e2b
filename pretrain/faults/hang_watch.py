"""Ends a process that stands still, after it has written what all its threads were doing.

A rank that hangs makes all others wait in a collective operation, so all of them notice, and each writes its stacks to
its own log.
"""

import faulthandler
import os
import sys
import threading
import time
from typing import Self

from data_prep.errors import HANG_EXIT_CODE

# Loading a base from a slow disk, and the first step, which compiles and builds what later ones use.
START_LIMIT_SECONDS = 1800
# Other ranks notice a little later, and the first one to end has the launcher end the rest.
GRACE_SECONDS = 5.0


class HangWatch:
    """Inside its `with`, `beat` must be called at least every `limit_seconds`; before the first there is more time."""

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self._allowed = max(limit_seconds, float(START_LIMIT_SECONDS))
        self._last_beat = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._rearm()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """There is progress."""
        self._allowed = self.limit_seconds
        self._rearm()

    def begin_anew(self) -> None:
        """What comes takes as long as a start."""
        self._allowed = max(self.limit_seconds, float(START_LIMIT_SECONDS))
        self._rearm()

    def _rearm(self) -> None:
        self._last_beat = time.monotonic()
        if not self._thread.is_alive():
            return
        # For code that hangs without letting any Python thread run: this one is none, but always exits with 1.
        faulthandler.dump_traceback_later(
            self._allowed + 2 * GRACE_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr
        )

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.limit_seconds / 10)):
            stood = time.monotonic() - self._last_beat
            if stood > self._allowed:
                self._end_process(stood)

    def _end_process(self, stood_seconds: float) -> None:
        stderr = sys.__stderr__ or sys.stderr
        print(
            f"error: no progress for {stood_seconds:.0f} s (faults.hang_seconds); what the threads of process "
            f"{os.getpid()} were doing:",
            file=stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=stderr, all_threads=True)
        stderr.flush()
        time.sleep(GRACE_SECONDS)
        os._exit(HANG_EXIT_CODE)
