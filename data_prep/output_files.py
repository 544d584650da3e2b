"""Output that is either whole or not there: files and folders are written under another name, then renamed.

A temporary name ends in `.partial` and lies in the final folder, so that the rename never crosses file
systems.
"""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import xxhash

from data_prep.errors import IntegrityError, UserError

PARTIAL_SUFFIX = ".partial"
CHECKSUM_FIELD = "file_xxh3_128"
NO_CHECKSUM = "0" * 32  # stands in the checksum's place while it is computed
HASH_READ_BYTES = 1 << 22


def partial_path(path: Path) -> Path:
    """The temporary name of a file or folder that is being written."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def publish_file(path: Path) -> None:
    """Give a finished `<path>.partial` its final name, after its bytes have reached the disk."""
    _publish(partial_path(path), path)


def _publish(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_text_whole(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees all of it or none."""
    _write_whole(path, text, partial_path(path))


def _write_whole(path: Path, text: str, temporary: Path) -> None:
    try:
        temporary.write_text(text, encoding="utf-8")
        _publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # what a full disk left of it
        raise


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, all of it or none: what a full disk took of it is taken away again."""
    rest = memoryview(f"{line}\n".encode())
    with path.open("ab", buffering=0) as stream:
        end = os.fstat(stream.fileno()).st_size
        try:
            while rest:
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(end)
            raise


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


def write_sealed_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON object that carries the checksum of its own bytes, whole or not at all."""
    write_text_whole(path, _sealed_text(content))


def write_shared_json(path: Path, content: dict[str, object]) -> None:
    """Like `write_sealed_json`, for a file that several processes write at once, all with the same content."""
    text = _sealed_text(content)
    with contextlib.suppress(FileNotFoundError):  # there is none, or another process takes it away
        if path.read_bytes() == text.encode():
            return
    own = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        _write_whole(path, text, own)
    except FileNotFoundError:
        if not path.is_file():  # else another process has just written the same, and tidied up
            raise


def _sealed_text(content: dict[str, object]) -> str:
    text = json.dumps({**content, CHECKSUM_FIELD: NO_CHECKSUM}, indent=2, ensure_ascii=False) + "\n"
    return text.replace(NO_CHECKSUM, _text_checksum(text))


def read_sealed_json(path: Path, remedy: str) -> dict[str, object]:
    """Read what `write_sealed_json` wrote, without the checksum.

    Raises:
        UserError: the file cannot be read, or is no JSON object.
        IntegrityError: a byte of it is not what was written.
    """
    content = read_json_object(path, remedy)
    checksum = content.pop(CHECKSUM_FIELD, None)
    if checksum is None:
        raise IntegrityError(
            f"{path}: carries no checksum, so another version wrote it, or it was changed; {remedy}"
        )
    text = path.read_bytes().decode()  # read_text would take a damaged end of line for a whole one
    if not isinstance(checksum, str) or _text_checksum(text.replace(checksum, NO_CHECKSUM)) != checksum:
        raise IntegrityError(f"{path}: was changed after it was written; {remedy}")
    return content


def _text_checksum(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


class Digest(Protocol):
    """A checksum in the making."""

    def update(self, data: memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The checksum of all so far."""


def file_checksum(
    path: Path, digest: Digest | None = None, report: Callable[[int], object] = lambda count: None
) -> str:
    """Checksum of a file's bytes.

    Args:
        path: the file.
        digest: of what kind; None: xxh3, 128 bits (at the speed of memory; finds damage, not malice).
        report: is told how many bytes were read, each time.
    """
    digest = digest or xxhash.xxh3_128()
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(HASH_READ_BYTES)
        view = memoryview(buffer)
        while count := stream.readinto(buffer):
            digest.update(view[:count])
            report(count)
    return digest.hexdigest()


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
