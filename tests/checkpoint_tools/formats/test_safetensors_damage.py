"""Every fault of a folder of safetensors is refused with its line, or found by the checksums.

Folders that only look odd are read: an index that disagrees with the shards, files of another family.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from checkpoint_tools.formats.safetensors_files import INDEX_NAME, open_safetensors
from data_prep.checksum_list import CHECKSUM_LIST
from data_prep.errors import IntegrityError, UserError
from tests.checkpoint_tools.formats.safetensors_folders import bits, read_all, write


@pytest.fixture(scope="module")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors a to f, two in each of three shards."""
    tensors = {name: torch.full((2, 3), ord(name), dtype=torch.float32) for name in "abcdef"}
    return write(tmp_path_factory.mktemp("written") / "model", tensors, shard_bytes=48)


@pytest.fixture
def three_shards(written_once: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(written_once, tmp_path / "model"))


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(UserError) as caught:
        open_safetensors(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    """Change the index' map from tensors to shards."""
    index = json.loads((folder / INDEX_NAME).read_text())
    edit(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_read_gives_the_caller_its_own(three_shards: Path) -> None:
    source = open_safetensors(three_shards)
    source.read("a").zero_()
    assert source.read("a").unique().item() == ord("a")
    with pytest.raises(KeyError):
        source.read("z")


def test_a_file_cut_after_it_was_opened(three_shards: Path) -> None:
    source = open_safetensors(three_shards)
    os.truncate(three_shards / "model-00001-of-00003.safetensors", 100)
    with pytest.raises(UserError, match=r"model-00001-of-00003.safetensors: ends within a"):
        source.read("a")


def test_missing_shards_are_counted(three_shards: Path) -> None:
    (three_shards / "model-00002-of-00003.safetensors").unlink()
    (three_shards / "model-00003-of-00003.safetensors").unlink()
    expected = "model-00002-of-00003.safetensors: is missing (one of 2 missing shards of 3); download"
    assert expected in refusal(three_shards)
    (three_shards / INDEX_NAME).unlink()
    assert expected in refusal(three_shards)
    (three_shards / "model-00001-of-00003.safetensors").rename(three_shards / "model.safetensors")
    assert set(open_safetensors(three_shards).facts) == {"a", "b"}


def test_a_dangling_link_is_a_missing_shard(three_shards: Path) -> None:
    shard = three_shards / "model-00003-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to(three_shards / "nowhere")
    assert "is missing" in refusal(three_shards)


def name_ten_for_184(weight_map: dict[str, str]) -> None:
    for name in weight_map:
        weight_map[name] = f"model-0000{ord(name) % 2 + 1}-of-00010.safetensors"


def name_another_shard(weight_map: dict[str, str]) -> None:
    weight_map["a"] = weight_map["f"]


def forget_a_shard(weight_map: dict[str, str]) -> None:
    del weight_map["e"], weight_map["f"]


@pytest.mark.parametrize("edit", [name_ten_for_184, name_another_shard, forget_a_shard])
def test_an_index_that_disagrees_gives_way_to_the_shards(
    three_shards: Path, edit: Callable[[dict[str, str]], object]
) -> None:
    assert open_safetensors(three_shards).notices == []
    before = bits(read_all(three_shards))
    edit_index(three_shards, edit)
    source = open_safetensors(three_shards)
    assert len(source.notices) == 1
    assert "3 shards with 6 tensors that lie there; their headers are used instead" in source.notices[0]
    assert bits(read_all(three_shards)) == before


def test_an_index_that_names_a_tensor_nobody_holds(three_shards: Path) -> None:
    edit_index(three_shards, lambda weight_map: weight_map.update(z=weight_map["a"]))
    assert f"{INDEX_NAME}: names the tensor z, which no shard holds" in refusal(three_shards)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "sub/model.safetensors", ".."]
)
def test_names_never_lead_out_of_the_folder(three_shards: Path, name: str) -> None:
    edit_index(three_shards, lambda weight_map: weight_map.update(a=name))
    assert "is no plain file name" in refusal(three_shards)
    (three_shards / INDEX_NAME).unlink()
    (three_shards / CHECKSUM_LIST).write_text(f"{'0' * 32}  {name}\n")
    with pytest.raises(UserError, match="which is not in the folder"):
        open_safetensors(three_shards).check_files(progress=False)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(three_shards: Path, text: str) -> None:
    (three_shards / INDEX_NAME).write_text(text)
    assert "download it again, or remove it" in refusal(three_shards)


