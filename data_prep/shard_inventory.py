"""What ought to be in a folder of token shards, by its lists and manifests, and what in it is not where it belongs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.blended_data import (
    BLEND_FILE,
    REMEDY_ANEW,
    TOKENIZER_FOLDER,
    BlendedShard,
    BlendManifest,
    read_blend_manifest,
)
from data_prep.block_checksums import blocks_path
from data_prep.corpus_sources import SPLITS
from data_prep.errors import IntegrityError, UserError
from data_prep.indexed_shards import bin_path, idx_path, manifest_path
from data_prep.output_files import file_checksum, read_sealed_json
from data_prep.progress import with_progress
from data_prep.unit_manifest import UNITS_FILE, UnitManifest, read_source_units, read_unit_manifest

SUMMARY_FILE, SUMMARY_FIGURE = "summary.json", "summary.png"  # of corpus_summary.py, beside the sources
STRAY_REMEDY = "delete it or move it elsewhere"
# What all units of a source have in common.
SHARED_FIELDS = ("tokenizer_fingerprint", "vocab_size", "eos_id", "settings")


@dataclass(frozen=True, kw_only=True)
class ExpectedShard:
    """What a manifest says about the files of a shard."""

    prefix: Path
    documents: int
    tokens: int
    bin_bytes: int
    bin_xxh3_128: str
    idx_xxh3_128: str
    blocks_xxh3_128: str | None
    """Of the .xxh file, which only the shards of a blend have."""
    vocab_size: int
    remedy: str

    @property
    def checksums(self) -> dict[Path, str]:
        """Checksum of each file beside the .bin."""
        sums = {idx_path(self.prefix): self.idx_xxh3_128}
        if self.blocks_xxh3_128 is not None:
            sums[blocks_path(self.prefix)] = self.blocks_xxh3_128
        return sums


@dataclass(kw_only=True)
class Inventory:
    """What ought to be in a folder, and what was found wrong with it before any shard was read."""

    shards: list[ExpectedShard] = field(default_factory=list)
    listed: set[Path] = field(default_factory=set)
    """Files that may be there."""
    problems: list[str] = field(default_factory=list)
    first_units: dict[Path, UnitManifest] = field(default_factory=dict)
    """The first readable manifest of each source's folder, with which the others have to go."""

    @contextmanager
    def collecting_problems(self, path: Path) -> Iterator[None]:
        """What a check of `path` raises about the data is a problem and no reason to stop."""
        try:
            yield
        except UserError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{path}: cannot be read ({error.strerror}); restore it from a copy")


def take_inventory(folder: Path, inventory: Inventory) -> None:
    """Find out what kind of folder it is and add what ought to be in it.

    Raises:
        UserError: the folder is none of ours.
    """
    if is_blend(folder):
        add_blend(folder, inventory)
    elif is_source(folder):
        add_source(folder, inventory)
    else:
        subfolders = sorted(path for path in folder.glob("*") if path.is_dir())
        ours = [path for path in subfolders if is_source(path) or is_blend(path)]
        if not ours:
            raise UserError(
                f"{folder} is no tokenized source ({UNITS_FILE}), no blend ({BLEND_FILE}) and no folder of these; "
                "give one that data_prep/tokenize_corpus.py or data_prep/blend.py wrote"
            )
        inventory.listed |= {folder / SUMMARY_FILE, folder / SUMMARY_FIGURE}
        for path in ours:
            take_inventory(path, inventory)


def is_source(folder: Path) -> bool:
    """Whether this is a tokenized source, even one whose list of units was lost."""
    return (folder / UNITS_FILE).exists() or any((folder / split).is_dir() for split in SPLITS)


def is_blend(folder: Path) -> bool:
    """Whether this is a blend, even one whose list of shards was lost."""
    has_folders = all((folder / name).is_dir() for name in (TOKENIZER_FOLDER, *SPLITS[:1]))
    return (folder / BLEND_FILE).exists() or has_folders


def add_source(folder: Path, inventory: Inventory) -> None:
    """Add the units of a tokenized source: those that it lists, or those that are there if the list is lost."""
    inventory.listed.add(folder / UNITS_FILE)
    source = None
    units = {split: [path.stem for path in sorted((folder / split).glob("*.json"))] for split in SPLITS}
    with inventory.collecting_problems(folder / UNITS_FILE):
        found = read_source_units(folder)
        source, units = found.source, {split: found.of_split(split) for split in SPLITS}
    prefixes = [folder / split / unit for split in SPLITS for unit in units[split]]
    for prefix in with_progress(prefixes, f"{folder.name} manifests", leave=False):
        inventory.listed |= {bin_path(prefix), idx_path(prefix), manifest_path(prefix)}
        with inventory.collecting_problems(manifest_path(prefix)):
            add_unit(prefix, source, inventory)


