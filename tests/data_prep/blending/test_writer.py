"""Reading scattered documents, finding leaked ones, flushing in the background: exact, and loud when it fails."""

import dataclasses
import errno
import os
import resource
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.blend import BlendConfig, blend
from data_prep.blending import leaks
from data_prep.blending import reader as reading
from data_prep.blending.flush import BackgroundFlush
from data_prep.blending.gather import Documents
from data_prep.blending.leaks import ValidationDocuments, documents_within, sketch_documents
from data_prep.blending.reader import DocumentReader
from data_prep.blending.sources import SourceSplit, load_source, scan_documents
from data_prep.errors import IntegrityError, UserError
from data_prep.indexed_shards import ShardWriter, bin_path
from data_prep.text_tokenizer import load_tokenizer
from tests.data_prep.folders import documents_of, unit_prefixes
from tests.data_prep.token_sources import (
    Document,
    make_tokenizer,
    random_documents,
    write_manifest,
    write_source,
)

UINT16 = np.dtype(np.uint16)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> list[SourceSplit]:
    """Two sources of three units each, one of them empty."""
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = make_tokenizer(folder / "tokenizer")
    for number, source in enumerate("ab"):
        documents = random_documents(number, range(1, 61))
        units = {"x": documents[:20], "y": [], "z": documents[20:]}
        write_source(folder, source, tokenizer, units, {"v": random_documents(10 + number, [9] * 30)})
    return [load_source(folder / name, name, load_tokenizer(tokenizer))["train"] for name in "ab"]


def all_documents(splits: list[SourceSplit]) -> Documents:
    parts = [
        (first_unit + stretch.unit, stretch.lengths_tokens)
        for first_unit, split in zip((0, 3), splits, strict=True)
        for stretch in scan_documents(split)
    ]
    return Documents(
        units=np.concatenate([np.full(len(lengths), unit, np.int32) for unit, lengths in parts]),
        lengths_tokens=np.concatenate([lengths for _, lengths in parts]).astype(np.int32),
        offsets_tokens=np.concatenate([np.cumsum(lengths) - lengths for _, lengths in parts]),
    )


def expected_tokens(splits: list[SourceSplit], chosen: list[int]) -> list[int]:
    documents = [document for split in splits for document in documents_of(split.prefix(0), split.prefix(2))]
    return [token for number in chosen for token in documents[number]]


