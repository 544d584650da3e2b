"""Output that is either whole or not there: files and folders are written under another name, then renamed.

A temporary name ends in `.partial` and lies in the final folder, so that the rename never crosses file
systems.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """The temporary name of a file or folder that is being written."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def publish_file(path: Path) -> None:
    """Give a finished `<path>.partial` its final name, after its bytes have reached the disk."""
    with partial_path(path).open("rb") as stream:
        os.fsync(stream.fileno())
    partial_path(path).replace(path)


def write_text_whole(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees all of it or none."""
    partial_path(path).write_text(text, encoding="utf-8")
    publish_file(path)


def write_json_whole(path: Path, content: object) -> None:
    """Write a small JSON file so that a reader sees all of it or none."""
    write_text_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json_object(path: Path, remedy: str) -> dict[str, object]:
    """Read a JSON file of ours. Raises UserError naming the file and `remedy` when it cannot be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; {remedy}")
    return content


@contextmanager
def new_folder(path: Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well and is removed when it does not.

    Args:
        path: the final folder.
        overwrite: replace an existing folder; only one that this command wrote.
        is_ours: says whether an existing folder was written by this command.

    Raises:
        UserError: `path` exists and may not be replaced.
    """
    if path.exists():
        if not overwrite:
            raise UserError(f"--output {path} exists; choose another folder or pass --overwrite")
        if not is_ours(path):
            raise UserError(
                f"--output {path} was not written by this command, so --overwrite will not delete it"
            )
    with folder_written_whole(path) as temporary:
        yield temporary


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends well and is removed when it does not.

    Whether an existing `path` may be replaced is the caller's to check, as `new_folder` does.
    """
    temporary = partial_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    temporary.rename(path)
