"""Small tokenized sources and blends, written in an instant, for tests of what reads them."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_prep.blended_data import (
    BLEND_FILE,
    BLEND_FORMAT_VERSION,
    TOKENIZER_FOLDER,
    BlendedShard,
    BlendedSource,
    BlendManifest,
    BlendTokenizer,
    TrainShards,
)
from data_prep.blending.blended_shard import BlendedShardWriter
from data_prep.indexed_shards import FORMAT_VERSION, ShardWriter, manifest_path, token_dtype
from data_prep.output_files import file_checksum, write_sealed_json
from data_prep.unit_manifest import (
    SkippedInput,
    SourceUnits,
    UnitManifest,
    length_histogram,
    write_source_units,
)

VOCAB_SIZE = 60_001
UNITS = {"train": ["part.0", "part.1"], "validation": ["part.0"]}


def random_lengths(generator: np.random.Generator, documents: int) -> np.ndarray:
    """Lengths in tokens of some documents."""
    return generator.integers(1, 60, documents).astype(np.int32)


def random_tokens(prefix: Path, lengths: np.ndarray, vocab_size: int, largest_id: int) -> np.ndarray:
    """Random tokens of a shard's documents; one of them is `largest_id`."""
    generator = np.random.default_rng(len(str(prefix.name)) + int(lengths.sum()))
    tokens = generator.integers(0, vocab_size, lengths.sum())
    tokens[len(tokens) // 2] = largest_id
    return tokens.astype(token_dtype(vocab_size))


def write_unit(
    folder: Path,
    source: str,
    split: str,
    unit: str,
    *,
    lengths: np.ndarray,
    vocab_size: int = VOCAB_SIZE,
    largest_id: int | None = None,
    fingerprint: str = "f" * 64,
) -> UnitManifest:
    """Write one unit with its manifest; its largest token id is by default the vocabulary's last."""
    prefix = folder / split / unit
    last_id = vocab_size - 1 if largest_id is None else largest_id
    with ShardWriter(prefix, token_dtype(vocab_size)) as writer:
        writer.add_documents(random_tokens(prefix, lengths, vocab_size, last_id), lengths)
        summary = writer.publish()
    manifest = UnitManifest(
        format_version=FORMAT_VERSION,
        source=source,
        split=split,
        unit=unit,
        source_file=f"{unit}.jsonl",
        source_bytes=1000,
        settings={"text_field": "text"},
        text_bytes=4 * summary.tokens,
        length_histogram=length_histogram(lengths).tolist(),
        dropped={"empty": 2, "contaminated": 1} if split == "train" else {},
        skipped=[SkippedInput(row=3, reason="is not JSON")] if split == "train" else [],
        checked_documents=4 if split == "train" else 0,
        tokenizer_fingerprint=fingerprint,
        vocab_size=vocab_size,
        eos_id=1,
        **asdict(summary),
    )
    manifest.write(prefix)
    return manifest


def write_source(folder: Path, source: str, vocab_size: int = VOCAB_SIZE) -> Path:
    """Write a source of two train units and one of validation."""
    generator = np.random.default_rng(len(source))
    for split, units in UNITS.items():
        for unit in units:
            lengths = random_lengths(generator, 30)
            write_unit(folder, source, split, unit, lengths=lengths, vocab_size=vocab_size)
    write_source_units(folder, SourceUnits(format_version=FORMAT_VERSION, source=source, **UNITS))
    return folder


def write_blended_shard(folder: Path, prefix: str, lengths: np.ndarray) -> BlendedShard:
    """Write one shard of a blend with its record."""
    tokens = random_tokens(folder / prefix, lengths, VOCAB_SIZE, VOCAB_SIZE - 1)
    with BlendedShardWriter(folder, prefix, tokens.dtype) as writer:
        writer.add_documents(tokens, lengths)
        shard = writer.publish()
    record = {"format_version": BLEND_FORMAT_VERSION, "plan_fingerprint": "plan", "shard": asdict(shard)}
    write_sealed_json(manifest_path(folder / prefix), record)
    return shard


def write_blend(folder: Path) -> Path:
    """Write a blend of one source: two train shards, one of validation, a tokenizer of two files."""
    generator = np.random.default_rng(1)
    names = ["train/shard_00000", "train/shard_00001", "validation/wudao"]
    shards = [write_blended_shard(folder, name, random_lengths(generator, 30)) for name in names]
    tokenizer = folder / TOKENIZER_FOLDER
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_text(f'{{"name": "{name}"}}\n')
    tokens = shards[0].tokens + shards[1].tokens
    manifest = BlendManifest(
        format_version=BLEND_FORMAT_VERSION,
        seed=1,
        plan_fingerprint="plan",
        tokenizer=BlendTokenizer(
            fingerprint="f" * 64,
            vocab_size=VOCAB_SIZE,
            eos_id=1,
            path="tokenizer",
            files={path.name: file_checksum(path) for path in sorted(tokenizer.iterdir())},
        ),
        sources={
            "wudao": BlendedSource(
                weight=1.0,
                tokens_available=tokens,
                tokens_wanted=tokens,
                tokens_realised=tokens,
                documents=60,
                epochs=1.0,
            )
        },
        train=TrainShards(shards=shards[:2]),
        validation={"wudao": shards[2]},
        left_out={},
    )
    write_sealed_json(folder / BLEND_FILE, asdict(manifest))
    return folder