def add_unit(prefix: Path, source: str | None, inventory: Inventory) -> None:
    """Add a unit's shard, if its manifest can be believed.

    Args:
        prefix: the shard's path without an ending.
        source: the source that it has to belong to; None where that is unknown.
        inventory: is given the shard.

    Raises:
        UserError: the manifest is missing, damaged, or of another place.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        raise IntegrityError(f"{path}: is missing; tokenize the source again with --resume")
    remedy = f"delete {path.name} and tokenize the source again with --resume"
    manifest = read_unit_manifest(path)
    place = (source or manifest.source, prefix.parent.name, prefix.name)
    actual_place = (manifest.source, manifest.split, manifest.unit)
    if actual_place != place:
        raise IntegrityError(
            f"{path}: is the manifest of {' '.join(actual_place)} in the place of {' '.join(place)}; "
            f"give the files back their names, or {remedy}"
        )
    first = inventory.first_units.setdefault(prefix.parents[1], manifest)
    for name in SHARED_FIELDS:
        ours, theirs = getattr(manifest, name), getattr(first, name)
        if ours != theirs:
            inventory.problems.append(
                f"{path}: {name} is {ours}, but {theirs} in {first.split}/{first.unit}.json; {remedy}"
            )
    inventory.shards.append(_expected(prefix, manifest, manifest.vocab_size, remedy))


def _expected(
    prefix: Path, written: UnitManifest | BlendedShard, vocab_size: int, remedy: str
) -> ExpectedShard:
    return ExpectedShard(
        prefix=prefix,
        documents=written.documents,
        tokens=written.tokens,
        bin_bytes=written.bin_bytes,
        bin_xxh3_128=written.bin_xxh3_128,
        idx_xxh3_128=written.idx_xxh3_128,
        blocks_xxh3_128=written.blocks_xxh3_128 if isinstance(written, BlendedShard) else None,
        vocab_size=vocab_size,
        remedy=remedy,
    )


def add_blend(folder: Path, inventory: Inventory) -> None:
    """Add the shards and the tokenizer of a blend; without its list nothing in it can be believed."""
    inventory.listed.add(folder / BLEND_FILE)
    try:
        manifest = read_blend_manifest(folder)
    except UserError as error:
        inventory.problems.append(str(error))
        inventory.listed |= set(_files(folder))  # unverified, which is said, but not strays
        return
    for shard in (*manifest.train.shards, *manifest.validation.values()):
        prefix = folder / shard.prefix
        inventory.listed |= {path_of(prefix) for path_of in (bin_path, idx_path, blocks_path, manifest_path)}
        with inventory.collecting_problems(manifest_path(prefix)):
            check_blend_record(prefix, shard, manifest)
        inventory.shards.append(_expected(prefix, shard, manifest.tokenizer.vocab_size, REMEDY_ANEW))
    for name, checksum in manifest.tokenizer.files.items():
        path = folder / TOKENIZER_FOLDER / name
        inventory.listed.add(path)
        with inventory.collecting_problems(path):
            check_checksum(path, file_checksum(path), checksum, REMEDY_ANEW)


def check_blend_record(prefix: Path, shard: BlendedShard, manifest: BlendManifest) -> None:
    """Check the manifest beside a shard of a blend. Raises UserError unless it says what blend.json says."""
    path = manifest_path(prefix)
    record = read_sealed_json(path, REMEDY_ANEW)
    if (record.get("shard"), record.get("plan_fingerprint")) != (asdict(shard), manifest.plan_fingerprint):
        raise IntegrityError(f"{path}: is not about this shard as {BLEND_FILE} lists it; {REMEDY_ANEW}")


def check_checksum(path: Path, actual: str, expected: str, remedy: str) -> None:
    """Raise IntegrityError when a file is not what was written."""
    if actual != expected:
        raise IntegrityError(f"{path}: was changed after it was written (its checksum differs); {remedy}")


def find_strays(folder: Path, listed: set[Path]) -> Iterator[str]:
    """Name what lies in a folder and is not listed, leftovers of interrupted writing included."""
    parents = {path.parent for path in listed}
    parents |= {parent.parent for parent in parents}
    for root, folders, files in os.walk(folder):
        for name in sorted(files):
            if (path := Path(root, name)) not in listed:
                yield f"{path}: is no file of this folder; {STRAY_REMEDY}"
        known = [name for name in folders if Path(root, name) in parents or name in SPLITS]
        for name in sorted(set(folders) - set(known)):
            yield f"{Path(root, name)}: is no folder of tokenized data; {STRAY_REMEDY}"
        folders[:] = known


def _files(folder: Path) -> Iterator[Path]:
    return (Path(root, name) for root, _, names in os.walk(folder) for name in names)
