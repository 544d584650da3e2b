"""Turn one source's files into Megatron token shards: the first of two steps from corpora to training data.

    python data_prep/tokenize_corpus.py --source slimpajama --input runs/demo/corpora/slimpajama \\
        --tokenizer runs/demo/tokenizer --output runs/demo/tokenized/slimpajama --workers 2

`--source` is slimpajama, starcoder, proof_pile_2 or wudao, read as they are published, or any other name for a
corpus of your own: JSON lines (plain, .zst, .gz), parquet, or `--input hub:owner/name`. Every input file is one
unit and becomes `<split>/<unit>.bin`, `.idx` and `.json` (a manifest with counts, checksums and the tokenizer's
fingerprint). No BOS is added; an EOS ends every document. A source without a validation split of its own gets
one from a slice of its documents, chosen by a hash of their text. Any number of workers writes the same bytes;
so does a Slurm array, each task of which takes its share of the units. An interrupted run goes on with
--resume. The second step is data_prep/blend.py.

Exit codes: 2 a setting, 3 an input file or row, 4 a full disk, 5 the engine and the reference disagree.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from data_prep.corpus_sources import HUB_PREFIX, SPLITS, find_files, has_own_validation
from data_prep.errors import UserError, run_cli
from data_prep.indexed_shards import FORMAT_VERSION, manifest_path
from data_prep.output_files import PARTIAL_SUFFIX
from data_prep.readers.hub import find_hub_shards
from data_prep.readers.row_batch import TooManySkippedError
from data_prep.token_encoder import Engine
from data_prep.tokenize_unit import Unit, UnitOptions, UnitTokenizer
from data_prep.tokenize_workers import ProgressBar, run_in_processes, use_one_thread
from data_prep.unit_manifest import UNITS_FILE, SourceUnits, UnitManifest, sum_counts, write_source_units
from data_prep.work_slice import work_slice

SMALL_CORPUS_BYTES = 10**9
SMALL_VALIDATION_FRACTION, LARGE_VALIDATION_FRACTION = 0.04, 0.005
SHOWN_SKIPPED = 5


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Tokenize one source into Megatron .bin/.idx shards with a manifest each."""

    source: str
    """Name of the corpus: slimpajama, starcoder, proof_pile_2 or wudao, or a name of your own for another."""
    input: str
    """Folder of the corpus as published, searched with its subfolders; or hub:owner/name[:configuration]."""
    tokenizer: Path
    """Folder with a tokenizer.json (such as Llama 3.1's) or tokenizer.model, or such a file."""
    output: Path
    """Folder for the shards; gets the subfolders train and validation."""
    text_field: str | None = None
    """JSON key or parquet column of the text; unset: what the source publishes, "text" for your own."""
    workers: int = 1
    """Processes; each takes one core and one input file at a time."""
    units: str | None = None
    """Only units a to b-1, as a:b in the order of the files; unset: all, or a Slurm array task's share."""
    validation_fraction: float | None = None
    """Share of documents held out where a source has no validation split; unset: 0.04 of less than 1 GB of
    input, 0.005 of more."""
    decontaminate: tuple[Path, ...] = ()
    """JSON lines of benchmark prompts (prompt, problem, question, passage or text): documents that share 13
    tokens in a row with one of them are dropped."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a row or file that cannot be read: stop, or skip, count and list it in the manifest."""
    max_skipped: int = 100
    """Rows and files that --on-error skip may skip in all before it stops after all."""
    engine: Engine = "fast"
    """fast, checked against the tokenizer's own library on a sample of every file; or that library itself."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with an interrupted run: finished units are kept."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start anew: shards that are in the output folder are deleted first."""


def check_config(config: TokenizeConfig) -> None:
    """Raise UserError that lists everything wrong with the numbers and flags."""
    problems = []
    if config.workers < 1:
        problems.append(f"--workers {config.workers} must be at least 1")
    if config.max_skipped < 1:
        problems.append(f"--max-skipped {config.max_skipped} must be at least 1")
    if config.validation_fraction is not None and not 0 < config.validation_fraction < 1:
        problems.append(f"--validation-fraction {config.validation_fraction} must lie between 0 and 1")
    if config.resume and config.overwrite:
        problems.append("--resume and --overwrite exclude each other; give one")
    if problems:
        raise UserError("; ".join(problems))


def plan_units(config: TokenizeConfig) -> tuple[list[Unit], float]:
    """List the work in a fixed order, with the share of documents to hold out.

    Raises:
        UserError: a missing or empty corpus.
    """
    if config.input.startswith(HUB_PREFIX):
        files = find_hub_shards(config.input)
    else:
        files = find_files(config.source, Path(config.input))
    fraction = config.validation_fraction
    if has_own_validation(files):
        fraction = 0.0
    elif fraction is None:
        is_small = sum(file.size_bytes for file in files) < SMALL_CORPUS_BYTES
        fraction = SMALL_VALIDATION_FRACTION if is_small else LARGE_VALIDATION_FRACTION
    units = [
        Unit(file=file, output=config.output, splits=SPLITS if fraction else (file.split or "train",))
        for file in files
    ]
    return units, fraction


