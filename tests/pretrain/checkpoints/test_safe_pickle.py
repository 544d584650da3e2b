"""A checkpoint from elsewhere runs no code: wherever its pickles lie, what is foreign in them is refused unrun."""

import io
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from checkpoint_tools.formats.megatron_files import entry_facts, model_entries, write_weights
from checkpoint_tools.formats.tensor_reader import TensorFacts
from data_prep.errors import UserError
from pretrain.checkpoints import checkpointing
from pretrain.checkpoints.safe_pickle import COMMON_FILE, METADATA_FILE, read_metadata, refuse_foreign_code
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext
from tests.pretrain.make_folder import MakeFolder
from tests.pretrain.tiny_runs import tiny_recipe

SCALES_KEY, SCALES_FILE = "base.linear._extra_state/shard_0_1", "__0_1.distcp"
RECIPES = "transformer_engine.common.recipe"


class Zeros:
    """A `TensorReader` of nothing else."""

    def __init__(self, facts: dict[str, TensorFacts]) -> None:
        self.facts = facts

    def read(self, name: str) -> torch.Tensor:
        return torch.zeros(self.facts[name].shape, dtype=self.facts[name].dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights/ folder of a tiny base."""
    folder = tmp_path_factory.mktemp("saved") / "weights"
    folder.mkdir()
    entries = model_entries(tiny_recipe("base", folder, folder), ("base",))
    write_weights(folder, entries, Zeros(entry_facts(entries)), "write")
    edit_metadata(folder, add_scales)
    (folder / SCALES_FILE).write_bytes(saved_object(torch.empty(0, dtype=torch.uint8)))
    return folder


@pytest.fixture(scope="module")
def base(saved: Path, context: ParallelContext) -> ColaModel:
    """A tiny base, into which checkpoints are loaded; in process groups that come after those of `saved`."""
    return ColaModel(tiny_recipe("base", saved, saved), context.groups, ("base",))


@pytest.fixture
def weights(saved: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "weights"))


def edit_metadata(folder: Path, edit: Callable[[Metadata], object]) -> None:
    """Let `edit` change .metadata."""
    described = pickle.loads((folder / METADATA_FILE).read_bytes())
    edit(described)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(described))


def add_scales(described: Metadata) -> None:
    """An object between the tensors, as Megatron stores Transformer Engine's scales."""
    described.state_dict_metadata[SCALES_KEY] = BytesStorageMetadata()
    described.storage_data[MetadataIndex(SCALES_KEY)] = _StorageInfo(SCALES_FILE, 0, 1 << 20)


def saved_object(value: object) -> bytes:
    """What Megatron stores of an object of one rank."""
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream.getvalue()


def bytes_tensor(data: bytes) -> torch.Tensor:
    """Transformer Engine gives its state to a checkpoint so."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def in_metadata(weights: Path, foreign: MakeFolder) -> None:
    edit_metadata(weights, lambda described: setattr(described, "planner_data", foreign))


def in_common_file(weights: Path, foreign: MakeFolder) -> None:
    torch.save({"foreign": foreign}, weights / COMMON_FILE)


def in_object(weights: Path, foreign: MakeFolder) -> None:
    (weights / SCALES_FILE).write_bytes(saved_object(foreign))


def in_scales(weights: Path, foreign: MakeFolder) -> None:
    (weights / SCALES_FILE).write_bytes(saved_object(bytes_tensor(pickle.dumps(foreign))))


PLACES = {
    in_metadata: METADATA_FILE,
    in_common_file: COMMON_FILE,
    in_object: SCALES_FILE,
    in_scales: SCALES_FILE,
}


def load(base: ColaModel, weights: Path) -> dict[str, Any]:
    """As the trainer does, with the scales of one layer; what Transformer Engine would do with them too."""
    scales = ShardedObject(SCALES_KEY.split("/")[0], None, (1,), (0,))
    requested = {**checkpointing.sharded_weights(base, ("base",)), "scales": scales}
    loaded = checkpointing._load(requested, weights)
    if torch.is_tensor(loaded["scales"]) and loaded["scales"].numel():
        pickle.loads(loaded["scales"].numpy().tobytes())
    return loaded


def test_a_checkpoint_of_ours_is_loaded(base: ColaModel, weights: Path) -> None:
    assert set(load(base, weights)) > {"scales"}
    assert SCALES_KEY in read_metadata(weights).state_dict_metadata


@pytest.mark.parametrize("place", PLACES)
def test_foreign_code_is_refused_unrun(
    base: ColaModel, weights: Path, tmp_path: Path, place: Callable[..., None]
) -> None:
    place(weights, MakeFolder(tmp_path / "canary"))
    with pytest.raises(UserError, match=rf"{PLACES[place]}: would have os.makedirs called"):
        load(base, weights)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("place", PLACES)
def test_unchecked_it_would_run(
    base: ColaModel,
    weights: Path,
    tmp_path: Path,
    place: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault twin: the same checkpoints without the check; and torch told, as some do, to trust all files."""
    monkeypatch.setattr(checkpointing, "refuse_foreign_code", lambda folder: None)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    place(weights, MakeFolder(tmp_path / "canary"))
    load(base, weights)
    assert (tmp_path / "canary").is_dir()


def test_scales_are_known_without_transformer_engine(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe is the one class in them; the twin has another class of the same module."""
    recipes: Any = ModuleType(RECIPES)
    for name in ("DelayedScaling", "Recipe"):
        setattr(recipes, name, type(name, (), {"__module__": RECIPES}))
    parents = ("transformer_engine", "transformer_engine.common")
    for module in (*map(ModuleType, parents), recipes):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    state = {
        "scale_fwd": torch.ones(3),
        "recipe": recipes.DelayedScaling(),
        "extra_fp8_variables": {"a": (1,)},
    }
    good, bad = pickle.dumps(state), pickle.dumps(state | {"recipe": recipes.Recipe()})
    monkeypatch.undo()
    (weights / SCALES_FILE).write_bytes(saved_object(bytes_tensor(good)))
    refuse_foreign_code(weights)
    (weights / SCALES_FILE).write_bytes(saved_object(bytes_tensor(bad)))
    with pytest.raises(UserError, match=rf"would have {RECIPES}.Recipe called"):
        refuse_foreign_code(weights)


@pytest.mark.parametrize("name", ["../elsewhere.distcp", "/etc/passwd", "..", "sub/../../x", ""])
def test_files_of_other_folders_are_refused(weights: Path, name: str) -> None:
    def lead_away(described: Metadata) -> None:
        next(iter(described.storage_data.values())).relative_path = name

    edit_metadata(weights, lead_away)
    with pytest.raises(UserError, match=r"\.metadata: .* is no path inside the folder"):
        read_metadata(weights)


def test_what_hides_bytes_from_the_check_is_refused(weights: Path) -> None:
    """Transformed entries would be other bytes to torch than to the check."""

    def transform(described: Metadata) -> None:
        described.storage_data[MetadataIndex(SCALES_KEY)].transform_descriptors = ["stream.zstd"]

    edit_metadata(weights, transform)
    with pytest.raises(UserError, match=r"\.metadata: cannot be read"):
        read_metadata(weights)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"not": "Metadata"}), b"\x80\x04."])
def test_damaged_metadata_is_one_line(weights: Path, content: bytes) -> None:
    (weights / METADATA_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata: cannot be read .*; use another checkpoint"):
        read_metadata(weights)


def test_a_folder_without_metadata_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Megatron checkpoint there"):
        read_metadata(tmp_path)
