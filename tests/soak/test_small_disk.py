"""The small disk is full when it is meant to be."""

import errno
from pathlib import Path

import pytest

from soak.small_disk import can_mount, fill, make_room, small_disk


def test_disk_is_full_until_room_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    if not can_mount(folder):
        pytest.skip("mounting a file system is not allowed here")
    with small_disk(folder):
        fill(folder)
        with pytest.raises(OSError) as caught:
            (folder / "file").write_bytes(b"x")
        assert caught.value.errno == errno.ENOSPC
        make_room(folder)
        (folder / "file").write_bytes(b"x")
    assert list(folder.iterdir()) == []
