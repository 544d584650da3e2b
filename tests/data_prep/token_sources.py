"""Tokenized sources made directly, without text: a tokenizer of numbered words, and units of given documents."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from data_prep.blend import COLA_WEIGHTS, BlendConfig
from data_prep.indexed_shards import FORMAT_VERSION, ShardWriter, token_dtype
from data_prep.text_tokenizer import TextTokenizer, load_tokenizer
from data_prep.unit_manifest import SourceUnits, UnitManifest, length_histogram, write_source_units

EOS = 1
SPLITS = ("train", "validation")
Document = tuple[int, ...]
Units = Mapping[str, Sequence[Document]]


def make_tokenizer(folder: Path, vocab_size: int = 1000) -> Path:
    """A tokenizer whose vocabulary is as large as wanted; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"<unk>": 0, "</s>": EOS} | {f"w{number}": number for number in range(2, vocab_size)}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return folder


def random_documents(seed: int, lengths_tokens: Iterable[int], vocab_size: int = 1000) -> list[Document]:
    """Documents of given lengths, EOS included; long ones are as good as surely all different."""
    rng = np.random.default_rng(seed)
    return [(*rng.integers(2, vocab_size, length - 1).tolist(), EOS) for length in lengths_tokens]


def write_unit(
    folder: Path,
    source: str,
    split: str,
    unit: str,
    documents: Sequence[Document],
    tokenizer: TextTokenizer,
    settings: dict[str, object] | None = None,
) -> None:
    """Write one unit's shard and manifest."""
    dtype = token_dtype(tokenizer.vocab_size)
    lengths = np.array([len(document) for document in documents], np.int32)
    prefix = folder / split / unit
    with ShardWriter(prefix, dtype) as writer:
        writer.add_documents(
            np.array([token for document in documents for token in document], dtype), lengths
        )
        summary = writer.publish()
    write_manifest(prefix, source, split, asdict(summary), lengths, tokenizer, settings)


def write_manifest(
    prefix: Path,
    source: str,
    split: str,
    summary: dict[str, int | str],
    lengths_tokens: np.ndarray,
    tokenizer: TextTokenizer,
    settings: dict[str, object] | None = None,
) -> None:
    """Write the manifest of a shard whose summary is known."""
    UnitManifest(
        format_version=FORMAT_VERSION,
        source=source,
        split=split,
        unit=prefix.name,
        source_file=f"{prefix.name}.jsonl",
        source_bytes=1,
        settings=settings or {},
        text_bytes=1,
        length_histogram=length_histogram(lengths_tokens).tolist(),
        dropped={},
        checked_documents=0,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        **summary,  # type: ignore[arg-type]  # documents, tokens, bin_bytes and the two checksums
    ).write(prefix)


def write_source(
    tokenized: Path, source: str, tokenizer_folder: Path, train: Units, validation: Units
) -> None:
    """Write all units of a source."""
    tokenizer = load_tokenizer(tokenizer_folder)
    for split, units in zip(SPLITS, (train, validation), strict=True):
        (tokenized / source / split).mkdir(parents=True, exist_ok=True)
        for unit, documents in units.items():
            write_unit(tokenized / source, source, split, unit, documents, tokenizer)
    write_source_units(
        tokenized / source,
        SourceUnits(
            format_version=FORMAT_VERSION, source=source, train=list(train), validation=list(validation)
        ),
    )


def make_world(folder: Path) -> BlendConfig:
    """Four small sources of several units, and a blend of them in four shards with the published weights."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    for number, source in enumerate(COLA_WEIGHTS):
        lengths = np.random.default_rng(number).integers(8, 80, 1000).tolist()
        documents = random_documents(number, lengths)
        train = {"b": documents[:300], "a": documents[300:800], "empty": [], "c.d": documents[800:]}
        lengths = np.random.default_rng(100 + number).integers(8, 80, 200).tolist()
        held_out = random_documents(100 + number, lengths)
        validation = {"x": held_out[:150], "y": held_out[150:]}
        write_source(folder / "tokenized", source, tokenizer, train, validation)
    return BlendConfig(
        tokenized=folder / "tokenized",
        tokenizer=tokenizer,
        output=folder / "blend",
        total_tokens=100_000,
        shard_tokens=25_000,
        validation_tokens=5_000,
    )
