"""Write the shards of a blend, each in segments: gather a segment's documents in memory, then write it once."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from data_prep.blended_data import BLEND_FORMAT_VERSION, BlendedShard
from data_prep.blending.blended_shard import BlendedShardWriter
from data_prep.blending.flush import BackgroundFlush
from data_prep.blending.gather import Documents, ShardGroup, ShardStream, groups_of_shards
from data_prep.blending.leaks import ValidationDocuments, documents_within
from data_prep.blending.plan import BlendPlan
from data_prep.blending.reader import DocumentReader
from data_prep.blending.sources import waiting_bar
from data_prep.block_checksums import blocks_path, check_blocks_size
from data_prep.errors import UserError
from data_prep.indexed_shards import bin_path, check_pair, idx_path, manifest_path
from data_prep.output_files import partial_path, read_sealed_json, write_sealed_json
from data_prep.progress import progress_bar

SEGMENT_BYTES = 1 << 27  # in memory at a time; the larger, the fewer times each input file is visited
IN_VALIDATION = "in_validation"


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What lies next to every blended shard as its .json manifest, sealed by a checksum."""

    format_version: int
    plan_fingerprint: str
    """The plan that the shard belongs to; on --resume a shard of another plan is refused."""
    shard: BlendedShard
    source_documents: dict[str, int]
    source_tokens: dict[str, int]
    left_out: dict[str, int]
    """Documents left out, by reason."""


RECORD = TypeAdapter(ShardRecord)


class WritingBar(AbstractContextManager["WritingBar"]):
    """Progress in tokens, with tokens/s, MB/s and the time that is left."""

    def __init__(self, tokens: int, token_bytes: int) -> None:
        self._bar = progress_bar("blend", tokens, unit="token", unit_scale=True)
        self._token_bytes = token_bytes
        self._start_seconds = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def add(self, tokens: int) -> None:
        """Count tokens that were read and written, or left out."""
        seconds = max(time.monotonic() - self._start_seconds, 1e-9)
        megabytes = (self._bar.n + tokens) * self._token_bytes / 1e6
        self._bar.set_postfix_str(f"{megabytes / seconds:.0f} MB/s", refresh=False)
        self._bar.update(tokens)


class ShardCounts:
    """What went into a shard so far."""

    def __init__(self, sources: list[str]) -> None:
        self._sources = sources
        self._documents = np.zeros(len(sources), np.int64)
        self._tokens = np.zeros(len(sources), np.int64)
        self.left_out: Counter[str] = Counter()

    def add(self, sources: np.ndarray, lengths_tokens: np.ndarray) -> None:
        """Count documents. Both [documents]: place of the source, length."""
        np.add.at(self._documents, sources, 1)
        np.add.at(self._tokens, sources, lengths_tokens.astype(np.int64))

    def documents(self) -> dict[str, int]:
        """Documents of every source."""
        return dict(zip(self._sources, self._documents.tolist(), strict=True))

    def tokens(self) -> dict[str, int]:
        """Tokens of every source."""
        return dict(zip(self._sources, self._tokens.tolist(), strict=True))


