"""What every reader yields: texts of neighbouring rows, and what became of the rows without one."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import InputDataError
from data_prep.unit_manifest import SkippedInput

BATCH_TEXT_CHARACTERS = 1 << 20
# A longer document is dropped: a run of 100 MB of one character takes minutes and 5 GB to tokenize, and nothing
# of that size in a corpus is text to learn from.
MAX_TEXT_BYTES = 1 << 24
EMPTY, INVALID_UNICODE, TOO_LONG, OTHER_COLUMNS = "empty", "invalid_unicode", "too_long", "other_columns"


@dataclass(kw_only=True)
class RowBatch:
    """Texts of neighbouring rows. Every text is not empty and can be written as UTF-8."""

    texts: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    characters: int = 0
    """Length of the texts together."""
    progress: float = 0.0
    """Share of the file read so far, 0 to 1."""

    @property
    def is_full(self) -> bool:
        """Whether it is time to hand the batch on."""
        return self.characters >= BATCH_TEXT_CHARACTERS

    def add(self, text: str) -> None:
        """Take a text, or count why it cannot become tokens."""
        if not text:
            self.dropped[EMPTY] += 1
        elif not (text.isascii() or _is_encodable(text)):
            self.dropped[INVALID_UNICODE] += 1
        elif len(text) > MAX_TEXT_BYTES // 4 and len(text.encode()) > MAX_TEXT_BYTES:
            self.dropped[TOO_LONG] += 1
        else:
            self.texts.append(text)
            self.characters += len(text)


def _is_encodable(text: str) -> bool:
    """Whether a text is free of halves of surrogate pairs, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class TooManySkippedError(InputDataError):
    """More rows and files could not be read than --max-skipped allows."""


class RowErrors:
    """What happens at a row that cannot be read: stop, or count it and go on, up to a ceiling."""

    def __init__(self, path: Path, max_skipped: int) -> None:
        """Args: path: the file, for messages. max_skipped: rows to skip at most; 0 stops at the first."""
        self._path = path
        self._max_skipped = max_skipped
        self.skipped: list[SkippedInput] = []

    def add(self, row: int, reason: str) -> None:
        """Take note of a bad row, counted from 1.

        Raises:
            InputDataError: rows are not to be skipped.
            TooManySkippedError: as many as allowed were skipped before.
        """
        where = f"{self._path}: row {row} {reason}"
        if not self._max_skipped:
            raise InputDataError(f"{where}; repair or remove the row, or pass --on-error skip")
        if len(self.skipped) == self._max_skipped:
            raise TooManySkippedError(
                f"{where}; {self._max_skipped:,} rows of this file were skipped already: raise --max-skipped"
            )
        self.skipped.append(SkippedInput(row=row, reason=reason))
