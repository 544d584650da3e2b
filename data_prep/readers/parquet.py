"""Read one text column of a parquet file, a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpus_sources import SourceFormat
from data_prep.errors import InputDataError
from data_prep.readers.row_batch import BATCH_TEXT_CHARACTERS, INVALID_UNICODE, OTHER_COLUMNS, RowBatch

MAX_BATCH_ROWS = 4096


def read_parquet(path: Path, source: SourceFormat, may_lack_column: bool) -> Iterator[RowBatch]:
    """Stream a file's texts.

    Args:
        path: the file.
        source: names the column.
        may_lack_column: count the rows of a file without the column as dropped, instead of refusing it.

    Raises:
        InputDataError: the file is damaged, or has no such column of text.
    """
    try:
        # Without pre-buffering a row group is read page by page, so that memory does not grow with it.
        with pq.ParquetFile(path, pre_buffer=False) as table:
            if source.text_field not in table.schema_arrow.names and may_lack_column:
                batch = RowBatch(progress=1.0)
                batch.dropped[OTHER_COLUMNS] += table.metadata.num_rows
                yield batch
                return
            _check_column(path, table.schema_arrow, source.text_field)
            yield from _read_column(table, source.text_field)
    except (pa.ArrowException, OSError) as error:
        raise InputDataError(
            f"{path}: is not a whole parquet file ({error}); fetch the file again"
        ) from error


def _check_column(path: Path, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        raise InputDataError(
            f"{path}: has no column {column!r}, only {', '.join(schema.names)}; is this the right --source?"
        )
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputDataError(f"{path}: column {column!r} does not hold text; is this the right --source?")


def _read_column(table: pq.ParquetFile, column: str) -> Iterator[RowBatch]:
    rows_read = 0
    batch = RowBatch()
    for rows in table.iter_batches(batch_size=_batch_rows(table, column), columns=[column]):
        for text in _texts(rows.column(0)):
            if text is None:
                batch.dropped[INVALID_UNICODE] += 1
            else:
                batch.add(text)
        rows_read += rows.num_rows
        if batch.is_full:
            batch.progress = rows_read / table.metadata.num_rows
            yield batch
            batch = RowBatch()
    batch.progress = 1.0
    yield batch


def _batch_rows(table: pq.ParquetFile, column: str) -> int:
    """Rows that hold about one batch of text, by the file's own statistics."""
    index = table.schema_arrow.names.index(column)
    metadata = table.metadata
    column_bytes = sum(
        metadata.row_group(group).column(index).total_uncompressed_size
        for group in range(metadata.num_row_groups)
    )
    rows = BATCH_TEXT_CHARACTERS * metadata.num_rows // max(column_bytes, 1)
    return max(1, min(rows, MAX_BATCH_ROWS))


def _texts(column: pa.Array) -> list[str | None]:
    """The column's texts: null is an empty text, bytes that are not UTF-8 are None."""
    try:
        return [text or "" for text in column.to_pylist()]
    except UnicodeDecodeError:
        kind = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        return [_decode(data or b"") for data in column.view(kind).to_pylist()]


def _decode(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