def claim_output(config: TokenizeConfig, units: list[Unit], is_slice: bool) -> None:
    """Make sure that the output folder may be written to, and empty it for --overwrite.

    Args:
        config: the run's settings.
        units: all units of the source.
        is_slice: other tasks write into the same folder, so that it may be there.

    Raises:
        UserError: the folder exists and neither flag was given, or it holds shards of other input files.
    """
    if is_slice and config.overwrite:
        raise UserError(
            "--overwrite would delete the other tasks' shards; delete the folder, then start the array"
        )
    if not config.output.exists():
        return
    if not (config.resume or config.overwrite or is_slice):
        raise UserError(
            f"--output {config.output} exists; pass --resume to go on or --overwrite to start anew"
        )
    expected = {manifest_path(unit.prefix(split)) for unit in units for split in unit.splits}
    for split in SPLITS:
        for path in sorted((config.output / split).glob("*")):
            if config.overwrite and path.suffix in (".bin", ".idx", ".json", PARTIAL_SUFFIX):
                path.unlink()
            elif not config.overwrite and path.suffix == ".json" and path not in expected:
                raise UserError(
                    f"{path} belongs to no file of --input {config.input}; pass --overwrite to start anew"
                )


def release_empty_output(output: Path) -> None:
    """After a failure, remove the folders if nothing was finished."""
    for split in SPLITS:
        with suppress(OSError):  # not empty, or not there
            (output / split).rmdir()
    if not any((output / split).exists() for split in SPLITS):
        (output / UNITS_FILE).unlink(missing_ok=True)
        with suppress(OSError):
            output.rmdir()


class FinishedUnits:
    """Collects the manifests of finished units, and stops when too much was skipped."""

    def __init__(self, max_skipped: int) -> None:
        self._max_skipped = max_skipped
        self.manifests: list[UnitManifest] = []

    def take(self, manifests: list[UnitManifest]) -> None:
        """Add a unit. Raises TooManySkippedError when the ceiling is passed."""
        self.manifests += manifests
        skipped = sum(len(manifest.skipped) for manifest in self.manifests)
        if skipped > self._max_skipped:
            last = next(manifest for manifest in reversed(self.manifests) if manifest.skipped)
            raise TooManySkippedError(
                f"{skipped:,} rows and files were skipped, more than --max-skipped {self._max_skipped:,}; "
                f"the last: {last.source_file}: {last.skipped[-1].reason}"
            )


def tokenize_corpus(config: TokenizeConfig) -> list[UnitManifest]:
    """Tokenize a source, or a slice of it; return the manifests of its shards, those of earlier runs included.

    Raises:
        UserError: bad input, tokenizer or output folder; finished units stay, for --resume.
    """
    check_config(config)
    units, fraction = plan_units(config)
    options = UnitOptions(
        source=config.source,
        text_field=config.text_field,
        held_out_fraction=fraction,
        max_skipped=config.max_skipped if config.on_error == "skip" else 0,
        engine=config.engine,
        decontaminate=config.decontaminate,
    )
    chosen = work_slice(len(units), config.units, os.environ)
    tokenizer = UnitTokenizer(config.tokenizer, options)
    claim_output(config, units, is_slice=len(chosen) < len(units))
    finished, left = FinishedUnits(config.max_skipped), []
    for unit in (units[number] for number in chosen):
        manifests = tokenizer.finished(unit)
        if manifests is None:
            left.append(unit)
        else:
            finished.take(manifests)
    config.output.mkdir(parents=True, exist_ok=True)
    names = {split: [unit.file.unit for unit in units if split in unit.splits] for split in SPLITS}
    write_source_units(
        config.output, SourceUnits(format_version=FORMAT_VERSION, source=config.source, **names)
    )
    bar = ProgressBar(sum(unit.file.size_bytes for unit in left), config.source)
    try:
        if config.workers > 1 and len(left) > 1:
            run_in_processes(left, config.tokenizer, options, config.workers, bar, finished.take)
        else:
            for unit in left:
                finished.take(tokenizer.tokenize(unit, bar.add))
    except BaseException:
        release_empty_output(config.output)
        raise
    finally:
        bar.close()
    return sorted(finished.manifests, key=lambda manifest: (manifest.split, manifest.unit))


def summary_table(manifests: list[UnitManifest], title: str) -> Table:
    """Show what was written, a row a split."""
    table = Table("split", "files", "documents", "tokens", "MB", "B/token", "checked", "dropped", title=title)
    for split in SPLITS:
        rows = [manifest for manifest in manifests if manifest.split == split]
        tokens, text_bytes = sum(row.tokens for row in rows), sum(row.text_bytes for row in rows)
        dropped = sum_counts(row.dropped for row in rows)
        table.add_row(
            split,
            str(len(rows)),
            f"{sum(row.documents for row in rows):,}",
            f"{tokens:,}",
            f"{text_bytes / 1e6:.2f}",
            f"{text_bytes / max(tokens, 1):.2f}",
            f"{sum(row.checked_documents for row in rows):,}",
            ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()) or "none",
        )
    return table


def skipped_lines(manifests: list[UnitManifest]) -> list[str]:
    """One line for each of the first rows and files that were skipped, and how many more there are."""
    lines = [
        f"skipped: {manifest.source_file}{'' if skipped.row is None else f': row {skipped.row}'}: {skipped.reason}"
        for manifest in manifests
        for skipped in manifest.skipped
    ]
    more = len(lines) - SHOWN_SKIPPED
    return lines[:SHOWN_SKIPPED] + ([f"... and {more:,} more, in the manifests"] if more > 0 else [])


def main() -> None:
    """Entry point."""
    config = tyro.cli(TokenizeConfig, description=__doc__)
    use_one_thread()
    manifests = tokenize_corpus(config)
    console = Console()
    console.print(summary_table(manifests, f"{config.source} in {config.output}"))
    for line in skipped_lines(manifests):
        console.print(line, highlight=False)


if __name__ == "__main__":
    run_cli(main)
