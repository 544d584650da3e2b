"""Read JSON lines, plain or compressed with zstandard or gzip.

orjson parses (3 times as fast as the standard library on such rows); what it refuses goes to the standard
library once more, which tells half a surrogate pair from a broken row.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import orjson
import pyarrow as pa

from data_prep.corpus_sources import SourceFormat
from data_prep.errors import InputDataError
from data_prep.readers.row_batch import INVALID_UNICODE, TOO_LONG, RowBatch, RowErrors

BLOCK_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 27
COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}


def read_jsonl(
    path: Path, source: SourceFormat, errors: RowErrors, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[RowBatch]:
    """Stream a file's texts.

    Raises:
        InputDataError: the compressed file is damaged, or a row is not in the source's format.
    """
    size_bytes = path.stat().st_size
    batch, row_number = RowBatch(), 0
    with path.open("rb") as raw:
        for line in _lines(raw, path, max_line_bytes):
            row_number += 1
            if line is None:
                batch.dropped[TOO_LONG] += 1
            elif line and not line.isspace():
                _add_row(batch, line, row_number, source, errors)
            if batch.is_full:
                batch.progress = raw.tell() / size_bytes
                yield batch
                batch = RowBatch()
    batch.progress = 1.0
    yield batch


def _lines(raw: BinaryIO, path: Path, max_line_bytes: int) -> Iterator[bytes | None]:
    """Yield lines without their end; None for a line that is longer than `max_line_bytes`."""
    pending: list[bytes] = []
    pending_bytes = 0
    for block in _blocks(raw, path):
        first, *rest = block.split(b"\n")
        pending_bytes += len(first)
        if pending_bytes <= max_line_bytes:
            pending.append(first)
        else:
            pending.clear()  # what an endless line needs of memory is given back at once
        if rest:
            yield b"".join(pending) if pending_bytes <= max_line_bytes else None
            yield from rest[:-1]
            pending, pending_bytes = [rest[-1]], len(rest[-1])
    if pending_bytes:
        yield b"".join(pending) if pending_bytes <= max_line_bytes else None


def _blocks(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the decompressed content in blocks."""
    compression = COMPRESSIONS.get(path.suffix)
    kind = {"zstd": "zstandard", "gzip": "gzip"}.get(compression or "", "JSON lines")
    try:
        # pyarrow, unlike most bindings, reports a frame that was cut off instead of ending early.
        stream = pa.input_stream(raw, compression=compression) if compression else raw
        while block := stream.read(BLOCK_BYTES):
            yield block
    except (OSError, pa.ArrowException) as error:
        raise InputDataError(f"{path}: is not a whole {kind} file ({error}); fetch the file again") from error


def _add_row(batch: RowBatch, line: bytes, number: int, source: SourceFormat, errors: RowErrors) -> None:
    """Put a row's text into the batch, or count why it is not there."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            batch.dropped[INVALID_UNICODE] += 1
            return
        except (ValueError, RecursionError) as error:
            errors.add(number, f"is not JSON ({error})")
            return
    text = row.get(source.text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        errors.add(number, f"has no text under the key {source.text_field!r} (is this the right --source?)")
        return
    if source.dropped_sets:
        meta = row.get("meta")
        set_name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
        if not isinstance(set_name, str):
            errors.add(number, "has no meta.redpajama_set_name (is this the right --source?)")
            return
        if set_name in source.dropped_sets:
            batch.dropped[set_name] += 1
            return
    batch.add(text)
