"""What one tokenized input file became: the manifest beside every shard, and the list of all of a source's units."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from data_prep.errors import UserError
from data_prep.folder_paths import PathInFolder
from data_prep.indexed_shards import FORMAT_VERSION, manifest_path
from data_prep.output_files import read_sealed_json, write_sealed_json, write_shared_json

UNITS_FILE = "units.json"
LENGTH_BINS = 32
REMEDY = "tokenize the source again with --overwrite"

Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class SkippedInput:
    """A row or file that could not be read and was left out, because --on-error skip allowed it."""

    row: int | None
    """Row of the source file, counted from 1; None: the whole file."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class UnitManifest:
    """One tokenized input file in one split; lies next to the shard as `<unit>.json`, sealed by a checksum."""

    format_version: int
    source: str
    split: str
    unit: str
    source_file: str
    """Path under the source's folder."""
    source_bytes: int
    """Size of that file; a file of another size is another file."""
    settings: dict[str, object]
    """What else decided the shard's bytes; units of different settings are never mixed."""
    documents: int
    tokens: int
    text_bytes: int
    """UTF-8 bytes of the documents."""
    length_histogram: list[int]
    """Documents whose length in tokens needs b bits, for b = 0, 1, ...; so bin b holds [2^(b-1), 2^b)."""
    dropped: dict[str, int]
    """Rows left out, by reason; counted in the file's train manifest where it feeds both splits."""
    skipped: list[SkippedInput] = field(default_factory=list)
    """Rows and files that could not be read, with the reason; in the train manifest, as `dropped`."""
    checked_documents: int
    """Documents whose tokens were compared with the reference tokenizer's."""
    bin_bytes: int
    bin_xxh3_128: str
    idx_xxh3_128: str
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int

    def write(self, prefix: Path) -> None:
        """Write the manifest, after the shard's files have their names."""
        write_sealed_json(manifest_path(prefix), asdict(self))


UNIT_MANIFEST = TypeAdapter(UnitManifest)  # made once: making it takes 30 times as long as reading a manifest


def read_unit_manifest(path: Path) -> UnitManifest:
    """Read a manifest. Raises UserError when it is unreadable, changed, or of another format version."""
    return _as_type(UNIT_MANIFEST, read_sealed_json(path, REMEDY), path)


@dataclass(frozen=True, kw_only=True)
class SourceUnits:
    """All units that a source's tokenization planned, so that a blend sees what is missing."""

    format_version: int
    source: str
    train: list[PathInFolder]
    validation: list[PathInFolder]

    def of_split(self, split: str) -> list[str]:
        """Names of the units in "train" or "validation"."""
        return self.train if split == "train" else self.validation


SOURCE_UNITS = TypeAdapter(SourceUnits)


def write_source_units(folder: Path, units: SourceUnits) -> None:
    """Write `units.json` beside a source's shards; the tasks of a job array all do."""
    write_shared_json(folder / UNITS_FILE, asdict(units))


def read_source_units(folder: Path) -> SourceUnits:
    """Read `units.json`. Raises UserError when it is missing, changed, or of another format version."""
    return _as_type(SOURCE_UNITS, read_sealed_json(folder / UNITS_FILE, REMEDY), folder / UNITS_FILE)


def _as_type(adapter: TypeAdapter[Record], content: dict[str, object], path: Path) -> Record:
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {content.get('format_version')}, not {FORMAT_VERSION}; {REMEDY}"
        )
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {REMEDY}") from error


def length_histogram(lengths_tokens: np.ndarray) -> np.ndarray:
    """Count documents by the bits of their length; see `UnitManifest.length_histogram`. [LENGTH_BINS] int64."""
    bits = np.frexp(lengths_tokens.astype(np.float64))[1]
    return np.bincount(bits, minlength=LENGTH_BINS).astype(np.int64)


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Add up counts by reason, in the order of the reasons' names."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(sorted(total.items()))
