"""What ended a start, told from how its ranks ended: one exit code and one line.

When one rank ends, its peers fail in its wake, and those left over are ended by force. Most telling is therefore, in
this order: what a rank refused or found out by itself (2 to 6), a hang (7), death by a signal, 75 (asked to stop, and
saved), any other code, and last SIGTERM, by which ranks that are left over are ended.
"""

import contextlib
import signal
from collections.abc import Mapping
from typing import NamedTuple

from data_prep.errors import HANG_EXIT_CODE, STOPPED_EXIT_CODE
from pretrain.faults.stop_request import STOP_SIGNALS

FOUND_OUT_CODES = range(2, HANG_EXIT_CODE)


class RankEnd(NamedTuple):
    """How one rank ended."""

    rank: int
    """Counted over all nodes."""
    exit_code: int
    """As a shell has it: 128 + N for a rank that was killed by signal N."""


def most_telling(return_codes: Mapping[int, int], stop_requested: bool) -> RankEnd:
    """The end that explains the others.

    Args:
        return_codes: by rank, of those that did not end well; -N for signal N. At least one.
        stop_requested: whether the launcher was asked to stop its ranks; one that a stop signal ended then was in no
            state to save yet, and has nothing to lose.
    """

    def weight(rank: int) -> tuple[int, int]:
        code = return_codes[rank]
        if code in FOUND_OUT_CODES:
            return 0, rank
        if code == HANG_EXIT_CODE:
            return 1, rank
        by_stop_signal = -code in STOP_SIGNALS
        if code < 0 and not by_stop_signal:
            return 2, rank
        if code == STOPPED_EXIT_CODE or (by_stop_signal and stop_requested):
            return 3, rank
        return (5 if by_stop_signal else 4), rank

    rank = min(return_codes, key=weight)
    code = return_codes[rank]
    if -code in STOP_SIGNALS and stop_requested:
        return RankEnd(rank, STOPPED_EXIT_CODE)
    return RankEnd(rank, 128 - code if code < 0 else code)


def describe_end(end: RankEnd) -> str:
    """In words, e.g. "rank 3 was killed by SIGKILL"."""
    with contextlib.suppress(ValueError):  # 128 + N: by signal N
        name = signal.Signals(end.exit_code - 128).name
        return f"rank {end.rank} was killed by {name}"
    return f"rank {end.rank} ended with exit code {end.exit_code}"
