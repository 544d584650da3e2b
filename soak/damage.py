"""Damage to files, as disks and people do it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soak.faults import Fault


def damage_checkpoint(checkpoint: Path, fault: Fault) -> str:
    """Do to one file of `checkpoint` what `fault` says; what was done, in words.

    Args:
        checkpoint: the folder of a complete checkpoint.
        fault: a `flip_bit`, `truncate_file` or `delete_file`.
    """
    pattern = "*/*.distcp" if fault.name == "truncate_file" else fault.variant
    files = sorted(path for path in checkpoint.glob(pattern) if path.stat().st_size > 0)
    file = files[int(fault.place * len(files))]
    if fault.name == "delete_file":
        file.unlink()
        what = "deleted"
    elif fault.name == "truncate_file":
        size = file.stat().st_size
        new_size = {"to nothing": 0, "to half": size // 2, "by one byte": size - 1}[fault.variant]
        os.truncate(file, new_size)
        what = f"truncated from {size} to {new_size} bytes"
    else:
        what = f"bit flipped in {flip_bit(file, fault.place)}"
    return f"{file.relative_to(checkpoint.parent)}: {what}"


def flip_bit(file: Path, place: float) -> str:
    """Flip the bit at `place` (0 to 1) of the file; where that is, in words."""
    bit = int(place * file.stat().st_size * 8)
    with file.open("r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))
    return f"byte {bit // 8}, bit {bit % 8}"


@contextmanager
def corrupt_file(file: Path, place: float) -> Iterator[str]:
    """Flip a bit of `file` for as long as the block lasts; yields where."""
    whole = file.with_name(file.name + ".whole")
    shutil.copy2(file, whole)
    try:
        yield f"{file.name}: bit flipped in {flip_bit(file, place)}"
    finally:
        whole.replace(file)
