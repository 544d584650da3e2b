"""Which files belong to a source: the four corpora as they are published, and a user's own.

    slimpajama    {train,validation,test}/**/*.jsonl.zst          text; rows from GitHub are dropped
    starcoder     <language>/*.parquet                            content
    proof_pile_2  <subset>/{train,validation,test}/*.jsonl.zst    text
    wudao         **/*.parquet or **/part-*.json (JSON arrays)    content (the title is left out)
    any other     **/*.jsonl, .jsonl.zst, .jsonl.gz, .parquet     text, or what --text-field names
    any other     hub:owner/name[:configuration]                  the same, streamed from the Hugging Face Hub

A folder named train, validation or test decides the split of the files in it; test is neither trained on nor
validated with.
"""

import fnmatch
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.errors import UserError

SPLITS = ("train", "validation")
OTHER_SPLITS = ("test",)
JSONL_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
HUB_PREFIX = "hub:"


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """How a source is published."""

    patterns: tuple[str, ...]
    """Names of its files."""
    text_field: str = "text"
    """JSON key or parquet column that holds the document."""
    dropped_sets: frozenset[str] = frozenset()
    """Values of `meta.redpajama_set_name` whose rows are left out."""
    folders_of_other_columns: frozenset[str] = frozenset()
    """Folders whose parquet files may lack the text column: their rows are counted as dropped then."""


SOURCES: dict[str, SourceFormat] = {
    "slimpajama": SourceFormat(patterns=("*.jsonl.zst",), dropped_sets=frozenset({"RedPajamaGithub"})),
    "starcoder": SourceFormat(
        patterns=("*.parquet",),
        text_field="content",
        folders_of_other_columns=frozenset(
            {
                "git-commits-cleaned",
                "github-issues-filtered-structured",
                "jupyter-scripts-dedup-filtered",
                "jupyter-structured-clean-dedup",
            }
        ),
    ),
    "proof_pile_2": SourceFormat(patterns=("*.jsonl.zst",)),
    "wudao": SourceFormat(patterns=("*.parquet", "part-*.json"), text_field="content"),
}
OWN_CORPUS = SourceFormat(patterns=(*(f"*{suffix}" for suffix in JSONL_SUFFIXES), "*.parquet"))


def source_format(source: str, text_field: str | None) -> SourceFormat:
    """The format of a published source, or that of a user's own corpus under any other name."""
    found = SOURCES.get(source, OWN_CORPUS)
    return found if text_field is None else replace(found, text_field=text_field)


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One input file, which is one unit of work."""

    path: Path
    """The file; for a data set of the Hub, its address."""
    relative_path: str
    """Path under the source's folder, with forward slashes; the same on every machine."""
    unit: str
    """Name of the output shards: the relative path without its ending and split, `/` written as `__`."""
    split: str | None
    """"train" or "validation" where the source publishes both, None where it does not."""
    size_bytes: int


def find_files(source: str, folder: Path) -> list[CorpusFile]:
    """List the files of a source in a fixed order.

    Raises:
        UserError: the folder is missing, holds no file of the source's format, or two files of one name.
    """
    patterns = source_format(source, None).patterns
    wanted = " or ".join(patterns)
    if not folder.is_dir():
        raise UserError(f"--input {folder} is not a folder; give the folder that holds {source}'s {wanted}")
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns) and path.is_file()
    ]
    files = [
        _corpus_file(path, folder)
        for path in paths
        if set(OTHER_SPLITS).isdisjoint(path.relative_to(folder).parts[:-1])
    ]
    if not files:
        raise UserError(f"--input {folder} holds no {wanted} file, which is how {source} is published")
    shards = Counter((file.split, file.unit) for file in files)
    if clashing := [unit for (_, unit), count in shards.items() if count > 1]:
        raise UserError(
            f"--input {folder} has files that would share the name {clashing[0]}; rename one of them"
        )
    return files


def _corpus_file(path: Path, folder: Path) -> CorpusFile:
    relative = path.relative_to(folder)
    parts = list(relative.parts)
    split = next((part for part in parts[:-1] if part in SPLITS), None)
    if split is not None:
        parts.remove(split)
    suffix = next((ending for ending in reversed(JSONL_SUFFIXES) if path.name.endswith(ending)), path.suffix)
    return CorpusFile(
        path=path,
        relative_path=relative.as_posix(),
        unit="__".join(parts).removesuffix(suffix),
        split=split,
        size_bytes=path.stat().st_size,
    )


def has_own_validation(files: list[CorpusFile]) -> bool:
    """Whether the source comes with a validation split, so that none has to be cut from its train files."""
    return any(file.split == "validation" for file in files)
