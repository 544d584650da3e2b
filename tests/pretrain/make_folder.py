"""An object whose pickle runs code."""

import os
from collections.abc import Callable
from pathlib import Path


class MakeFolder:
    """Is pickled as a call that makes a folder: the sign that code of a checkpoint was run."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str, int, bool]]:
        return os.makedirs, (str(self.canary), 0o777, True)
