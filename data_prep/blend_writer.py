"""Write the shards of a blend: gather the planned documents from the tokenized sources, shard by shard."""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from data_prep.blend_plan import BlendPlan, SourceShards
from data_prep.blended_data import BlendedShard
from data_prep.errors import UserError
from data_prep.indexed_shards import (
    FORMAT_VERSION,
    ShardWriter,
    bin_path,
    check_pair,
    manifest_path,
    read_index,
)
from data_prep.output_files import read_json_object, write_json_whole

OPEN_FILES = 256
IN_VALIDATION = "in_validation"
PROGRESS_SECONDS = 1.0

Digest = bytes


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What lies next to every blended shard as its .json manifest."""

    format_version: int
    plan_fingerprint: str
    """The plan that the shard belongs to; on --resume a shard of another plan is refused."""
    shard: BlendedShard
    source_documents: dict[str, int]
    source_tokens: dict[str, int]
    left_out: dict[str, int]
    """Documents left out, by reason."""


def document_digest(tokens: np.ndarray) -> Digest:
    """Hash of a document's tokens (xxh3: the fastest of the well-kept ones; no enemy picks the documents)."""
    return xxhash.xxh3_128_digest(tokens.tobytes())


class DocumentReader(AbstractContextManager["DocumentReader"]):
    """Reads single documents of a source's shards, with a bounded number of open files."""

    def __init__(self, shards: SourceShards, dtype: np.dtype) -> None:
        self._shards = shards
        self._dtype = dtype
        self._files: OrderedDict[int, int] = OrderedDict()

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def read(self, document: int) -> np.ndarray:
        """Return the tokens of a document. Raises UserError when the shard has become shorter."""
        shard = int(np.searchsorted(self._shards.first_documents, document, side="right")) - 1
        size = int(self._shards.lengths_tokens[document]) * self._dtype.itemsize
        offset = int(self._shards.offsets_tokens[document]) * self._dtype.itemsize
        data = os.pread(self._open(shard), size, offset)
        if len(data) < size:
            raise UserError(
                f"{bin_path(self._shards.prefixes[shard])} ends too early; tokenize the source again"
            )
        return np.frombuffer(data, dtype=self._dtype)

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(bin_path(self._shards.prefixes[shard]), os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]


class BlendWriter:
    """Writes the shards of one plan into one folder; shards that are already there are kept.

    Raises (from its methods):
        UserError: a shard in the folder belongs to another plan, or a source was changed while it was read.
    """

    def __init__(self, folder: Path, plan: BlendPlan) -> None:
        self._folder = folder
        self._plan = plan
        self._plan_fingerprint = plan.fingerprint

    def write_validation(self) -> dict[str, ShardRecord]:
        """Write `validation/<source>` for every source."""
        records = {}
        for name, shards in self._plan.validation.items():
            with DocumentReader(shards, self._plan.dtype) as reader:
                documents = (
                    (name, reader, int(document)) for document in self._plan.validation_documents(name)
                )
                records[name] = self._finished(f"validation/{name}") or self._write(
                    f"validation/{name}", documents
                )
        return records

    def write_train(self, banned: frozenset[Digest]) -> list[ShardRecord]:
        """Write `train/shard_00000` and so on, without the documents whose digest is `banned`."""
        names = list(self._plan.train)
        total_tokens = sum(plan.tokens_wanted for plan in self._plan.train.values())
        records = []
        with ExitStack() as stack:
            readers = [
                stack.enter_context(DocumentReader(plan.shards, self._plan.dtype))
                for plan in self._plan.train.values()
            ]
            bar = tqdm(
                total=total_tokens, desc="blend", unit="token", unit_scale=True, mininterval=PROGRESS_SECONDS
            )
            stack.callback(bar.close)
            for number, (sources, documents) in enumerate(self._plan.shuffled_train_shards()):
                prefix = f"train/shard_{number:05d}"
                record = self._finished(prefix)
                if record is None:
                    chosen = (
                        (names[source], readers[source], int(document))
                        for source, document in zip(sources, documents, strict=True)
                    )
                    record = self._write(prefix, chosen, banned, bar.update)
                else:
                    bar.update(record.shard.tokens)
                records.append(record)
        return records

    def _write(
        self,
        prefix: str,
        documents: Iterable[tuple[str, DocumentReader, int]],
        banned: frozenset[Digest] = frozenset(),
        advance: Callable[[int], object] | None = None,
    ) -> ShardRecord:
        """Write one shard from (source, its reader, document number), then its manifest.

        `advance` is told the tokens of each document, for a progress bar.
        """
        source_documents: Counter[str] = Counter()
        source_tokens: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        with ShardWriter(self._folder / prefix, self._plan.dtype) as writer:
            for source, reader, document in documents:
                tokens = reader.read(document)
                if banned and document_digest(tokens) in banned:
                    left_out[IN_VALIDATION] += 1
                else:
                    writer.add(tokens)
                    source_documents[source] += 1
                    source_tokens[source] += len(tokens)
                if advance is not None:
                    advance(len(tokens))
            if not source_documents:
                raise UserError(f"{prefix} would hold no document; raise --shard-tokens")
            summary = writer.publish()
        record = ShardRecord(
            format_version=FORMAT_VERSION,
            plan_fingerprint=self._plan_fingerprint,
            shard=BlendedShard(prefix=prefix, **asdict(summary)),
            source_documents=dict(source_documents),
            source_tokens=dict(source_tokens),
            left_out=dict(left_out),
        )
        write_json_whole(manifest_path(self._folder / prefix), asdict(record))
        return record

    def _finished(self, prefix: str) -> ShardRecord | None:
        """Return the record of a shard that an earlier run finished, None where it has to be written."""
        path = manifest_path(self._folder / prefix)
        if not path.is_file():
            return None
        remedy = "pass --overwrite to blend anew"
        try:
            record = TypeAdapter(ShardRecord).validate_python(read_json_object(path, remedy))
        except ValidationError as error:
            raise UserError(f"{path}: is no manifest of a blended shard; {remedy}") from error
        if record.plan_fingerprint != self._plan_fingerprint:
            raise UserError(f"{path}: was written from other settings or sources; {remedy}")
        try:
            check_pair(self._folder / prefix)
        except UserError:
            return None  # damaged since: written again
        return record


def validation_digests(folder: Path, records: Iterable[ShardRecord]) -> frozenset[Digest]:
    """Digests of all documents in the validation shards as they were written."""
    digests: set[Digest] = set()
    for record in records:
        index = read_index(folder / record.shard.prefix)
        tokens = np.memmap(bin_path(folder / record.shard.prefix), dtype=index.dtype, mode="r")
        ends = np.cumsum(index.lengths_tokens, dtype=np.int64)
        digests |= {
            document_digest(tokens[end - length : end])
            for end, length in zip(ends, index.lengths_tokens, strict=True)
        }
    return frozenset(digests)
