"""Files and folders are whole or not there."""

import multiprocessing
from pathlib import Path

import pytest
import xxhash

from data_prep.errors import IntegrityError, UserError
from data_prep.output_files import (
    file_checksum,
    new_folder,
    read_json_object,
    read_sealed_json,
    write_json_whole,
    write_sealed_json,
    write_shared_json,
)


def test_json_round_trip_leaves_no_partial_file(tmp_path: Path) -> None:
    write_json_whole(tmp_path / "a.json", {"key": [1, "two"]})
    assert read_json_object(tmp_path / "a.json", "make it again") == {"key": [1, "two"]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_bad_json_names_file_and_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json.*make it again"):
        read_json_object(tmp_path / "a.json", "make it again")


def fail_halfway(target: Path, overwrite: bool) -> None:
    with new_folder(target, overwrite=overwrite, is_ours=lambda path: True) as folder:
        (folder / "half").touch()
        raise RuntimeError


def test_failure_leaves_no_folder_and_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError):
        fail_halfway(target, overwrite=False)
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError):
        fail_halfway(target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["old"]


def test_sealed_json_notices_every_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed_json(path, {"key": [1, "two"], "\u4e16": None})
    assert read_sealed_json(path, "make it again") == {"key": [1, "two"], "\u4e16": None}
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.json.*make it again"):
            read_sealed_json(path, "make it again")
    write_json_whole(path, {"key": 1})
    with pytest.raises(IntegrityError, match="carries no checksum"):
        read_sealed_json(path, "make it again")


def test_several_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content: dict[str, object] = {"names": [str(number) for number in range(20_000)]}

    def write() -> None:
        for _ in range(5):
            path.unlink(missing_ok=True)
            write_shared_json(path, content)

    processes = [multiprocessing.get_context("fork").Process(target=write) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert read_sealed_json(path, "make it again") == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_checksum_of_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    (tmp_path / "a").write_bytes(data)
    assert file_checksum(tmp_path / "a") == xxhash.xxh3_128_hexdigest(data)
