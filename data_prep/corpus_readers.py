"""Read the four corpora as they are published: which files belong to a source, and the texts in them.

    slimpajama    {train,validation}/**/*.jsonl.zst         text; rows from GitHub are dropped
    starcoder     <language>/*.parquet                      content
    proof_pile_2  <subset>/{train,validation}/*.jsonl.zst   text
    wudao         **/*.parquet                              content (the title is left out)

Files are streamed in batches of rows, so memory does not grow with the file.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import UserError

SPLITS = ("train", "validation")
OTHER_SPLITS = ("test",)  # published, but neither trained on nor validated with
BATCH_TEXT_CHARACTERS = 1 << 20
PARQUET_BATCH_ROWS = 256
READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """How one source is published."""

    suffix: str
    """Ending of its files: `.jsonl.zst` or `.parquet`."""
    text_field: str
    """JSON key or parquet column that holds the document."""
    dropped_sets: frozenset[str] = frozenset()
    """Values of `meta.redpajama_set_name` whose rows are left out."""


SOURCES: dict[str, SourceFormat] = {
    "slimpajama": SourceFormat(
        suffix=".jsonl.zst", text_field="text", dropped_sets=frozenset({"RedPajamaGithub"})
    ),
    "starcoder": SourceFormat(suffix=".parquet", text_field="content"),
    "proof_pile_2": SourceFormat(suffix=".jsonl.zst", text_field="text"),
    "wudao": SourceFormat(suffix=".parquet", text_field="content"),
}


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One input file, which is one unit of work."""

    path: Path
    relative_path: str
    """Path under the source's folder, with forward slashes; the same on every machine."""
    unit: str
    """Name of the output shards: the relative path without its ending and split, `/` written as `__`."""
    split: str | None
    """"train" or "validation" where the source publishes both, None where it does not."""
    size_bytes: int


@dataclass(kw_only=True)
class RowBatch:
    """Texts of neighbouring rows, and what became of the rows without one."""

    texts: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    progress: float = 0.0
    """Share of the file read so far, 0 to 1."""


def find_files(source: str, folder: Path) -> list[CorpusFile]:
    """List the files of a source in a fixed order.

    Raises:
        UserError: the source is unknown, the folder is missing, or it holds no file of the source's format.
    """
    if source not in SOURCES:
        raise UserError(f"--source {source!r} is unknown; choose one of {', '.join(SOURCES)}")
    suffix = SOURCES[source].suffix
    if not folder.is_dir():
        raise UserError(
            f"--input {folder} is not a folder; give the folder that holds {source}'s *{suffix} files"
        )
    files = []
    for path in sorted(folder.rglob(f"*{suffix}")):
        relative = path.relative_to(folder)
        parts = list(relative.parts)
        if not set(OTHER_SPLITS).isdisjoint(parts[:-1]):
            continue
        split = next((part for part in parts[:-1] if part in SPLITS), None)
        if split is not None:
            parts.remove(split)
        unit = "__".join(parts).removesuffix(suffix)
        files.append(
            CorpusFile(
                path=path,
                relative_path=relative.as_posix(),
                unit=unit,
                split=split,
                size_bytes=path.stat().st_size,
            )
        )
    shards = Counter((file.split, file.unit) for file in files)
    if clashing := [unit for (_, unit), count in shards.items() if count > 1]:
        raise UserError(
            f"--input {folder} has files that would share the name {clashing[0]}; rename one of them"
        )
    if not files:
        raise UserError(f"--input {folder} holds no *{suffix} file; {source} is published as *{suffix}")
    return files


def has_own_validation(files: list[CorpusFile]) -> bool:
    """Whether the source comes with a validation split, so that none has to be cut from its train files."""
    return any(file.split == "validation" for file in files)


def read_batches(source: str, path: Path) -> Iterator[RowBatch]:
    """Stream a file's texts. Raises UserError naming the file, and the row, that is not in the format."""
    corpus_format = SOURCES[source]
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes); fetch the file again")
    read = _read_parquet if corpus_format.suffix == ".parquet" else _read_jsonl_zst
    yield from read(path, corpus_format)


def _drop_reason(text: str) -> str | None:
    """Why a text cannot become tokens, if so."""
    if not text:
        return "empty"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "invalid_unicode"  # half of a surrogate pair, which no UTF-8 can hold
    return None


def _add_text(batch: RowBatch, text: str) -> int:
    """Put a text into the batch or count it as dropped; return the characters added."""
    reason = _drop_reason(text)
    if reason is None:
        batch.texts.append(text)
        return len(text)
    batch.dropped[reason] += 1
    return 0


def _parse_row(
    line: bytes, path: Path, row_number: int, corpus_format: SourceFormat
) -> tuple[str, str | None]:
    """Return (text, reason to drop it or None) of a JSON line."""
    where = f"{path}: row {row_number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); repair or remove the row") from error
    text = row.get(corpus_format.text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f"{where} has no text under the key {corpus_format.text_field!r}; is this the right --source?"
        )
    if corpus_format.dropped_sets:
        meta = row.get("meta")
        set_name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
        if not isinstance(set_name, str):
            raise UserError(f"{where} has no meta.redpajama_set_name; is this the right --source?")
        if set_name in corpus_format.dropped_sets:
            return text, set_name
    return text, None


def _read_jsonl_zst(path: Path, corpus_format: SourceFormat) -> Iterator[RowBatch]:
    batch, characters = RowBatch(), 0
    with path.open("rb") as raw:
        size_bytes = path.stat().st_size
        try:
            # pyarrow, unlike most bindings, reports a frame that was cut off instead of ending early.
            lines = io.BufferedReader(pa.input_stream(raw, compression="zstd"), READ_BUFFER_BYTES)
            for row_number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                text, reason = _parse_row(line, path, row_number, corpus_format)
                if reason is None:
                    characters += _add_text(batch, text)
                else:
                    batch.dropped[reason] += 1
                if characters >= BATCH_TEXT_CHARACTERS:
                    batch.progress = raw.tell() / size_bytes
                    yield batch
                    batch, characters = RowBatch(), 0
        except OSError as error:
            raise UserError(
                f"{path}: is not a whole zstandard file ({error}); fetch the file again"
            ) from error
    batch.progress = 1.0
    yield batch


def _read_parquet(path: Path, corpus_format: SourceFormat) -> Iterator[RowBatch]:
    column = corpus_format.text_field
    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise UserError(
                    f"{path}: has no column {column!r}, only {', '.join(names)}; is this the right --source?"
                )
            if not pa.types.is_string(table.schema_arrow.field(column).type) and not pa.types.is_large_string(
                table.schema_arrow.field(column).type
            ):
                raise UserError(f"{path}: column {column!r} does not hold text; is this the right --source?")
            rows_read = 0
            for rows in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[column]):
                batch = RowBatch()
                for text in rows.column(0).to_pylist():
                    _add_text(batch, text or "")
                rows_read += rows.num_rows
                batch.progress = rows_read / table.metadata.num_rows
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a whole parquet file ({error}); fetch the file again") from error
