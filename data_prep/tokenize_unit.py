"""Tokenize one input file into its shards, and recognise the shards that an earlier run finished."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from data_prep.corpus_readers import read_batches
from data_prep.corpus_sources import CorpusFile, source_format
from data_prep.decontamination import BenchmarkNgrams
from data_prep.errors import InputDataError, UserError
from data_prep.indexed_shards import FORMAT_VERSION, ShardWriter, check_pair, manifest_path, token_dtype
from data_prep.readers.row_batch import RowErrors, TooManySkippedError
from data_prep.text_tokenizer import load_tokenizer
from data_prep.token_encoder import Engine, SampleCheck, TokenBatch, open_encoder
from data_prep.unit_manifest import (
    LENGTH_BINS,
    SkippedInput,
    UnitManifest,
    length_histogram,
    read_unit_manifest,
)

CONTAMINATED = "contaminated"

# Is told the input bytes, text bytes and tokens done since the last call.
ReportProgress = Callable[[float, int, int], None]


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """How the files of a source are tokenized; the same for all of them."""

    source: str
    text_field: str | None
    """Key or column of the text; None: the source's own."""
    held_out_fraction: float
    """Share of the documents that goes to validation by hash; 0 where the source has a split of its own."""
    max_skipped: int
    """Rows and files that may be skipped; 0 stops at the first."""
    engine: Engine
    decontaminate: tuple[Path, ...]
    """Benchmark prompts; documents that share 13 tokens in a row with one are dropped."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One input file and where its documents go."""

    file: CorpusFile
    output: Path
    splits: tuple[str, ...]
    """The splits that get a shard from this file: the file's own, or both where documents are held out."""

    def prefix(self, split: str) -> Path:
        """Path of the unit's shard in a split, without an ending."""
        return self.output / split / self.file.unit


