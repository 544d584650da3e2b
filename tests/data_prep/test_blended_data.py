"""Opening a blend: Megatron can train on it, and one that is not whole is refused."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from data_prep.blend import BlendConfig, blend
from data_prep.blended_data import open_blend, read_blend_manifest
from data_prep.errors import IntegrityError, UserError
from data_prep.output_files import write_sealed_json
from data_prep.text_tokenizer import load_tokenizer
from tests.data_prep.token_sources import make_world


@pytest.fixture(scope="module")
def blend_config(tmp_path_factory: pytest.TempPathFactory) -> BlendConfig:
    """Four small sources in four shards."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def blend_folder(blend_config: BlendConfig) -> Path:
    """The blend, written."""
    blend(blend_config)
    return blend_config.output


@pytest.fixture
def copy(blend_folder: Path, tmp_path: Path) -> Path:
    """A blend to damage."""
    shutil.copytree(blend_folder, tmp_path / "blend")
    return tmp_path / "blend"


def test_open_blend(blend_folder: Path, blend_config: BlendConfig) -> None:
    tokenizer = load_tokenizer(blend_config.tokenizer)
    data = open_blend(blend_folder)
    assert data.train_prefixes == [str(blend_folder / f"train/shard_{number:05d}") for number in range(4)]
    assert data.validation_prefixes == {
        name: str(blend_folder / "validation" / name) for name in blend_config.weights
    }
    assert set(data.shards) == {*data.train_prefixes, *data.validation_prefixes.values()}
    assert all(prefix.endswith(f"/{shard.prefix}") for prefix, shard in data.shards.items())
    assert data.weights == pytest.approx(blend_config.weights)
    assert (data.vocab_size, data.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert data.tokenizer_fingerprint == load_tokenizer(data.tokenizer_folder).fingerprint


def test_a_relative_folder_gives_absolute_prefixes(
    blend_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(blend_folder.parent)
    assert open_blend(blend_folder.name) == open_blend(blend_folder)


def test_megatrons_gpt_dataset_reads_a_blend(blend_folder: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = open_blend(blend_folder).train_prefixes[0]
    shard = IndexedDataset(prefix)

    class Vocabulary:
        vocab_size, eod, pad = 1300, 1, -1
        unique_identifiers: ClassVar = {"name": "test"}

    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=64,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(tmp_path),
        tokenizer=Vocabulary(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = np.arange(len(shard), dtype=np.int32)
    samples = GPTDataset(shard, prefix, documents, None, Split.train, config)
    sample = samples[0]
    assert sample["tokens"].shape == (64,)
    assert (sample["tokens"][1:] == sample["labels"][:-1]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/shard_00002.bin", r"shard_00002\.bin has \d+ bytes where shard_00002\.idx counts"),
        ("train/shard_00002.idx", r"shard_00002\.idx has \d+ bytes instead of"),
        ("validation/wudao.bin", r"validation/wudao\.bin has"),
        ("train/shard_00002.xxh", r"shard_00002\.xxh has 6 bytes instead of 8"),
        ("blend.json", r"blend\.json: cannot be read"),
    ],
)
def test_a_cut_file_is_refused(copy: Path, name: str, message: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:-2])
    with pytest.raises(UserError, match=message):
        open_blend(copy)


def test_a_swapped_pair_is_refused(copy: Path) -> None:
    for ending in ("bin", "idx"):
        shutil.copyfile(copy / f"train/shard_00000.{ending}", copy / f"train/shard_00001.{ending}")
    with pytest.raises(UserError, match=r"shard_00001\.idx holds .* where blend\.json says"):
        open_blend(copy)


def test_a_changed_list_is_refused(copy: Path) -> None:
    text = (copy / "blend.json").read_text()
    (copy / "blend.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(IntegrityError, match=r"blend\.json: was changed after it was written"):
        read_blend_manifest(copy)
    (copy / "blend.json").write_text(text)
    assert read_blend_manifest(copy).seed == 0


def test_missing_parts_are_named(copy: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UserError, match="tokenizer is missing"):
        open_blend(copy)
    (copy / "validation/wudao.bin").unlink()
    with pytest.raises(UserError, match=r"wudao\.bin is missing"):
        open_blend(copy)
    (copy / "train/shard_00001.xxh").unlink()
    with pytest.raises(UserError, match=r"shard_00001\.xxh is missing"):
        open_blend(copy)
    content = json.loads((copy / "blend.json").read_text())
    (copy / "blend.json").write_text(json.dumps({**content, "format_version": 1}))
    with pytest.raises(UserError, match="format version 1, not 3; blend again with --overwrite"):
        open_blend(copy)
    write_sealed_json(copy / "blend.json", {**content, "train": {}})
    with pytest.raises(UserError, match=r"train\.shards: Field required"):
        open_blend(copy)
    (copy / "blend.json").unlink()
    with pytest.raises(UserError, match="not a finished blend"):
        open_blend(copy)
    with pytest.raises(UserError, match="not a finished blend"):
        open_blend(copy / "nowhere")
