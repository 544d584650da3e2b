"""Tokenize one input file into its shards, and recognise the shards that an earlier run finished."""

import hashlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.corpus_readers import SPLITS, CorpusFile, read_batches
from data_prep.errors import UserError
from data_prep.indexed_shards import (
    FORMAT_VERSION,
    ShardWriter,
    UnitManifest,
    check_pair,
    manifest_path,
    read_unit_manifest,
    token_dtype,
)
from data_prep.text_tokenizer import TextTokenizer

HASH_BYTES = 8

# Is told the input bytes, text bytes and tokens done since the last call.
ReportProgress = Callable[[float, int, int], None]


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
        for name, now in wanted.items():
            if (was := getattr(manifest, name)) != now:
                raise UserError(f"{path}: {name} was {was}, now it is {now}; pass --overwrite to start anew")
        try:
            counts = check_pair(unit.prefix(split))
        except UserError:
            return None  # damaged since: made again
        if counts != (manifest.documents, manifest.tokens):
            return None
        manifests.append(manifest)
    return manifests