def is_held_out(text_utf8: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation slice: a function of its text, so copies stay together."""
    return fraction > 0 and xxhash.xxh3_64_intdigest(text_utf8) < fraction * 2**64


@dataclass(kw_only=True)
class SplitCounts:
    """What went into one split so far."""

    text_bytes: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(LENGTH_BINS, np.int64))


class UnitTokenizer:
    """Everything that a process needs to tokenize files of one source; made once a process."""

    def __init__(self, tokenizer_path: Path, options: UnitOptions) -> None:
        """Raises UserError: a tokenizer or benchmark file that cannot be used."""
        self._options = options
        self._format = source_format(options.source, options.text_field)
        self.tokenizer = load_tokenizer(tokenizer_path)
        self._encoder = open_encoder(tokenizer_path, self.tokenizer, options.engine)
        self._dtype = token_dtype(self.tokenizer.vocab_size)
        self.benchmarks = (
            BenchmarkNgrams.from_files(options.decontaminate, self._encode_each)
            if options.decontaminate
            else None
        )

    def _encode_each(self, texts: list[str]) -> list[np.ndarray]:
        ids, offsets = self._encoder.encode(texts)
        return np.split(ids, offsets[1:-1])

    @property
    def settings(self) -> dict[str, object]:
        """What decides the bytes of a shard beside its file and the tokenizer."""
        return {
            "held_out_fraction": self._options.held_out_fraction,
            "text_field": self._format.text_field,
            "decontaminated_against": self.benchmarks.fingerprint if self.benchmarks else None,
        }

    def tokenize(self, unit: Unit, report: ReportProgress) -> list[UnitManifest]:
        """Tokenize one file; publish its shards, then their manifests.

        Raises:
            InputDataError: the file is not in the source's format; nothing of the unit is left behind.
            IntegrityError: the engine and the reference disagree on a document; nor then.
        """
        try:
            return self._tokenize_file(unit, report)
        except TooManySkippedError:
            raise
        except InputDataError as error:
            if not self._options.max_skipped:
                raise
            return self._skip_file(unit, str(error), report)

    def _tokenize_file(self, unit: Unit, report: ReportProgress) -> list[UnitManifest]:
        errors = RowErrors(unit.file.path, self._options.max_skipped)
        check = SampleCheck(self.tokenizer, unit.file.path)
        counts = {split: SplitCounts() for split in unit.splits}
        dropped: Counter[str] = Counter()
        with ExitStack() as stack:
            writers = self._open_writers(unit, stack)
            done = 0.0
            for batch in read_batches(unit.file, self._format, errors):
                tokens = self._encoder.encode(batch.texts)
                if not self._encoder.is_reference:
                    check.check(batch.texts, tokens)
                dropped += batch.dropped
                text_bytes = self._write(batch.texts, tokens, writers, counts, dropped)
                report((batch.progress - done) * unit.file.size_bytes, text_bytes, len(tokens.ids))
                done = batch.progress
            return self._publish(unit, writers, counts, dropped, errors.skipped, check.checked_documents)

    def _open_writers(self, unit: Unit, stack: ExitStack) -> dict[str, ShardWriter]:
        return {
            split: stack.enter_context(ShardWriter(unit.prefix(split), self._dtype)) for split in unit.splits
        }

    def _write(
        self,
        texts: list[str],
        tokens: TokenBatch,
        writers: dict[str, ShardWriter],
        counts: dict[str, SplitCounts],
        dropped: Counter[str],
    ) -> int:
        """Write a batch's documents to their splits; return the bytes of the texts written."""
        lengths = np.diff(tokens.offsets)
        kept = np.ones(len(texts), bool)
        if self.benchmarks is not None:
            kept = ~self.benchmarks.contaminated(tokens.ids, lengths)
            dropped[CONTAMINATED] += len(texts) - int(kept.sum())
        chosen: dict[str, list[int]] = {split: [] for split in writers}
        text_bytes = 0
        first, last = next(iter(writers)), next(reversed(writers))
        for number in np.flatnonzero(kept).tolist():
            utf8 = texts[number].encode()
            split = last if is_held_out(utf8, self._options.held_out_fraction) else first
            chosen[split].append(number)
            counts[split].text_bytes += len(utf8)
            text_bytes += len(utf8)
        for split, numbers in chosen.items():
            ends = lengths[numbers] + 1
            writers[split].add_documents(self._with_eos(tokens, numbers, int(ends.sum())), ends)
            counts[split].histogram += length_histogram(ends)
        return text_bytes

    def _with_eos(self, tokens: TokenBatch, numbers: Sequence[int], size_tokens: int) -> np.ndarray:
        """Gather documents into one array, each with its EOS, in the shard's number type."""
        gathered = np.full(size_tokens, self.tokenizer.eos_id, self._dtype)
        offsets = tokens.offsets.tolist()
        place = 0
        for number in numbers:
            begin, end = offsets[number], offsets[number + 1]
            gathered[place : place + end - begin] = tokens.ids[begin:end]
            place += end - begin + 1
        return gathered

    def _skip_file(self, unit: Unit, reason: str, report: ReportProgress) -> list[UnitManifest]:
        """Publish empty shards for a file that cannot be read, with the reason in the manifest."""
        with ExitStack() as stack:
            writers = self._open_writers(unit, stack)
            report(unit.file.size_bytes, 0, 0)
            counts = {split: SplitCounts() for split in unit.splits}
            return self._publish(
                unit, writers, counts, Counter(), [SkippedInput(row=None, reason=reason)], checked=0
            )

    def _publish(
        self,
        unit: Unit,
        writers: dict[str, ShardWriter],
        counts: dict[str, SplitCounts],
        dropped: Counter[str],
        skipped: list[SkippedInput],
        checked: int,
    ) -> list[UnitManifest]:
        """Give all shards of a unit their names, then write the manifests, which make them count."""
        summaries = {split: writer.publish() for split, writer in writers.items()}
        manifests = []
        for split, summary in summaries.items():
            is_first = split == unit.splits[0]
            manifest = UnitManifest(
                format_version=FORMAT_VERSION,
                source=self._options.source,
                split=split,
                unit=unit.file.unit,
                source_file=unit.file.relative_path,
                source_bytes=unit.file.size_bytes,
                settings=self.settings,
                documents=summary.documents,
                tokens=summary.tokens,
                text_bytes=counts[split].text_bytes,
                length_histogram=counts[split].histogram.tolist(),
                dropped={reason: dropped[reason] for reason in sorted(+dropped)} if is_first else {},
                skipped=skipped if is_first else [],
                checked_documents=checked if is_first else 0,
                bin_bytes=summary.bin_bytes,
                bin_xxh3_128=summary.bin_xxh3_128,
                idx_xxh3_128=summary.idx_xxh3_128,
                tokenizer_fingerprint=self.tokenizer.fingerprint,
                vocab_size=self.tokenizer.vocab_size,
                eos_id=self.tokenizer.eos_id,
            )
            manifest.write(unit.prefix(split))
            manifests.append(manifest)
        return manifests

    def finished(self, unit: Unit) -> list[UnitManifest] | None:
        """Return the manifests of a unit that an earlier run finished, None where there is work left.

        Raises:
            UserError: the earlier run had other settings, so its shards must not be mixed with this run's.
        """
        wanted = {"source": self._options.source, "tokenizer_fingerprint": self.tokenizer.fingerprint}
        now = {**wanted, **self.settings}
        manifests = []
        for split in unit.splits:
            path = manifest_path(unit.prefix(split))
            if not path.is_file():
                return None
            manifest = read_unit_manifest(path)
            was = {**{name: getattr(manifest, name) for name in wanted}, **manifest.settings}
            for name in now:
                if was.get(name) != now[name]:
                    raise UserError(
                        f"{path}: {name} was {was.get(name)}, now it is {now[name]}; "
                        "pass --overwrite to start anew"
                    )
            same_file = (unit.file.relative_path, unit.file.size_bytes)
            if (manifest.source_file, manifest.source_bytes) != same_file or not _is_whole(unit, manifest):
                return None  # fetched again, or damaged since: made again
            manifests.append(manifest)
        return manifests


def _is_whole(unit: Unit, manifest: UnitManifest) -> bool:
    """Whether a shard's files are there and have the sizes that the manifest says."""
    try:
        return check_pair(unit.prefix(manifest.split)) == (manifest.documents, manifest.tokens)
    except UserError:
        return False
