"""A small file system in memory, for checkpoints to find it full."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_MIB = 64
FILLER_FILE = "filler"
CHUNK_BYTES = 1 << 16


def can_mount(folder: Path) -> bool:
    """Whether this process may mount file systems (root may, in most places); tried out in `folder`."""
    if os.geteuid() != 0:
        return False
    try:
        with small_disk(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of `DISK_MIB` at `folder` while the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "soak", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        # Lazily: a process that is about to end may still have a file open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def fill(folder: Path) -> None:
    """Take all room that is left."""
    with (folder / FILLER_FILE).open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(CHUNK_BYTES))


def make_room(folder: Path) -> None:
    """Give it back."""
    (folder / FILLER_FILE).unlink(missing_ok=True)
