"""Turn one source's files into Megatron token shards: the first of two steps from corpora to training data.

    python data_prep/tokenize_corpus.py --source slimpajama --input runs/demo/corpora/slimpajama \\
        --tokenizer runs/demo/tokenizer --output runs/demo/tokenized/slimpajama --workers 2

Every input file is one unit and becomes `<split>/<unit>.bin`, `.idx` and `.json` (a manifest with counts,
checksums and the tokenizer's fingerprint). No BOS is added; an EOS ends every document. A source without a
validation split of its own gets one from a slice of its documents, chosen by a hash of their text. Any
number of workers writes the same bytes. An interrupted run goes on with --resume. The second step is
data_prep/blend.py.
"""

import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data_prep.corpus_readers import SPLITS, CorpusFile, find_files, has_own_validation, read_batches
from data_prep.errors import UserError, run_cli
from data_prep.indexed_shards import (
    FORMAT_VERSION,
    UNITS_FILE,
    ShardWriter,
    UnitManifest,
    check_pair,
    manifest_path,
    read_unit_manifest,
    token_dtype,
)
from data_prep.output_files import PARTIAL_SUFFIX, write_json_whole
from data_prep.text_tokenizer import TextTokenizer, load_tokenizer

HASH_BYTES = 8
PROGRESS_SECONDS = 1.0
SMALL_CORPUS_BYTES = 10**9
SMALL_VALIDATION_FRACTION, LARGE_VALIDATION_FRACTION = 0.04, 0.005
# A finished unit is kept on --resume only if these still say what this run would say.
SETTINGS_OF_A_UNIT = ("source", "source_file", "source_bytes", "held_out_fraction", "tokenizer_fingerprint")

# Input bytes, text bytes and tokens done since the last call.
ReportProgress = Callable[[float, int, int], None]


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


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One input file and where its documents go."""

    source: str
    file: CorpusFile
    output: Path
    held_out_fraction: float
    """Share of the documents that goes to validation; 0 where the file belongs to one split."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that get a shard from this file."""
        return SPLITS if self.held_out_fraction else (self.file.split or "train",)

    def prefix(self, split: str) -> Path:
        """Path of the unit's shard in a split, without an ending."""
        return self.output / split / self.file.unit


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