def test_a_tensor_in_two_shards_is_refused(three_shards: Path) -> None:
    save_file({"b": torch.zeros(1)}, three_shards / "model-00009-of-00009.safetensors")
    message = refusal(three_shards)
    assert "model-00009-of-00009.safetensors: holds b, as model-00001-of-00003.safetensors does" in message


def test_files_of_another_family_are_left_out_with_a_notice(three_shards: Path) -> None:
    save_file({"layers.0.wq": torch.zeros(1)}, three_shards / "consolidated.safetensors")
    for _ in ("with an index", "without"):
        source = open_safetensors(three_shards)
        assert set(source.facts) == set("abcdef")
        assert len(source.notices) == 1 and "consolidated.safetensors left out" in source.notices[0]
        (three_shards / INDEX_NAME).unlink(missing_ok=True)


def test_any_names_will_do_where_there_are_no_others(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert list(open_safetensors(tmp_path).facts) == ["a", "b"]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path: Path, file: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / file)
    message = refusal(tmp_path)
    assert "safetensors wanted" in message and file in message and "safe_serialization" in message


def test_no_folder_and_no_weights(tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "nowhere")
    assert "holds no *.safetensors" in refusal(tmp_path)


def test_a_flipped_bit_is_found(three_shards: Path) -> None:
    source = open_safetensors(three_shards)
    checked = source.check_files(progress=False)
    assert len(checked.files) == 4 and checked.unchecked_shards == ()
    assert checked.summary() == "files that match their checksums: 4"
    shard = three_shards / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        IntegrityError, match=r"model-00002-of-00003.safetensors: is not what its checksum says"
    ):
        source.check_files(progress=False)


def test_sums_are_those_of_xxhsum(three_shards: Path) -> None:
    """A line a file: XXH128 in hexadecimal, two spaces, the name."""
    lines = (three_shards / CHECKSUM_LIST).read_text().splitlines()
    files = sorted(path for path in three_shards.iterdir() if path.name != CHECKSUM_LIST)
    assert sorted(lines, key=lambda line: line[34:]) == [
        f"{xxhash.xxh128_hexdigest(file.read_bytes())}  {file.name}" for file in files
    ]


def test_sums_of_sha256sum_count_too(three_shards: Path) -> None:
    (three_shards / CHECKSUM_LIST).unlink()
    shard = three_shards / "model-00001-of-00003.safetensors"
    (three_shards / "SHA256SUMS").write_text(
        f"{hashlib.sha256(shard.read_bytes()).hexdigest()} *{shard.name}\n"
    )
    source = open_safetensors(three_shards)
    assert source.check_files(progress=False).files == (shard.name,)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(
        IntegrityError, match=r"model-00001-of-00003.safetensors: is not what its checksum says"
    ):
        source.check_files(progress=False)


def test_sums_that_cannot_be_used(three_shards: Path) -> None:
    source = open_safetensors(three_shards)
    sums = three_shards / CHECKSUM_LIST
    sums.write_text(sums.read_text() + f"{'0' * 32}  gone\n")
    with pytest.raises(UserError, match="gone: is named in XXH128SUMS but is missing"):
        source.check_files(progress=False)
    sums.write_text("nonsense\n")
    with pytest.raises(UserError, match="line 1 is not 32 hex digits and a file name"):
        source.check_files(progress=False)
    sums.unlink()
    assert source.check_files(progress=False).summary() == (
        "files that match their checksums: 0; shards without one to match: 3"
    )


def hub_cache(folder: Path, tensors: Sequence[str]) -> Path:
    """A model as the Hub's client keeps it: links to blobs named by their SHA-256. Returns the snapshot."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(tensors, 1):
        save_file({name: torch.ones(2)}, folder / "new")
        checksum = hashlib.sha256((folder / "new").read_bytes()).hexdigest()
        (folder / "new").rename(blobs / checksum)
        shard = snapshot / f"model-{number:05}-of-{len(tensors):05}.safetensors"
        shard.symlink_to(Path("../../blobs") / checksum)
    return snapshot


def test_the_hub_s_cache_carries_checksums(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, ["a", "b"])
    source = open_safetensors(snapshot)
    assert set(source.facts) == {"a", "b"}
    assert len(source.check_files(progress=False).files) == 2
    blob = (snapshot / "model-00002-of-00002.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    with pytest.raises(IntegrityError, match="model-00002-of-00002"):
        source.check_files(progress=False)
