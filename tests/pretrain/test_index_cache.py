"""The order of the samples: kept from start to start, worked out again when its files are damaged, never a pickle."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep.blended_data import open_blend
from data_prep.checksum_list import CHECKSUM_LIST, list_whole_folder
from data_prep.errors import StorageError
from data_prep.output_files import CHECKSUM_FIELD, write_sealed_json
from pretrain import index_cache
from pretrain.data import build_datasets
from pretrain.parallel import ParallelContext
from tests.pretrain.tiny_runs import tiny_recipe

pytestmark = pytest.mark.usefixtures("context")


def start(run_folder: Path, blend: Path) -> torch.Tensor:
    """The tokens of all samples in their order, as a start of the run gets them. [samples, tokens]"""
    samples, validation = build_datasets(tiny_recipe("base", run_folder, blend), open_blend(blend))
    return torch.stack(
        [data[index]["tokens"] for data in (samples, validation) for index in range(len(data))]
    )


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path, context: ParallelContext) -> Path:
    """The run folder of a run that was started once."""
    run = tmp_path_factory.mktemp("index_cache") / "run"
    start(run, tiny_blend)
    return run


@pytest.fixture
def run(started: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    shutil.copytree(started, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def order(started: Path, tiny_blend: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The order that a run in a new folder has."""
    return start(tmp_path_factory.mktemp("index_cache_new") / "run", tiny_blend)


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return _leave_trace, (str(self.path),)


def _leave_trace(path: str) -> None:
    Path(path).write_text("a pickle was run")


def shuffles(cache: Path) -> list[Path]:
    """The files that decide the order within the shards."""
    return sorted(cache.glob("*-shuffle_index.npy"))


def flip_a_bit(cache: Path) -> None:
    for path in shuffles(cache):
        content = bytearray(path.read_bytes())
        content[-4] ^= 1
        path.write_bytes(content)


def cut_a_file(cache: Path) -> None:
    path = shuffles(cache)[0]
    path.write_bytes(path.read_bytes()[:-5])


def kill_while_it_is_written(cache: Path) -> None:
    """What a kill in the middle of the first start leaves: a file half-written, later ones and the list missing."""
    (cache / CHECKSUM_LIST).unlink()
    paths = shuffles(cache)
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    for path in paths[1:]:
        path.unlink()


def put_a_pickle(cache: Path) -> None:
    shuffles(cache)[0].write_bytes(pickle.dumps(Evil(cache.parent / "trace")))


def put_a_pickle_and_list_it(cache: Path) -> None:
    """As a run folder from elsewhere may have it."""
    put_a_pickle(cache)
    list_whole_folder(cache)


def lose_the_list(cache: Path) -> None:
    (cache / CHECKSUM_LIST).unlink()


def spoil_the_list(cache: Path) -> None:
    (cache / CHECKSUM_LIST).write_text("../../x\n")


def add_a_file(cache: Path) -> None:
    (cache / "x.npy").write_bytes(b"x")


FAULTS = {
    fault.__name__: fault
    for fault in (
        flip_a_bit,
        cut_a_file,
        kill_while_it_is_written,
        put_a_pickle,
        put_a_pickle_and_list_it,
        lose_the_list,
        spoil_the_list,
        add_a_file,
    )
}


def test_a_second_start_takes_what_the_first_wrote(run: Path, tiny_blend: Path, order: torch.Tensor) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (run / "index_cache").iterdir()}
    assert torch.equal(start(run, tiny_blend), order)
    assert {path.name: path.stat().st_mtime_ns for path in (run / "index_cache").iterdir()} == before


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_the_order_stays(
    run: Path, tiny_blend: Path, order: torch.Tensor, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    FAULTS[fault](run / "index_cache")
    assert torch.equal(start(run, tiny_blend), order)
    assert not (run / "trace").exists()
    assert f"{run}/index_cache: " in capsys.readouterr().out
    assert index_cache.find_fault(run / "index_cache") is None


@pytest.mark.parametrize("fault", ["flip_a_bit", "put_a_pickle"])
def test_without_the_check_it_does_harm(
    run: Path, tiny_blend: Path, order: torch.Tensor, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault twin: the order is another, or the pickle is run."""
    monkeypatch.setattr(index_cache, "find_fault", lambda folder: None)
    FAULTS[fault](run / "index_cache")
    if fault == "flip_a_bit":
        assert not torch.equal(start(run, tiny_blend), order)
    else:
        with pytest.raises(AttributeError):
            start(run, tiny_blend)
        assert (run / "trace").exists()


def test_other_settings_add_files_and_list_them(run: Path, tiny_blend: Path) -> None:
    before = len(list((run / "index_cache").iterdir()))
    recipe = tiny_recipe("base", run, tiny_blend, validation={"steps": 2})
    build_datasets(recipe, open_blend(tiny_blend))
    assert len(list((run / "index_cache").iterdir())) > before
    assert index_cache.find_fault(run / "index_cache") is None


def test_other_shards_in_the_same_place_have_an_order_of_their_own(
    run: Path, tiny_blend: Path, tmp_path: Path
) -> None:
    """Before there is a checkpoint nothing else keeps a run from going on with another blend."""
    blend = tmp_path / "blend"
    shutil.copytree(tiny_blend, blend)
    start(run, blend)
    before = set((run / "index_cache").glob("*.npy"))
    content = json.loads((blend / "blend.json").read_text())
    del content[CHECKSUM_FIELD]
    write_sealed_json(blend / "blend.json", content | {"plan_fingerprint": "0" * 64})
    start(run, blend)
    assert len(set((run / "index_cache").glob("*.npy")) - before) > 0


def test_a_folder_that_takes_no_files(tiny_blend: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match=r"run/index_cache: cannot be written \(.*Not a directory"):
        start(tmp_path / "run", tiny_blend)
