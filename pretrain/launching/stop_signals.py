"""What the launcher does with signals: they are for its ranks, and it waits until those have saved."""

import os
import signal
import sys
import threading
from types import TracebackType
from typing import Self

import psutil

from data_prep.errors import STOPPED_EXIT_CODE
from pretrain.faults.stop_request import STOP_SIGNALS

POLL_SECONDS = 0.2
FROM_A_TERMINAL = {
    signal.SIGINT,
    signal.SIGHUP,
}  # ignored in what nohup or a shell's & has started, and to stay so


class StopSignals:
    """While open, passes SIGTERM and SIGUSR1 on to the ranks; Ctrl-C and a closed terminal become SIGTERM.

    A second Ctrl-C kills the ranks. Signals are waited for in a thread of their own, for the main one may be waiting in
    torch's C++, where Python's handlers do not run.
    """

    def __init__(self, rank_module: str) -> None:
        self.stop_requested = False
        self.killed = False
        self._rank_module = rank_module
        self._ranks_started = threading.Event()
        self._done = threading.Event()
        self._signals = set(STOP_SIGNALS) | {
            number for number in FROM_A_TERMINAL if signal.getsignal(number) is not signal.SIG_IGN
        }
        self._thread = threading.Thread(target=self._wait_for_signals, daemon=True)

    def ranks_start(self) -> None:
        """From now on there are ranks to pass signals on to."""
        self._ranks_started.set()

    def __enter__(self) -> Self:
        # Held back in every thread and, until it is ready, in every rank that is started from here.
        self._mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)

    def _wait_for_signals(self) -> None:
        interrupts = 0
        while not self._done.is_set():
            received = signal.sigtimedwait(self._signals, POLL_SECONDS)
            if received is None:
                continue
            if (
                not self._ranks_started.is_set()
            ):  # nothing to save, and the main thread may wait for other nodes
                print("stopped before training began", file=sys.stderr, flush=True)
                os._exit(STOPPED_EXIT_CODE)
            number = signal.Signals(received.si_signo)
            interrupts += number == signal.SIGINT
            self._pass_on(number, interrupts)

    def _pass_on(self, number: signal.Signals, interrupts: int) -> None:
        if number == signal.SIGINT and interrupts > 1:
            self.killed = True
            _signal_ranks(self._rank_module, signal.SIGKILL)
            return
        if number == signal.SIGINT:
            print("\nstopping after this step and a checkpoint; Ctrl-C again ends at once", flush=True)
        self.stop_requested = True
        _signal_ranks(self._rank_module, signal.SIGTERM if number in FROM_A_TERMINAL else number)


def _signal_ranks(rank_module: str, number: signal.Signals) -> None:
    """Signal those children of this process that run `rank_module`."""
    for child in psutil.Process().children():
        try:
            if rank_module in child.cmdline():
                child.send_signal(number)
        except psutil.NoSuchProcess:  # it has just ended
            continue