def is_held_out(text_utf8: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation slice: a function of its text, so copies stay together."""
    digest = hashlib.blake2b(text_utf8, digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "little") < fraction * 2 ** (8 * HASH_BYTES)


def tokenize_unit(unit: Unit, tokenizer: TextTokenizer, report: ReportProgress) -> list[UnitManifest]:
    """Tokenize one file; publish its shards, then their manifests.

    Raises:
        UserError: the file is not in the source's format; nothing of the unit is left behind.
    """
    dtype, splits, fraction = token_dtype(tokenizer.vocab_size), unit.splits, unit.held_out_fraction
    text_bytes: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(unit.prefix(split), dtype)) for split in splits}
        done = 0.0
        for batch in read_batches(unit.source, unit.file.path):
            batch_bytes = batch_tokens = 0
            for text, ids in zip(batch.texts, tokenizer.encode_batch(batch.texts), strict=True):
                encoded = text.encode()
                split = splits[1] if fraction and is_held_out(encoded, fraction) else splits[0]
                ids.append(tokenizer.eos_id)
                writers[split].add(np.array(ids, dtype=dtype))
                text_bytes[split] += len(encoded)
                batch_bytes += len(encoded)
                batch_tokens += len(ids)
            dropped += batch.dropped
            report((batch.progress - done) * unit.file.size_bytes, batch_bytes, batch_tokens)
            done = batch.progress
        summaries = {split: writer.publish() for split, writer in writers.items()}
    manifests = []
    for split, summary in summaries.items():
        manifest = UnitManifest(
            format_version=FORMAT_VERSION,
            source=unit.source,
            split=split,
            unit=unit.file.unit,
            source_file=unit.file.relative_path,
            source_bytes=unit.file.size_bytes,
            held_out_fraction=fraction,
            documents=summary.documents,
            tokens=summary.tokens,
            text_bytes=text_bytes[split],
            dropped=dict(sorted(dropped.items())) if split == splits[0] else {},
            bin_bytes=summary.bin_bytes,
            bin_sha256=summary.bin_sha256,
            idx_sha256=summary.idx_sha256,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        )
        manifest.write(unit.prefix(split))
        manifests.append(manifest)
    return manifests


def finished_manifests(unit: Unit, fingerprint: str) -> list[UnitManifest] | None:
    """Return the manifests of a unit that an earlier run finished, None where there is work left.

    Raises:
        UserError: the earlier run had other settings, so its shards must not be mixed with this run's.
    """
    manifests = []
    wanted = {
        "source": unit.source,
        "source_file": unit.file.relative_path,
        "source_bytes": unit.file.size_bytes,
        "held_out_fraction": unit.held_out_fraction,
        "tokenizer_fingerprint": fingerprint,
    }
    for split in unit.splits:
        path = manifest_path(unit.prefix(split))
        if not path.is_file():
            return None
        manifest = read_unit_manifest(path)
        for name in SETTINGS_OF_A_UNIT:
            if getattr(manifest, name) != wanted[name]:
                was, now = getattr(manifest, name), wanted[name]
                raise UserError(f"{path}: {name} was {was}, now it is {now}; pass --overwrite to start anew")
        try:
            counts = check_pair(unit.prefix(split))
        except UserError:
            return None  # damaged since: made again
        if counts != (manifest.documents, manifest.tokens):
            return None
        manifests.append(manifest)
    return manifests


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


class ProgressBar:
    """A bar over the bytes of the input files, with the rates of text and tokens beside it."""

    def __init__(self, total_bytes: int, label: str) -> None:
        self._bar = tqdm(
            total=total_bytes, desc=label, unit="B", unit_scale=True, mininterval=PROGRESS_SECONDS
        )
        self._input_bytes, self._text_bytes, self._tokens = 0.0, 0, 0

    def add(self, input_bytes: float, text_bytes: int, tokens: int) -> None:
        """Take note of work done."""
        self.show(self._input_bytes + input_bytes, self._text_bytes + text_bytes, self._tokens + tokens)

    def show(self, input_bytes: float, text_bytes: int, tokens: int) -> None:
        """Show the work done since the start."""
        self._input_bytes, self._text_bytes, self._tokens = input_bytes, text_bytes, tokens
        seconds = max(self._bar.format_dict["elapsed"], 1e-9)
        rates = f"text {text_bytes / 1e6 / seconds:.1f} MB/s, {tokens / 1e6 / seconds:.2f} Mtokens/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(int(input_bytes) - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


_worker_tokenizer: TextTokenizer
_worker_counts: SynchronizedArray


def start_worker(tokenizer_path: Path, counts: SynchronizedArray) -> None:
    """Set up a worker process: its own tokenizer on one core, and the counters that all workers share."""
    global _worker_tokenizer, _worker_counts
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(tokenizer_path)
    _worker_counts = counts


def work_on(unit: Unit) -> list[UnitManifest]:
    """Tokenize one unit in a worker process."""

    def report(*amounts: float) -> None:
        with _worker_counts.get_lock():
            for index, amount in enumerate(amounts):
                _worker_counts[index] += amount

    return tokenize_unit(unit, _worker_tokenizer, report)


def run_in_processes(units: list[Unit], config: TokenizeConfig, bar: ProgressBar) -> list[UnitManifest]:
    """Tokenize units in parallel; the first error stops the rest.

    Raises:
        UserError: a bad input file, or a worker that was killed.
    """
    context = multiprocessing.get_context("spawn")  # forking a process with threads can lock up
    counts = context.Array("d", 3)
    manifests: list[UnitManifest] = []
    largest_first = sorted(units, key=lambda unit: -unit.file.size_bytes)
    with ProcessPoolExecutor(config.workers, context, start_worker, (config.tokenizer, counts)) as pool:
        pending = {pool.submit(work_on, unit) for unit in largest_first}
        try:
            while pending:
                done, pending = wait(pending, timeout=PROGRESS_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    manifests += future.result()
                bar.show(counts[0], int(counts[1]), int(counts[2]))
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed (out of memory?); use fewer --workers, then --resume"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return manifests


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
            manifests += run_in_processes(left, config, bar)
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