class BlendWriter:
    """Writes shards of one plan into one folder; shards that are already there are kept.

    Several processes may write different shards at the same time.

    Raises (from its methods):
        UserError: a shard in the folder belongs to another plan, or a source was changed while it was read.
    """

    def __init__(self, folder: Path, plan: BlendPlan) -> None:
        self._folder = folder
        self._plan = plan
        self._plan_fingerprint = plan.fingerprint
        self._segment_tokens = SEGMENT_BYTES // plan.dtype.itemsize

    def finished(self, prefix: str) -> ShardRecord | None:
        """Return the record of a shard that an earlier run finished, None where it has to be written."""
        path = manifest_path(self._folder / prefix)
        if not path.is_file():
            return None
        remedy = "delete it and run again with --resume"
        try:
            content = read_sealed_json(path, remedy)
            if content.get("format_version") != BLEND_FORMAT_VERSION:
                raise UserError(f"{path}: was written by another version; pass --overwrite to blend anew")
            record = RECORD.validate_python(content)
        except ValidationError as error:
            raise UserError(f"{path}: is no manifest of a blended shard; {remedy}") from error
        if record.plan_fingerprint != self._plan_fingerprint:
            raise UserError(
                f"{path}: was written from other settings or sources; pass --overwrite to blend anew"
            )
        try:
            counts = check_pair(self._folder / prefix)
            check_blocks_size(self._folder / prefix, record.shard.bin_bytes)
        except UserError:
            return None  # damaged since: written again
        return record if counts == (record.shard.documents, record.shard.tokens) else None

    def missing(self, prefixes: Iterable[str]) -> list[str]:
        """Those of the shards that have to be written."""
        return [prefix for prefix in prefixes if self.finished(prefix) is None]

    def write_validation(self) -> None:
        """Write `validation/<source>` for every source that has none."""
        for source, split in self._plan.validation.items():
            prefix = self._plan.validation_prefix(source)
            if self.finished(prefix) is not None:
                continue
            group = ShardGroup([self._plan.validation_stream(source)], [0])
            documents = group.in_written_order(0, self._plan.written_order(prefix))
            with DocumentReader([split], self._plan.dtype) as reader:
                self._write(prefix, reader, documents, [source])

    def write_train(self, shards: Sequence[int]) -> None:
        """Write those of the train shards that are not finished, without the documents of any validation split."""
        missing = [shard for shard in shards if self.finished(self._plan.train_prefix(shard)) is None]
        if not missing:
            return
        splits = [source.split for source in self._plan.train.values()]
        leaks = ValidationDocuments.read(self._plan.validation.values(), self._plan.dtype)
        streams = self._cut_train()
        tokens = self._plan.tokens_wanted * len(missing) // self._plan.shard_count
        with (
            DocumentReader(splits, self._plan.dtype) as reader,
            WritingBar(tokens, self._plan.dtype.itemsize) as bar,
        ):
            for together in groups_of_shards(streams, missing):
                group = self._gather(streams, together)
                for shard in together:
                    prefix = self._plan.train_prefix(shard)
                    documents = group.in_written_order(shard, self._plan.written_order(prefix))
                    self._write(prefix, reader, documents, list(self._plan.train), leaks, bar)

    def _cut_train(self) -> list[ShardStream]:
        sources = self._plan.train.values()
        scans = sum(2 * math.ceil(source.epochs) * source.split.documents for source in sources)
        with waiting_bar("index", scans, "doc") as bar:
            return self._plan.train_streams(bar.update)

    @staticmethod
    def _gather(streams: list[ShardStream], shards: list[int]) -> ShardGroup:
        scanned = sum(stream.split.documents for stream in streams)
        with waiting_bar("index", scanned, "doc") as bar:
            return ShardGroup(streams, shards, bar.update)

    def _write(
        self,
        prefix: str,
        reader: DocumentReader,
        documents: Documents,
        sources: list[str],
        leaks: ValidationDocuments | None = None,
        bar: WritingBar | None = None,
    ) -> None:
        """Write one shard, then its manifest."""
        self._remove(prefix)
        counts = ShardCounts(sources)
        with BlendedShardWriter(self._folder, prefix, self._plan.dtype) as writer:
            with BackgroundFlush(partial_path(bin_path(self._folder / prefix))) as flush:
                for part in documents_within(documents.lengths_tokens, self._segment_tokens):
                    segment = documents.take(part)
                    tokens, lengths = reader.read(segment), segment.lengths_tokens
                    segment_sources = reader.sources_of(segment.units)
                    if leaks is not None:
                        kept = ~leaks.contain(tokens, lengths)
                        if not kept.all():
                            counts.left_out[IN_VALIDATION] += int(np.count_nonzero(~kept))
                            tokens = tokens[np.repeat(kept, lengths)]
                            lengths, segment_sources = lengths[kept], segment_sources[kept]
                    writer.add_documents(tokens, lengths)
                    counts.add(segment_sources, lengths)
                    flush.start()
                    if bar is not None:
                        bar.add(int(segment.lengths_tokens.sum()))
            if not any(counts.documents().values()):
                raise UserError(f"{prefix} would hold no document; raise --shard-tokens")
            shard = writer.publish()
        record = ShardRecord(
            format_version=BLEND_FORMAT_VERSION,
            plan_fingerprint=self._plan_fingerprint,
            shard=shard,
            source_documents=counts.documents(),
            source_tokens=counts.tokens(),
            left_out=dict(counts.left_out),
        )
        write_sealed_json(manifest_path(self._folder / prefix), asdict(record))

    def _remove(self, prefix: str) -> None:
        """Delete what an earlier run left of a shard, its manifest first; on a full disk its room is needed."""
        for path_of in (manifest_path, bin_path, idx_path, blocks_path):
            path_of(self._folder / prefix).unlink(missing_ok=True)