@settings(max_examples=40, deadline=None)
@given(chosen=st.lists(st.integers(0, 119), min_size=1, max_size=200), open_files=st.integers(1, 5))
def test_documents_are_read_in_the_given_order(
    splits: list[SourceSplit], chosen: list[int], open_files: int
) -> None:
    documents = all_documents(splits).take(np.array(chosen))
    with pytest.MonkeyPatch.context() as patch, DocumentReader(splits, UINT16) as reader:
        patch.setattr(reader, "_max_files", open_files)
        assert reader.read(documents).tolist() == expected_tokens(splits, chosen)
        assert reader.read(documents.take(slice(0, 1))).tolist() == expected_tokens(splits, chosen[:1])
        assert reader.sources_of(documents.units).tolist() == [number // 60 for number in chosen]


def test_no_file_stays_open(splits: list[SourceSplit], monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(reading, "READ_THREADS", 1)  # each may have one more open
    with DocumentReader(splits, UINT16) as reader:
        monkeypatch.setattr(reader, "_max_files", 2)
        reader.read(all_documents(splits))
        assert len(os.listdir("/proc/self/fd")) <= len(before) + 2
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_the_limit_of_open_files_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        allowed = reading.allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= allowed > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_reads_that_come_in_parts_are_put_together(
    splits: list[SourceSplit], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_read = os.preadv

    def read_a_little(file: int, views: tuple[memoryview], offset: int) -> int:
        return whole_read(file, (views[0][:6],), offset)

    monkeypatch.setattr(os, "preadv", read_a_little)
    with DocumentReader(splits, UINT16) as reader:
        chosen = list(range(119, -1, -1))
        documents = all_documents(splits).take(np.array(chosen))
        assert reader.read(documents).tolist() == expected_tokens(splits, chosen)


def test_a_file_that_was_cut_is_noticed(splits: list[SourceSplit]) -> None:
    path = bin_path(splits[1].prefix(2))
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    try:
        with (
            DocumentReader(splits, UINT16) as reader,
            pytest.raises(IntegrityError, match=r"b/train/z\.bin ends too early; tokenize the source again"),
        ):
            reader.read(all_documents(splits))
        path.unlink()
        with (
            DocumentReader(splits, UINT16) as reader,
            pytest.raises(IntegrityError, match=r"b/train/z\.bin is missing; tokenize the source again"),
        ):
            reader.read(all_documents(splits))
    finally:
        path.write_bytes(content)


def joined(documents: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([token for document in documents for token in document], UINT16)
    return tokens, np.array([len(document) for document in documents], np.int32)


few_tokens = st.lists(st.integers(2, 3), max_size=12).map(lambda tokens: (*tokens, 1))


@settings(max_examples=100, deadline=None)
@given(
    held_out=st.lists(few_tokens, max_size=20),
    train=st.lists(few_tokens, min_size=1, max_size=40),
    same_sketch=st.booleans(),
)
def test_leaked_documents_are_found_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    held_out: list[Document],
    train: list[Document],
    same_sketch: bool,
) -> None:
    """Documents so short and alike that sketches agree often, or always."""
    with pytest.MonkeyPatch.context() as patch:
        if same_sketch:
            patch.setattr(
                leaks, "sketch_documents", lambda tokens, lengths: np.zeros(len(lengths), np.uint64)
            )
        tokens, lengths = joined(held_out)
        documents = ValidationDocuments(
            leaks.sketch_documents(tokens, lengths), leaks._digest_documents(tokens, lengths)
        )
        assert documents.contain(*joined(train)).tolist() == [document in set(held_out) for document in train]


def test_validation_documents_are_read_whole(
    splits: list[SourceSplit], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(leaks, "READ_TOKENS", 100)
    everything = [document for split in splits for document in documents_of(split.prefix(0), split.prefix(2))]
    documents = ValidationDocuments.read(splits, UINT16)
    changed = [(*document[:-1], 999, 1) for document in everything]
    assert documents.contain(*joined(everything)).all()
    assert not documents.contain(*joined(changed)).any()
    path = bin_path(splits[0].prefix(0))
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    try:
        with pytest.raises(IntegrityError, match=r"a/train/x\.bin ends too early"):
            ValidationDocuments.read(splits, UINT16)
    finally:
        path.write_bytes(content)


def test_sketches_tell_documents_apart() -> None:
    documents = random_documents(0, [*range(1, 500), *[300] * 500])
    assert len(np.unique(sketch_documents(*joined(documents)))) == len(set(documents))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=50), limit=st.integers(1, 60))
def test_documents_within(lengths: list[int], limit: int) -> None:
    parts = [lengths[part] for part in documents_within(np.array(lengths, np.int32), limit)]
    assert [length for part in parts for length in part] == lengths
    assert all(sum(part) <= limit or len(part) == 1 for part in parts)
    assert all(sum(part) + following[0] > limit for part, following in pairwise(parts))


def test_an_error_of_the_disk_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("text")
    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(OSError, match="No space left"), BackgroundFlush(tmp_path / "file") as flush:
        flush.start()


def test_an_error_of_the_block_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def block() -> None:
        with BackgroundFlush(tmp_path / "file") as flush:
            flush.start()
            raise KeyError("first")

    (tmp_path / "file").write_text("text")
    with pytest.raises(KeyError, match="first"):
        block()


@pytest.fixture
def wide_config(tmp_path: Path) -> BlendConfig:
    """A source with four bytes a token."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer", 70_000)
    train = random_documents(0, range(1, 300), 70_000)
    write_source(tmp_path, "own", tokenizer, {"a": train[:100], "b": train[100:]}, {"v": [(69_999, 5, 1)]})
    return BlendConfig(
        tokenized=tmp_path,
        tokenizer=tokenizer,
        output=tmp_path / "blend",
        weights={"own": 2.0},
        total_tokens=sum(map(len, train)),
        shard_tokens=10_000,
    )


def test_wide_tokens_and_long_documents(wide_config: BlendConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.blending.writer.SEGMENT_BYTES", 400)  # most documents are longer
    result = blend(wide_config)
    assert result is not None
    written = documents_of(*unit_prefixes(wide_config.output / "train"))
    assert Counter(written) == Counter(documents_of(*unit_prefixes(wide_config.tokenized / "own/train")))
    assert documents_of(wide_config.output / "validation/own") == [(69_999, 5, 1)]
    assert {np.dtype(np.int32).itemsize * shard.tokens for shard in result.train.shards} == {
        shard.bin_bytes for shard in result.train.shards
    }


def test_a_shard_without_documents_is_refused(wide_config: BlendConfig) -> None:
    with pytest.raises(UserError, match=r"train/shard_\d+ would hold no document; raise --shard-tokens"):
        blend(dataclasses.replace(wide_config, total_tokens=2_000, shard_tokens=1))


def test_writing_stays_below_its_memory(tmp_path: Path) -> None:
    """60 MB of tokens written with segments of 2 MB take far less than 60 MB (the tokenizer takes some)."""
    folder = make_tokenizer(tmp_path / "tokenizer", 70_000)
    write_source(tmp_path, "own", folder, {"a": []}, {"v": [(5, 1)]})
    lengths = np.full(15_000, 1_000, np.int32)
    with ShardWriter(tmp_path / "own/train/a", np.dtype(np.int32)) as writer:
        writer.add_documents(np.arange(15_000_000, dtype=np.int32) % 70_000, lengths)
        summary = dataclasses.asdict(writer.publish())
    write_manifest(tmp_path / "own/train/a", "own", "train", summary, lengths, load_tokenizer(folder))
    code = f"""
import sys, tracemalloc
from pathlib import Path
import data_prep.blending.writer
from data_prep.blend import BlendConfig, blend
data_prep.blending.writer.SEGMENT_BYTES = 2_000_000
folder = Path({str(tmp_path)!r})
tracemalloc.start()
blend(BlendConfig(tokenized=folder, tokenizer=folder / "tokenizer", output=folder / "blend",
                  weights={{"own": 1.0}}, total_tokens=15_000_000))
print("peak", tracemalloc.get_traced_memory()[1])
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert bin_path(tmp_path / "blend/train/shard_00000").stat().st_size == 60_000_000
    assert int(result.stdout.split()[-1]) < 24_000_000
