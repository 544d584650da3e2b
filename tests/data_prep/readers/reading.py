"""Write small files in the sources' formats, and read one whole."""

import json
from collections import Counter
from pathlib import Path

import zstandard

from data_prep.corpus_readers import read_batches
from data_prep.corpus_sources import CorpusFile, source_format
from data_prep.readers.row_batch import RowErrors

GOOD_ROW = json.dumps({"text": "good", "meta": {"redpajama_set_name": "RedPajamaC4"}})


def write_zst(path: Path, lines: list[str]) -> Path:
    """Write lines as one zstandard frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress("".join(line + "\n" for line in lines).encode()))
    return path


def slim_row(text: object, set_name: str = "RedPajamaC4") -> str:
    """A row as SlimPajama has it."""
    return json.dumps({"text": text, "meta": {"redpajama_set_name": set_name}})


def corpus_file(path: Path, relative_path: str | None = None) -> CorpusFile:
    """A file as `find_files` would list it."""
    return CorpusFile(
        path=path,
        relative_path=relative_path or path.name,
        unit="unit",
        split=None,
        size_bytes=path.stat().st_size,
    )


def read_all(
    source: str, path: Path, relative_path: str | None = None, errors: RowErrors | None = None
) -> tuple[list[str], Counter[str]]:
    """All texts of a file, and the counts of what was dropped."""
    texts: list[str] = []
    dropped: Counter[str] = Counter()
    for batch in read_batches(corpus_file(path, relative_path), source_format(source, None), errors):
        texts += batch.texts
        dropped += batch.dropped
    return texts, dropped
