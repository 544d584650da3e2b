"""The wish that a run stop: SIGTERM or SIGUSR1 to any of its processes, as a job scheduler sends them."""

import signal
import threading
from types import FrameType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def leave_signals_to_the_rank(*_: object) -> None:
    """For a process beside a rank: a scheduler signals every process of a job, and the rank decides what that means.

    Takes the worker's number that torch's data loader passes, too.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Inside its `with`, the signals no longer end this process but are remembered in `asked`."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python handles signals there alone
            self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
