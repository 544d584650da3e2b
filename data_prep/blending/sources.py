"""The tokenized units of a source, as a blend sees them: what their manifests say, and a walk over their indexes.

The manifests are read once and only their totals are kept. The lengths of the documents are never all in
memory: `scan_documents` goes over the index files, a stretch of at most about a million documents at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import xxhash
from tqdm import tqdm

from data_prep.corpus_sources import SPLITS
from data_prep.errors import UserError
from data_prep.indexed_shards import HEADER, check_pair, idx_path, manifest_path
from data_prep.progress import progress_bar
from data_prep.text_tokenizer import TextTokenizer
from data_prep.unit_manifest import UNITS_FILE, UnitManifest, read_source_units, read_unit_manifest

STRETCH_DOCUMENTS = 1 << 20
BAR_DELAY_SECONDS = 2.0

# Is told how many documents were looked at since the last call.
Advance = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class SourceSplit:
    """All units of one source and split; its documents are numbered through all of them."""

    source: str
    folder: Path
    """Where the units' shards are."""
    units: list[str]
    """Their names, sorted."""
    unit_documents: np.ndarray
    """Documents of each unit. [units] int64."""
    unit_tokens: np.ndarray
    """Tokens of each unit, EOS included. [units] int64."""
    content: str
    """Hash of the checksums of all units' files."""

    @property
    def documents(self) -> int:
        """Documents of all units."""
        return int(self.unit_documents.sum())

    @property
    def tokens(self) -> int:
        """Tokens of all units."""
        return int(self.unit_tokens.sum())

    def prefix(self, unit: int) -> Path:
        """Path of a unit's shard, without an ending."""
        return self.folder / self.units[unit]


class Stretch(NamedTuple):
    """Neighbouring documents of one unit."""

    unit: int
    first_document: int
    """Number of the first in the split."""
    first_offset_tokens: int
    """Where it begins in the unit's .bin."""
    lengths_tokens: np.ndarray
    """[documents] int64."""


def waiting_bar(name: str, total: int, unit: str) -> "tqdm[NoReturn]":
    """Progress of something before the writing; what takes a moment only shows nothing."""
    return progress_bar(name, total, unit=unit, unit_scale=True, leave=False, delay_seconds=BAR_DELAY_SECONDS)


def load_source(folder: Path, source: str, tokenizer: TextTokenizer) -> dict[str, SourceSplit]:
    """Read the manifests of a source; return its train and validation split.

    Raises:
        UserError: units are missing, unfinished, of another source, made with another tokenizer, or with
            different settings.
    """
    remedy = f"run data_prep/tokenize_corpus.py --source {source} --output {folder}"
    if not (folder / UNITS_FILE).is_file():
        raise UserError(f"{folder} holds no tokenized corpus; {remedy}")
    units = read_source_units(folder)
    if units.source != source:
        raise UserError(f"{folder / UNITS_FILE}: is of source {units.source}, not {source}; {remedy}")
    splits: dict[str, SourceSplit] = {}
    settings: dict[str, object] | None = None
    for split in SPLITS:
        names = sorted(units.of_split(split))
        documents, tokens = (np.zeros(len(names), np.int64) for _ in range(2))
        content = xxhash.xxh3_128()
        with waiting_bar(f"{source} manifests", len(names), "unit") as bar:
            for number, unit in enumerate(names):
                manifest = _read_unit(folder / split / unit, source, split, remedy)
                _check_unit(manifest, folder / split / unit, tokenizer, settings)
                settings = manifest.settings
                documents[number], tokens[number] = manifest.documents, manifest.tokens
                content.update(f"{manifest.bin_xxh3_128} {manifest.idx_xxh3_128}\n".encode())
                bar.update()
        splits[split] = SourceSplit(
            source=source,
            folder=folder / split,
            units=names,
            unit_documents=documents,
            unit_tokens=tokens,
            content=content.hexdigest(),
        )
    return splits


def _read_unit(prefix: Path, source: str, split: str, remedy: str) -> UnitManifest:
    if not manifest_path(prefix).is_file():
        raise UserError(f"{prefix} is not finished; {remedy} --resume")
    manifest = read_unit_manifest(manifest_path(prefix))
    if (manifest.source, manifest.split, manifest.unit) != (source, split, prefix.name):
        raise UserError(
            f"{prefix}.json: is of {manifest.source}/{manifest.split}/{manifest.unit}; {remedy} --overwrite"
        )
    return manifest


def _check_unit(
    manifest: UnitManifest, prefix: Path, tokenizer: TextTokenizer, settings: dict[str, object] | None
) -> None:
    """Raise UserError when a unit was made in another way than the source's other units."""
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{prefix}.json: made with another tokenizer than --tokenizer; tokenize {manifest.source} again with "
            f"--overwrite, or give the tokenizer that made it"
        )
    if settings is not None and manifest.settings != settings:
        names = sorted(
            name
            for name in manifest.settings.keys() | settings.keys()
            if manifest.settings.get(name) != settings.get(name)
        )
        raise UserError(
            f"{prefix}.json: made with another {' and '.join(names)} than the source's other units; "
            f"tokenize {manifest.source} again with --overwrite"
        )


def check_units(split: SourceSplit) -> None:
    """Raise UserError when a unit's pair of files is not whole, or not what its manifest says, by their sizes."""
    with waiting_bar(f"{split.source} files", len(split.units), "unit") as bar:
        for unit in range(len(split.units)):
            expected = (split.unit_documents[unit], split.unit_tokens[unit])
            if check_pair(split.prefix(unit)) != expected:
                raise _not_as_its_manifest(split, unit)
            bar.update()


def scan_documents(split: SourceSplit, advance: Advance | None = None) -> Iterator[Stretch]:
    """Yield all documents of a split in stretches.

    Raises:
        UserError: the lengths in an index do not add up to what the unit's manifest says.
    """
    first_document = 0
    for unit, (documents, tokens) in enumerate(
        zip(split.unit_documents.tolist(), split.unit_tokens.tolist(), strict=True)
    ):
        offset_tokens = 0
        for lengths in _read_lengths(split, unit, documents):
            yield Stretch(unit, first_document, offset_tokens, lengths)
            first_document += len(lengths)
            offset_tokens += int(lengths.sum())
            if advance is not None:
                advance(len(lengths))
        if offset_tokens != tokens:
            raise _not_as_its_manifest(split, unit)


def _read_lengths(split: SourceSplit, unit: int, documents: int) -> Iterator[np.ndarray]:
    if not documents:
        return
    with idx_path(split.prefix(unit)).open("rb") as stream:
        stream.seek(HEADER.size)
        for first in range(0, documents, STRETCH_DOCUMENTS):
            count = min(STRETCH_DOCUMENTS, documents - first)
            lengths = np.fromfile(stream, dtype=np.int32, count=count)
            if len(lengths) < count or lengths.min() < 1:  # a document holds at least its EOS
                raise _not_as_its_manifest(split, unit)
            yield lengths.astype(np.int64)


def _not_as_its_manifest(split: SourceSplit, unit: int) -> UserError:
    return UserError(
        f"{idx_path(split.prefix(unit))} does not hold what its manifest says; tokenize {split.source} again"
    )
