"""Shows the newest progress bar of a command whose output goes to a log file.

On a terminal the bar moves in place; elsewhere (a file, a CI log) a line appears every half minute.
"""

import os
import re
import shutil
import time
from typing import IO, TextIO

TERMINAL_INTERVAL_SECONDS = 0.1
LOG_INTERVAL_SECONDS = 30.0
# What tqdm prints: "train: 45%|####   | 9/20 [00:03<00:04, ...]".
_BAR = re.compile(rb"\d+%\|")
_LINE_END = re.compile(rb"[\r\n]+")
_CLEAR_LINE = "\r\x1b[K"


class ProgressDisplay:
    """One line a step: the label while it runs (with its bar), the final line when it is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_place = stream.isatty()
        self._label = ""
        self._shown_at = 0.0

    def start(self, label: str) -> None:
        """A step begins."""
        self._label = label
        self._shown_at = time.monotonic()
        if self._in_place:
            self._show_in_place(label)

    def bar(self, text: str) -> None:
        """Show `text`, the newest progress bar of the running step, unless one was shown just now."""
        interval = TERMINAL_INTERVAL_SECONDS if self._in_place else LOG_INTERVAL_SECONDS
        if time.monotonic() - self._shown_at < interval:
            return
        self._shown_at = time.monotonic()
        if self._in_place:
            self._show_in_place(f"{self._label}  {text}")
        else:
            print(f"{self._label}  {text}", file=self._stream, flush=True)

    def finish(self, line: str) -> None:
        """Replace whatever the running step shows by its final line."""
        print(f"{_CLEAR_LINE if self._in_place else ''}{line}", file=self._stream, flush=True)

    def clear(self) -> None:
        """Remove the moving line, before something else is printed."""
        if self._in_place:
            print(_CLEAR_LINE, end="", file=self._stream, flush=True)

    def _show_in_place(self, text: str) -> None:
        # A line wider than the terminal wraps, and a wrapped line cannot be replaced.
        columns = shutil.get_terminal_size().columns - 1
        print(f"{_CLEAR_LINE}{text[:columns]}", end="", file=self._stream, flush=True)


def copy_output(source: IO[bytes], log: IO[bytes], display: ProgressDisplay) -> None:
    """Copy `source` to `log` until it ends, a line at a time, and show the progress bars among the lines.

    A bar that redraws itself with carriage returns becomes one line a redraw, so that the log reads well.
    """
    pending = b""
    while chunk := os.read(source.fileno(), 65536):
        *lines, pending = _LINE_END.split(pending + chunk)
        _write(lines, log, display)
    _write([pending], log, display)


def _write(lines: list[bytes], log: IO[bytes], display: ProgressDisplay) -> None:
    lines = [line for line in lines if line]
    log.writelines(line + b"\n" for line in lines)
    log.flush()
    bars = [line for line in lines if _BAR.search(line)]
    if bars:
        display.bar(bars[-1].decode(errors="replace").strip())
