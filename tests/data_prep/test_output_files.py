"""Files and folders are whole or not there."""

from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.output_files import new_folder, read_json_object, write_json_whole


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
