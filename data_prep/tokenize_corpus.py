"""Turn one source's files into Megatron token shards: the first of two steps from corpora to training data.

    python data_prep/tokenize_corpus.py --source slimpajama --input runs/demo/corpora/slimpajama \\
        --tokenizer runs/demo/tokenizer --output runs/demo/tokenized/slimpajama --workers 2

Every input file is one unit and becomes `<split>/<unit>.bin`, `.idx` and `.json` (a manifest with counts,
checksums and the tokenizer's fingerprint). No BOS is added; an EOS ends every document. A source without a
validation split of its own gets one from a slice of its documents, chosen by a hash of their text. Any
number of workers writes the same bytes. An interrupted run goes on with --resume. The second step is
data_prep/blend.py.
"""

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from data_prep.corpus_readers import SPLITS, find_files, has_own_validation
from data_prep.errors import UserError, run_cli
from data_prep.indexed_shards import UNITS_FILE, UnitManifest, manifest_path
from data_prep.output_files import PARTIAL_SUFFIX, write_json_whole
from data_prep.text_tokenizer import load_tokenizer
from data_prep.tokenize_unit import Unit, finished_manifests, tokenize_unit
from data_prep.tokenize_workers import ProgressBar, run_in_processes

SMALL_CORPUS_BYTES = 10**9
SMALL_VALIDATION_FRACTION, LARGE_VALIDATION_FRACTION = 0.04, 0.005


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Tokenize one source into Megatron .bin/.idx shards with a manifest each."""

    source: Literal["slimpajama", "starcoder", "proof_pile_2", "wudao"]
    """Which corpus it is; decides the file format and what is left out (SlimPajama: its GitHub rows)."""
    input: Path
    """Folder of the corpus as published; searched with its subfolders."""
    tokenizer: Path
    """Folder with a tokenizer.json (such as Llama 3.1's) or tokenizer.model, or such a file."""
    output: Path
    """Folder for the shards; gets the subfolders train and validation."""
    workers: int = 1
    """Processes; each takes one core and one input file at a time."""
    validation_fraction: float | None = None
    """Share of documents held out where a source has no validation split; unset: 0.04 of less than 1 GB of
    input, 0.005 of more."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with an interrupted run: finished units are kept."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start anew: shards that are in the output folder are deleted first."""


def plan_units(config: TokenizeConfig) -> list[Unit]:
    """List the work in a fixed order. Raises UserError for a missing or empty corpus."""
    files = find_files(config.source, config.input)
    fraction = config.validation_fraction
    if has_own_validation(files):
        fraction = 0.0
    elif fraction is None:
        is_small = sum(file.size_bytes for file in files) < SMALL_CORPUS_BYTES
        fraction = SMALL_VALIDATION_FRACTION if is_small else LARGE_VALIDATION_FRACTION
    return [
        Unit(source=config.source, file=file, output=config.output, held_out_fraction=fraction)
        for file in files
    ]


def claim_output(config: TokenizeConfig, units: list[Unit]) -> None:
    """Make sure that the output folder may be written to, and empty it for --overwrite.

    Raises:
        UserError: the folder exists and neither flag was given, or it holds shards of other input files.
    """
    if config.resume and config.overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one")
    if not config.output.exists():
        return
    if not (config.resume or config.overwrite):
        raise UserError(
            f"--output {config.output} exists; pass --resume to go on or --overwrite to start anew"
        )
    expected = {manifest_path(unit.prefix(split)) for unit in units for split in unit.splits}
    for split in SPLITS:
        for path in sorted((config.output / split).glob("*")):
            if config.overwrite and path.suffix in (".bin", ".idx", ".json", PARTIAL_SUFFIX):
                path.unlink()
            elif config.resume and path.suffix == ".json" and path not in expected:
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


def tokenize_corpus(config: TokenizeConfig) -> list[UnitManifest]:
    """Tokenize a source; return the manifests of all its shards, those of earlier runs included.

    Raises:
        UserError: bad input, tokenizer or output folder; finished units stay, for --resume.
    """
    if config.workers < 1:
        raise UserError(f"--workers {config.workers} must be at least 1")
    if config.validation_fraction is not None and not 0 < config.validation_fraction < 1:
        raise UserError(f"--validation-fraction {config.validation_fraction} must lie between 0 and 1")
    units = plan_units(config)
    tokenizer = load_tokenizer(config.tokenizer)
    claim_output(config, units)
    manifests, left = [], []
    for unit in units:
        finished = finished_manifests(unit, tokenizer.fingerprint)
        if finished is None:
            left.append(unit)
        else:
            manifests += finished
    plan = {split: [unit.file.unit for unit in units if split in unit.splits] for split in SPLITS}
    config.output.mkdir(parents=True, exist_ok=True)
    write_json_whole(config.output / UNITS_FILE, {"source": config.source, **plan})
    bar = ProgressBar(sum(unit.file.size_bytes for unit in left), config.source)
    try:
        if config.workers > 1 and len(left) > 1:
            manifests += run_in_processes(left, config.tokenizer, config.workers, bar)
        else:
            for unit in left:
                manifests += tokenize_unit(unit, tokenizer, bar.add)
    except BaseException:
        release_empty_output(config.output)
        raise
    finally:
        bar.close()
    return sorted(manifests, key=lambda manifest: (manifest.split, manifest.unit))


def summary_table(manifests: list[UnitManifest], title: str) -> Table:
    """Show what was written, a row a split."""
    table = Table("split", "files", "documents", "tokens", "MB", "B/token", "dropped", title=title)
    for split in SPLITS:
        rows = [manifest for manifest in manifests if manifest.split == split]
        tokens, text_bytes = sum(row.tokens for row in rows), sum(row.text_bytes for row in rows)
        dropped: Counter[str] = Counter()
        for row in rows:
            dropped.update(row.dropped)
        table.add_row(
            split,
            str(len(rows)),
            f"{sum(row.documents for row in rows):,}",
            f"{tokens:,}",
            f"{text_bytes / 1e6:.2f}",
            f"{text_bytes / max(tokens, 1):.2f}",
            ", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items())) or "none",
        )
    return table


def main() -> None:
    """Entry point."""
    config = tyro.cli(TokenizeConfig, description=__doc__)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallelism is --workers, a file each
    Console().print(summary_table(tokenize_corpus(config), f"{config.source} in {config.output}"))


if __name__ == "__main__":
    run_cli(main)
