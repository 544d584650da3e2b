"""Batches of a damaged blend: one line says what is damaged, in loader processes too."""

import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

import pretrain.data
from data_prep.blended_data import open_blend
from data_prep.errors import InputDataError
from pretrain.data import build_datasets, micro_batches
from pretrain.parallel import ParallelContext
from tests.pretrain.tiny_runs import tiny_recipe


@pytest.fixture
def damaged(tmp_path: Path, tiny_blend: Path) -> Path:
    """A blend with one bit of a train shard flipped: the lowest of a token, so it is another of the vocabulary."""
    blend = tmp_path / "blend"
    shutil.copytree(tiny_blend, blend)
    with (blend / "train/shard_00001.bin").open("r+b") as stream:
        stream.seek(1000)
        byte = stream.read(1)[0]
        stream.seek(1000)
        stream.write(bytes([byte ^ 1]))
    return blend


def tokens_of_run(
    blend: Path, run_folder: Path, context: ParallelContext, loader_workers: int
) -> torch.Tensor:
    """All samples that the blend has, as a run of that many steps gets them. [samples, tokens]"""
    recipe = tiny_recipe("base", run_folder, blend, data={"loader_workers": loader_workers})
    samples, _ = build_datasets(recipe, open_blend(blend))
    steps = len(samples) // recipe.training.global_batch_size
    return torch.cat([batch.tokens_BS for batch in micro_batches(samples, recipe, context, 0, steps)])


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_damaged_block_is_named_in_one_line(
    damaged: Path, tmp_path: Path, context: ParallelContext, loader_workers: int
) -> None:
    with pytest.raises(InputDataError) as caught:
        tokens_of_run(damaged, tmp_path / "run", context, loader_workers)
    path = damaged / "train/shard_00001.bin"
    assert str(caught.value).startswith(
        f"{path}: block 0 (bytes 0 to 65,536) is not what was written; restore"
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_whole_shards_give_the_same_batches_in_loader_processes(
    tiny_blend: Path, tmp_path: Path, context: ParallelContext, loader_workers: int
) -> None:
    expected = tokens_of_run(tiny_blend, tmp_path / "expected", context, 0)
    assert torch.equal(tokens_of_run(tiny_blend, tmp_path / "run", context, loader_workers), expected)


def test_without_the_check_the_run_trains_on_it(
    damaged: Path, tiny_blend: Path, tmp_path: Path, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault twin: through Megatron's own classes one token is another, and nothing says so."""
    whole = tokens_of_run(tiny_blend, tmp_path / "whole", context, 0)
    monkeypatch.setattr(pretrain.data, "CheckedSamples", GPTDataset)
    assert torch.equal(tokens_of_run(tiny_blend, tmp_path / "plain", context, 0), whole)
    assert (tokens_of_run(damaged, tmp_path / "damaged", context, 0) != whole).sum() == 1


def test_a_damaged_index_ends_the_start(damaged: Path, tmp_path: Path, context: ParallelContext) -> None:
    path = damaged / "train/shard_00000.idx"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputDataError, match=r"shard_00000\.idx: was changed after it was written"):
        tokens_of_run(damaged, tmp_path / "run", context, 0)
