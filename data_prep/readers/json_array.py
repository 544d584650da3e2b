"""Read a file that is one JSON array of objects, such as WuDao's original `part-*.json`, object by object."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from data_prep.corpus_sources import SourceFormat
from data_prep.errors import InputDataError
from data_prep.readers.row_batch import RowBatch, RowErrors

BLOCK_CHARACTERS = 1 << 22
MAX_OBJECT_CHARACTERS = 1 << 27
GAP = re.compile(r"[\s,]*")


def read_json_array(path: Path, source: SourceFormat, errors: RowErrors) -> Iterator[RowBatch]:
    """Stream the texts of an array's objects.

    Bytes that are not UTF-8 become halves of surrogate pairs, so that only their row is dropped.

    Raises:
        InputDataError: the file is no array, was cut off, or an object has no text.
    """
    size_bytes = path.stat().st_size
    batch = RowBatch()
    with path.open("rb") as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        for number, row in enumerate(_objects(stream, path), 1):
            text = row.get(source.text_field) if isinstance(row, dict) else None
            if isinstance(text, str):
                batch.add(text)
            else:
                errors.add(
                    number, f"has no text under the key {source.text_field!r} (is this the right --source?)"
                )
            if batch.is_full:
                batch.progress = min(1.0, raw.tell() / size_bytes)
                yield batch
                batch = RowBatch()
    batch.progress = 1.0
    yield batch


def _objects(stream: TextIO, path: Path) -> Iterator[object]:
    """Yield the elements of the array, holding little more than one of them in memory."""
    decoder = json.JSONDecoder()
    buffer = stream.read(BLOCK_CHARACTERS)
    position = len(buffer) - len(buffer.lstrip())
    if buffer[position : position + 1] != "[":
        raise InputDataError(f"{path}: is no JSON array of objects; is this the right --source?")
    position += 1
    while True:
        position = GAP.match(buffer, position).end()  # type: ignore[union-attr]  # matches nothing at least
        if buffer[position : position + 1] == "]":
            return
        try:
            element, end = decoder.raw_decode(buffer, position)
            if end == len(buffer):
                raise ValueError("the element may go on in the next block")
        except (ValueError, RecursionError) as error:
            more = stream.read(max(BLOCK_CHARACTERS, len(buffer) - position))
            if not more or len(buffer) - position > MAX_OBJECT_CHARACTERS:
                raise InputDataError(
                    f"{path}: is not a whole JSON array ({error}); fetch the file again"
                ) from error
            buffer, position = buffer[position:] + more, 0
            continue
        yield element
        position = end
