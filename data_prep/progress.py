"""Progress bars: redrawn in place on a terminal, a line every half minute in a log."""

import os
import sys
from collections.abc import Collection, Iterator
from typing import NoReturn, TextIO, TypeVar

from tqdm import tqdm

TERMINAL_SECONDS, LOG_SECONDS = 1.0, 30.0
# tqdm's own variable, for whoever reads the output as it comes.
INTERVAL_VARIABLE = "TQDM_MININTERVAL"

Item = TypeVar("Item")


def progress_bar(
    name: str,
    total: int,
    *,
    unit: str,
    unit_scale: bool = False,
    initial: int = 0,
    leave: bool = True,
    delay_seconds: float = 0.0,
    shown: bool = True,
) -> "tqdm[NoReturn]":
    """A bar for `update` to move on, with the time that is left.

    Args:
        name: what stands before it.
        total: what is to be done, in `unit`s.
        unit: of `total`.
        unit_scale: whether large numbers are told in thousands and millions.
        initial: what is done already.
        leave: whether it stays on the terminal at the end.
        delay_seconds: what takes less shows nothing.
        shown: False shows nothing at all.
    """
    on_terminal = sys.stderr.isatty()
    seconds = float(os.environ.get(INTERVAL_VARIABLE, TERMINAL_SECONDS if on_terminal else LOG_SECONDS))
    return tqdm(
        total=total,
        desc=name,
        unit=unit,
        unit_scale=unit_scale,
        initial=initial,
        leave=leave,
        delay=delay_seconds,
        disable=not shown,
        mininterval=seconds,
        maxinterval=max(seconds, 10.0),
        file=sys.stderr if on_terminal else _WholeLines(sys.stderr),
    )


def with_progress(items: Collection[Item], name: str, *, leave: bool = True) -> Iterator[Item]:
    """The items, one after another, with a bar."""
    with progress_bar(name, len(items), unit="it", leave=leave) as bar:
        for item in items:
            yield item
            bar.update()


class _WholeLines:
    """A stream on which what would be drawn over the line before gets a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()
