"""Checkpoints written a tensor at a time: what is read back, what a full disk and a damaged file say."""

import errno
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from checkpoint_tools.formats.megatron_files import (
    DATA_FILE,
    Entries,
    _WeightsFolder,
    entry_facts,
    model_entries,
    write_weights,
)
from checkpoint_tools.formats.tensor_reader import TensorFacts
from data_prep.errors import UserError
from pretrain.checkpoints.safe_pickle import METADATA_FILE
from tests.pretrain.make_folder import MakeFolder
from tests.pretrain.tiny_runs import tiny_recipe


class Weights:
    """Random numbers, the same whenever they are read."""

    def __init__(self, entries: Entries) -> None:
        self.facts: Mapping[str, TensorFacts] = entry_facts(entries)

    def read(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(list(self.facts).index(name))
        return torch.randn(self.facts[name].shape, generator=generator).to(self.facts[name].dtype)


@pytest.fixture
def entries(tmp_path: Path) -> Entries:
    """Of a tiny base."""
    return model_entries(tiny_recipe("base", tmp_path, tmp_path), ("base",))


def test_what_is_written_is_read(entries: Entries, tmp_path: Path) -> None:
    """Fused and plain tensors alike, each with a fingerprint of its own."""
    weights = Weights(entries)
    fingerprints = write_weights(tmp_path, entries, weights, "write")
    folder = _WeightsFolder(tmp_path)
    for name, entry in entries.items():
        assert folder.facts_of(entry) == weights.facts[name]
        assert torch.equal(folder.read(entry, weights.facts[name]), weights.read(name))
    assert len(set(fingerprints.values())) == len(fingerprints) >= len(entries)


def test_a_full_disk_is_an_error_of_the_disk(entries: Entries, tmp_path: Path) -> None:
    (tmp_path / DATA_FILE).symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_weights(tmp_path, entries, Weights(entries), "write")
    assert caught.value.errno == errno.ENOSPC


def test_a_truncated_file_is_refused(entries: Entries, tmp_path: Path) -> None:
    weights = Weights(entries)
    write_weights(tmp_path, entries, weights, "write")
    data = (tmp_path / DATA_FILE).read_bytes()
    (tmp_path / DATA_FILE).write_bytes(data[: len(data) // 2])
    folder, last = _WeightsFolder(tmp_path), list(entries)[-1]
    with pytest.raises(UserError, match=r"base.output_layer.weight cannot be read"):
        folder.read(entries[last], weights.facts[last])


def test_a_folder_without_contents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Megatron checkpoint there"):
        _WeightsFolder(tmp_path)


@pytest.mark.parametrize("checked", [True, False])
def test_code_of_a_checkpoint_is_not_run(entries: Entries, tmp_path: Path, checked: bool) -> None:
    """The fault twin, torch's own reader, runs it."""
    folder, canary = tmp_path / "weights", tmp_path / "canary"
    folder.mkdir()
    write_weights(folder, entries, Weights(entries), "write")
    file = folder / METADATA_FILE
    described = pickle.loads(file.read_bytes())
    described.planner_data = MakeFolder(canary)
    file.write_bytes(pickle.dumps(described))
    if checked:
        with pytest.raises(UserError, match=r"\.metadata: would have os.makedirs called"):
            _WeightsFolder(folder)
    else:
        FileSystemReader(folder).read_metadata()
    assert canary.exists() is not checked
