"""A folder's list of checksums, one for every file in it: `xxhsum --check XXH128SUMS` reads it too.

xxh3 runs at the speed of memory; it finds damage, not malice.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from data_prep.errors import UserError
from data_prep.folder_paths import inside_folder
from data_prep.output_files import file_checksum, write_text_whole

CHECKSUM_LIST = "XXH128SUMS"
LIST_LINE = re.compile(r"(?P<sum>[0-9a-f]{32,64}) [ *](?P<name>.+)")


def write_checksum_list(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the list; `sums` has the checksum of each file by its path under `folder`."""
    lines = [f"{checksum}  {name}\n" for name, checksum in sums.items()]
    write_text_whole(folder / CHECKSUM_LIST, "".join(lines))


def parse_checksums(
    path: Path, lines: Iterable[str], digits: int, remedy: str = ""
) -> Iterator[tuple[str, str]]:
    """Name and checksum in each of the `lines` of the list at `path`, whatever folder the names lead to.

    Raises:
        UserError: a line is not `digits` hex digits and a name; the message ends with `remedy`.
    """
    for number, line in enumerate(lines, 1):
        match = LIST_LINE.fullmatch(line)
        if not match or len(match["sum"]) != digits:
            raise UserError(f"{path}: line {number} is not {digits} hex digits and a file name{remedy}")
        yield match["name"], match["sum"]


def read_checksum_list(path: Path) -> dict[str, str]:
    """Checksums by file name, as our list at `path` has them.

    Raises:
        UserError: a line is not a checksum and a name, or the name leads out of the folder.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    sums = dict(parse_checksums(path, lines, digits=32))
    for name in sums:
        try:
            inside_folder(name)
        except ValueError:
            raise UserError(f"{path}: names {name!r}, which is not in the folder") from None
    return sums


def list_whole_folder(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write the list of all files that are in `folder` now; reads those whole whose checksum is not `known`."""
    sums = {name: known.get(name) or file_checksum(folder / name) for name in files_of(folder)}
    write_checksum_list(folder, sums)


def files_of(folder: Path) -> list[str]:
    """Paths under `folder` of the files that its list must name: all but the list itself."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in paths if name != CHECKSUM_LIST)


def find_damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with the files of `folder`, by its list; None if nothing is.

    Processes that split the work each pass their `share` of `shares`, and read every so many-th file.
    """
    try:
        listed = read_checksum_list(folder / CHECKSUM_LIST)
    except FileNotFoundError:
        return f"has no {CHECKSUM_LIST}"
    except UserError as error:
        return str(error)
    present = files_of(folder)
    for name in sorted(listed.keys() - set(present)):
        return f"{name} is missing"
    for name in sorted(set(present) - listed.keys()):
        return f"{name} is not in {CHECKSUM_LIST}"
    for name in present[share::shares]:
        try:
            if file_checksum(folder / name) != listed[name]:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
