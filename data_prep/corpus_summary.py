"""Summarise tokenized sources from their manifests alone: a table, summary.json and summary.png.

    python data_prep/corpus_summary.py --tokenized runs/demo/tokenized

For each source and split: files, documents, tokens, bytes of text, bytes a token, the median length of a
document, rows dropped by reason, rows skipped, and documents whose tokens were compared with the reference
tokenizer's. The figure shows the lengths of documents, tokens, bytes a token and dropped rows of each source.
Works while a source is still being tokenized; units that are not finished yet are counted as missing.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from data_prep.corpus_figure import draw_summary, with_unit
from data_prep.corpus_sources import SPLITS
from data_prep.errors import UserError, run_cli
from data_prep.indexed_shards import manifest_path
from data_prep.output_files import partial_path, publish_file, write_json_whole
from data_prep.progress import with_progress
from data_prep.shard_inventory import SUMMARY_FIGURE, SUMMARY_FILE
from data_prep.unit_manifest import (
    LENGTH_BINS,
    UNITS_FILE,
    UnitManifest,
    read_source_units,
    read_unit_manifest,
    sum_counts,
)


@dataclass(frozen=True, kw_only=True)
class SummaryConfig:
    """Summarise a folder of tokenized sources from their manifests."""

    tokenized: Path
    """Folder with one subfolder a source, as data_prep/tokenize_corpus.py wrote them."""
    output: Path | None = None
    """Folder for summary.json and summary.png; unset: the folder of --tokenized."""


@dataclass(kw_only=True)
class SplitSummary:
    """One split of one source, or several of them added up."""

    files: int = 0
    """Units that are finished."""
    missing_files: int = 0
    """Units that the source lists and that have no manifest yet."""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    length_histogram: list[int] = field(default_factory=lambda: [0] * LENGTH_BINS)
    """As in UnitManifest: bin b counts documents of 2^(b-1) to 2^b - 1 tokens."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    skipped: int = 0
    """Rows and files that could not be read."""
    checked_documents: int = 0
    """Documents whose tokens were compared with the reference tokenizer's."""

    @property
    def bytes_per_token(self) -> float | None:
        """Fertility: bytes of UTF-8 text a token; None where there are no tokens."""
        return self.text_bytes / self.tokens if self.tokens else None

    @property
    def median_length_tokens(self) -> float | None:
        """Median length of a document, estimated from the histogram; None where there are no documents."""
        half, below = sum(self.length_histogram) / 2, 0
        for bits, count in enumerate(self.length_histogram):
            if count and below + count >= half:
                # Within a bin the logarithms of the lengths are taken to be spread evenly.
                return 2.0 ** (bits - 1 + (half - below) / count)
            below += count
        return None

    def add(self, other: "UnitManifest | SplitSummary") -> None:
        """Add a unit, or another summary."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.length_histogram = [
            a + b for a, b in zip(self.length_histogram, other.length_histogram, strict=True)
        ]
        self.dropped = sum_counts([self.dropped, other.dropped])
        self.checked_documents += other.checked_documents
        if isinstance(other, UnitManifest):
            self.files += 1
            self.skipped += len(other.skipped)
        else:
            self.files += other.files
            self.missing_files += other.missing_files
            self.skipped += other.skipped


Summary = dict[str, dict[str, SplitSummary]]  # by source, then split


def total_of(splits: Iterable[SplitSummary]) -> SplitSummary:
    """Add up summaries."""
    total = SplitSummary()
    for split in splits:
        total.add(split)
    return total


def find_sources(tokenized: Path) -> list[Path]:
    """List the folders of sources under a folder. Raises UserError when there are none."""
    folders = sorted(path.parent for path in tokenized.glob(f"*/{UNITS_FILE}"))
    if not folders:
        raise UserError(
            f"--tokenized {tokenized} holds no tokenized source (a subfolder with {UNITS_FILE}); give the folder "
            "above those that data_prep/tokenize_corpus.py wrote"
        )
    return folders


def summarise(tokenized: Path) -> Summary:
    """Read the manifests of all sources under a folder.

    Raises:
        UserError: there is no source, or a manifest cannot be read or was changed.
    """
    summary: Summary = {}
    for folder in find_sources(tokenized):
        units = read_source_units(folder)
        splits = {split: SplitSummary() for split in SPLITS if units.of_split(split)}
        prefixes = [(split, folder / split / unit) for split in splits for unit in units.of_split(split)]
        for split, prefix in with_progress(prefixes, folder.name, leave=False):
            if manifest_path(prefix).exists():
                splits[split].add(read_unit_manifest(manifest_path(prefix)))
            else:
                splits[split].missing_files += 1
        summary[folder.name] = splits
    return summary


def summary_table(summary: Summary) -> Table:
    """Show a row a source and split, and the total; exact counts are in summary.json."""
    table = _table("source", "split")
    for name in ("files", "docs", "tokens", "text", "bytes/\ntoken", "median\ntokens", "checked"):
        table.add_column(name, justify="right", no_wrap=True)
    for source, splits in summary.items():
        for split, row in splits.items():
            table.add_row(source, split, *_cells(row), end_section=split == list(splits)[-1])
    table.add_row("all", "", *_cells(total_of(row for splits in summary.values() for row in splits.values())))
    return table


def left_out_table(summary: Summary) -> Table:
    """Show how many rows of each source were dropped or skipped, a row a reason."""
    table = _table("source", "left out")
    for name in ("rows", "share of rows"):
        table.add_column(name, justify="right", no_wrap=True)
    for source, splits in summary.items():
        total = total_of(splits.values())
        left_out = total.dropped | ({"skipped, not readable": total.skipped} if total.skipped else {})
        rows = total.documents + sum(left_out.values())
        for reason, count in left_out.items():
            table.add_row(source, reason, f"{count:,}", f"{count / rows:.3%}")
        if not left_out:
            table.add_row(source, "nothing", "0", "")
    return table


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _cells(row: SplitSummary) -> Iterator[str]:
    files = row.files + row.missing_files
    yield f"{row.files:,}/{files:,}" if row.missing_files else f"{files:,}"
    yield with_unit(row.documents)
    yield with_unit(row.tokens)
    yield f"{with_unit(row.text_bytes)}B"
    yield "-" if row.bytes_per_token is None else f"{row.bytes_per_token:.2f}"
    yield "-" if row.median_length_tokens is None else f"{row.median_length_tokens:,.0f}"
    yield f"{row.checked_documents:,}"


def _as_json(row: SplitSummary) -> dict[str, object]:
    median = row.median_length_tokens
    return {
        **asdict(row),
        "bytes_per_token": row.bytes_per_token,
        "median_length_tokens": None if median is None else math.floor(median),
    }


def write_summary(summary: Summary, output: Path) -> None:
    """Write summary.json and summary.png, each whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    totals = {source: total_of(splits.values()) for source, splits in summary.items()}
    content = {
        "sources": {
            source: {split: _as_json(row) for split, row in splits.items()}
            for source, splits in summary.items()
        },
        "total": _as_json(total_of(totals.values())),
    }
    write_json_whole(output / SUMMARY_FILE, content)
    figure = output / SUMMARY_FIGURE
    partial_path(figure).write_bytes(draw_summary(totals))
    publish_file(figure)


def main() -> None:
    """Entry point."""
    config = tyro.cli(SummaryConfig, description=__doc__)
    summary = summarise(config.tokenized)
    output = config.output or config.tokenized
    write_summary(summary, output)
    console = Console()
    console.print(summary_table(summary), left_out_table(summary))
    console.print(f"wrote {output / SUMMARY_FILE} and {output / SUMMARY_FIGURE}", highlight=False)


if __name__ == "__main__":
    run_cli(main)
