"""Reads of a shard: what Megatron's own reader gives, and an error that names the block wherever a bit is wrong."""

import errno
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_prep.blended_data import BlendedShard
from data_prep.blending.blended_shard import BlendedShardWriter
from data_prep.block_checksums import BLOCK_BYTES, blocks_path
from data_prep.errors import InputDataError, run_cli
from data_prep.indexed_shards import bin_path, idx_path, token_dtype
from pretrain.checked_shards import CheckedShard, check_indexes
from tests.pretrain.tiny_runs import tiny_recipe, train_in_process

LENGTHS = (1, 7000, 3, 70_000, 12_000, 1)
"""Documents that lie within a block, across two, and across many."""
VOCAB_SIZES = (300, 128_256)
"""Two bytes a token and four."""


def write_shard(folder: Path, vocab_size: int, strange_id: int | None = None) -> BlendedShard:
    """A shard of random tokens; `strange_id` stands at the start of the last long document."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, sum(LENGTHS))
    if strange_id is not None:
        tokens[sum(LENGTHS[:4])] = strange_id
    dtype = token_dtype(vocab_size)
    with BlendedShardWriter(folder, "train/shard_00000", dtype) as writer:
        writer.add_documents(tokens.astype(dtype), np.array(LENGTHS, np.int32))
        return writer.publish()


def open_shard(folder: Path, shard: BlendedShard, vocab_size: int) -> CheckedShard:
    return CheckedShard(str(folder / shard.prefix), shard, vocab_size)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_reads_what_megatron_reads(tmp_path: Path, vocab_size: int) -> None:
    shard = write_shard(tmp_path, vocab_size)
    ours, theirs = open_shard(tmp_path, shard, vocab_size), IndexedDataset(str(tmp_path / shard.prefix))
    assert len(ours) == len(theirs) == len(LENGTHS)
    generator = np.random.default_rng(1)
    for document, length in enumerate(LENGTHS):
        assert np.array_equal(ours[document], theirs[document])
        for _ in range(20):
            offset = int(generator.integers(length))
            part = int(generator.integers(length - offset + 1))
            found, wanted = (ds.get(document, offset=offset, length=part) for ds in (ours, theirs))
            assert found.dtype == wanted.dtype
            assert np.array_equal(found, wanted)
    assert all(np.array_equal(*pair) for pair in zip(ours[1:4], theirs[1:4], strict=True))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_every_flipped_bit_is_named_when_its_block_is_read(tmp_path: Path, vocab_size: int) -> None:
    """And the documents in other blocks can still be read."""
    shard = write_shard(tmp_path, vocab_size)
    path, width = bin_path(tmp_path / shard.prefix), token_dtype(vocab_size).itemsize
    ends_bytes = np.cumsum(LENGTHS) * width
    bits = 8 * shard.bin_bytes
    for bit in (0, bits - 1, *np.random.default_rng(2).integers(0, bits, 15).tolist()):
        flip(path, bit)
        damaged = bit // 8 // BLOCK_BYTES
        ours = open_shard(tmp_path, shard, vocab_size)
        begin, end = damaged * BLOCK_BYTES, min((damaged + 1) * BLOCK_BYTES, shard.bin_bytes)
        for document, end_byte in enumerate(ends_bytes.tolist()):
            first_byte = end_byte - LENGTHS[document] * width
            if first_byte // BLOCK_BYTES <= damaged <= (end_byte - 1) // BLOCK_BYTES:
                message = (
                    f"{path}: block {damaged} (bytes {begin:,} to {end:,}) is not what was written; restore "
                    "the file from a copy or blend again with --overwrite; data_prep/verify_shards.py finds all damage"
                )
                with pytest.raises(InputDataError, match=re.escape(message)):
                    ours[document]
            else:
                assert len(ours[document]) == LENGTHS[document]
        flip(path, bit)


def test_megatrons_own_reader_does_not_see_it(tmp_path: Path) -> None:
    """The fault twin: without the check the wrong token is read, and it is one of the vocabulary."""
    shard = write_shard(tmp_path, 128_256)
    theirs = IndexedDataset(str(tmp_path / shard.prefix))
    before = theirs[1].copy()
    flip(bin_path(tmp_path / shard.prefix), 8 * 4)
    theirs = IndexedDataset(str(tmp_path / shard.prefix))
    after = theirs[1]
    assert np.flatnonzero(before != after).tolist() == [0]
    assert after[0] < 128_256


def test_damage_after_the_first_read_is_found(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, 300)
    ours = open_shard(tmp_path, shard, 300)
    path = bin_path(tmp_path / shard.prefix)
    assert len(ours[0]) == 1
    with path.open("r+b") as stream:  # in place, as a disk does it
        byte = stream.read(1)[0]
        stream.seek(0)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(InputDataError, match=r"block 0 .* is not what was written"):
        ours[0]


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    """Through a memory map this would kill the process with SIGBUS."""
    shard = write_shard(tmp_path, 128_256)
    ours = open_shard(tmp_path, shard, 128_256)
    os.truncate(bin_path(tmp_path / shard.prefix), BLOCK_BYTES + 1)
    assert len(ours[1]) == 7000
    for document, block in ((3, 1), (4, 4)):
        with pytest.raises(InputDataError, match=rf"block {block} .* is not what was written"):
            ours[document]


def test_a_block_that_the_disk_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(tmp_path, 300)
    ours = open_shard(tmp_path, shard, 300)

    def fail(*arguments: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(InputDataError, match=r"block 2 \(bytes .*\) cannot be read \(Input/output error\)"):
        ours[4]


@pytest.mark.parametrize(("vocab_size", "strange_id"), [(300, 300), (128_256, 128_256), (128_256, -1)])
def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path, vocab_size: int, strange_id: int) -> None:
    """Where a blend was made wrongly all its checksums are right."""
    shard = write_shard(tmp_path, vocab_size, strange_id)
    ours = open_shard(tmp_path, shard, vocab_size)
    assert len(ours[3]) == LENGTHS[3]
    block = sum(LENGTHS[:4]) * token_dtype(vocab_size).itemsize // BLOCK_BYTES
    message = rf"block {block} .* holds the token id {strange_id}, but the vocabulary has {vocab_size:,}"
    with pytest.raises(InputDataError, match=message):
        ours[4]


def test_damaged_checksums_are_refused_when_the_shard_is_opened(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, 300)
    flip(blocks_path(tmp_path / shard.prefix), 77)
    with pytest.raises(InputDataError, match=r"shard_00000\.xxh: was changed after it was written"):
        open_shard(tmp_path, shard, 300)


def test_a_shard_in_another_process_checks_too(tmp_path: Path) -> None:
    """Where loader processes are not forked they get a pickled data set."""
    shard = write_shard(tmp_path, 300)
    ours = pickle.loads(pickle.dumps(open_shard(tmp_path, shard, 300)))
    assert len(ours[1]) == 7000
    flip(bin_path(tmp_path / shard.prefix), 0)
    with pytest.raises(InputDataError, match="block 0 "):
        ours[0]


def test_training_ends_with_exit_code_3(
    tiny_blend: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blend = tmp_path / "blend"
    shutil.copytree(tiny_blend, blend)
    flip(blend / "train/shard_00001.bin", 9000)
    recipe = tiny_recipe("base", tmp_path / "run", blend, training={"steps": 100}, data={"loader_workers": 1})
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: train_in_process(recipe))
    assert stopped.value.code == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"error: {blend}/train/shard_00001.bin: block 0 (bytes 0 to 65,536) is not what was"
    )


def test_indexes_are_shared_out_and_checked(tmp_path: Path) -> None:
    shards = {}
    for number in range(5):
        shards[str(tmp_path / f"{number}/train/shard_00000")] = write_shard(tmp_path / str(number), 300)
    check_indexes(shards, 0, 1)
    flip(idx_path(Path(list(shards)[3])), 8 * 40)  # the length of a document
    for rank in range(2):
        if rank == 3 % 2:
            with pytest.raises(InputDataError, match=r"3/train/shard_00000\.idx: was changed after"):
                check_indexes(shards, rank, 2)
        else:
            check_indexes(shards, rank, 2)
