"""The shard files: read back as written, by us and by Megatron; damage is noticed; nothing half-written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.indexed_shards import ShardWriter, bin_path, check_pair, idx_path, read_index, token_dtype

DOCUMENTS = [np.array(tokens, dtype=np.uint16) for tokens in ([5, 6, 1], [1], [7, 8, 9, 9, 1])]


def write(prefix: Path, documents: list[np.ndarray]) -> None:
    with ShardWriter(prefix, documents[0].dtype) as writer:
        for tokens in documents:
            writer.add(tokens)
        writer.publish()


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write(tmp_path / "shard.v1", DOCUMENTS)  # a dot, which must not be taken for an ending
    return tmp_path / "shard.v1"


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 127_999), min_size=1, max_size=40), min_size=1, max_size=20),
    wide=st.booleans(),
)
def test_round_trip_through_megatrons_own_reader(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], wide: bool
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dtype = token_dtype(128_000 if wide else 60_000)
    arrays = [np.array(tokens).astype(dtype) for tokens in documents]
    prefix = tmp_path_factory.mktemp("shards") / "shard"
    write(prefix, arrays)
    index = read_index(prefix)
    assert index.lengths_tokens.tolist() == [len(tokens) for tokens in documents]
    assert check_pair(prefix) == (len(documents), sum(map(len, documents)))
    dataset = IndexedDataset(str(prefix))
    assert len(dataset) == len(documents)
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    for ours, theirs in zip(arrays, dataset[:], strict=True):
        assert theirs.dtype == ours.dtype
        assert (theirs == ours).all()


def test_files_equal_those_of_megatrons_builder(tmp_path: Path, prefix: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for tokens in DOCUMENTS:
        builder.add_item(torch.from_numpy(tokens.astype(np.int32)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert bin_path(prefix).read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert idx_path(prefix).read_bytes() == (tmp_path / "theirs.idx").read_bytes()


@pytest.mark.parametrize("vocab_size", [2048, 65_499, 65_500, 128_256])
def test_number_type_is_megatrons(vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_summary(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shard", np.dtype(np.uint16)) as writer:
        for tokens in DOCUMENTS:
            writer.add(tokens)
        summary = writer.publish()
    assert (summary.documents, summary.tokens, summary.bin_bytes) == (3, 9, 18)
    assert summary.bin_xxh3_128 == xxhash.xxh3_128_hexdigest((tmp_path / "shard.bin").read_bytes())
    assert summary.idx_xxh3_128 == xxhash.xxh3_128_hexdigest((tmp_path / "shard.idx").read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard.bin", "shard.idx"]


def test_empty_shard_is_readable(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shard", np.dtype(np.int32)) as writer:
        writer.publish()
    assert check_pair(tmp_path / "shard") == (0, 0)
    assert len(read_index(tmp_path / "shard").lengths_tokens) == 0


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with ShardWriter(tmp_path / "shard", np.dtype(np.uint16)) as writer:
            writer.add(DOCUMENTS[0])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def index_of_another(prefix: Path) -> None:
    write(prefix.with_name("other"), DOCUMENTS[:2])
    idx_path(prefix.with_name("other")).rename(idx_path(prefix))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bin cut": (
        lambda prefix: cut(bin_path(prefix), 2),
        r"\.bin has 16 bytes where shard\.v1\.idx counts 18",
    ),
    "bin longer": (lambda prefix: bin_path(prefix).write_bytes(b"x" * 19), r"\.bin has 19 bytes"),
    "bin missing": (lambda prefix: bin_path(prefix).unlink(), r"\.bin is missing"),
    "idx cut": (lambda prefix: cut(idx_path(prefix), 8), r"\.idx has \d+ bytes"),
    "idx empty": (lambda prefix: idx_path(prefix).write_bytes(b""), "not a Megatron index"),
    "idx of nothing": (lambda prefix: idx_path(prefix).write_bytes(b"x" * 100), "not a Megatron index"),
    "idx missing": (lambda prefix: idx_path(prefix).unlink(), r"\.idx is missing"),
    "idx of another": (index_of_another, r"\.bin has 18 bytes where shard\.v1\.idx counts 8"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(prefix: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    check_pair(prefix)
    damage(prefix)
    with pytest.raises(UserError, match=message):
        check_pair(prefix)
    with pytest.raises(UserError, match=message):
        read_index(prefix)
