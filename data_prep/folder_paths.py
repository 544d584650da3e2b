"""Paths that a list or manifest names: they stay in its folder, whoever wrote it."""

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator


def inside_folder(path: str) -> str:
    """Return a relative path as it is. Raises ValueError when it leads out of the folder that it is relative to."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0].startswith("/") or ".." in parts or "\0" in path:
        raise ValueError(f"{path!r} is no path inside the folder")
    return path


PathInFolder = Annotated[str, AfterValidator(inside_folder)]
