"""The header of a .safetensors file: read and checked to the byte, and made.

A file is 8 bytes (length of the header, little-endian), a JSON header that names type, shape and place of every
tensor, padded with spaces, and the tensors' bytes, one after another without a gap.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint_tools.formats.tensor_reader import TensorFacts
from data_prep.errors import UserError

METADATA_KEY = "__metadata__"
LENGTH_BYTES = 8  # of the header's length; headers are padded to a multiple of it
MAX_HEADER_BYTES = 100_000_000  # the library's own limit

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies."""

    path: Path
    """Its shard."""
    offset: int
    """Its first byte there, counted from the start of the file."""
    facts: TensorFacts
    """Shape and type."""


def damaged_file(path: Path, what: str) -> UserError:
    """The error for a file that is not what was once written."""
    return UserError(f"{path}: {what}; the file is damaged: download or write it again")


def read_header(path: Path) -> dict[str, TensorPlace]:
    """What one file holds, in the order of its data.

    Raises:
        UserError: the file is cut, too long, or not in its format; or a tensor is of an unknown type.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(LENGTH_BYTES)
        if start == b"version ":
            raise UserError(
                f"{path}: is a Git LFS pointer instead of the weights; run `git lfs pull` in its folder"
            )
        header_bytes = int.from_bytes(start, "little")
        if header_bytes > min(size_bytes - LENGTH_BYTES, MAX_HEADER_BYTES):
            raise damaged_file(
                path, f"is cut, or is no safetensors file: {size_bytes:,} bytes do not hold a header"
            )
        header = _parse_header(path, stream.read(header_bytes))
    data_start = LENGTH_BYTES + header_bytes
    places = [(name, _place(path, name, entry, data_start)) for name, entry in header.items()]
    places.sort(key=lambda item: (item[1].offset, item[1].facts.bytes))
    end = data_start
    for name, place in places:
        if place.offset != end:
            kind = "a hole before it" if place.offset > end else "an overlap with the tensor before it"
            raise damaged_file(path, f"its header gives {name} {kind}")
        end += place.facts.bytes
    if end != size_bytes:
        raise damaged_file(path, f"has {size_bytes:,} bytes, but its header says {end:,}")
    return dict(places)


def _parse_header(path: Path, text: bytes) -> dict[str, object]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(content := dict(pairs)) != len(pairs):
            raise ValueError("a name stands there twice")
        return content

    try:
        header = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise damaged_file(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged_file(path, "its header is not a JSON object")
    header.pop(METADATA_KEY, None)
    return header


def _place(path: Path, name: str, entry: object, data_start: int) -> TensorPlace:
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            pass
        case _:
            raise damaged_file(path, f"its header does not give {name} a type, a shape and two offsets")
    if code not in DTYPES:
        raise UserError(f"{path}: {name} is of type {code}, unknown here; known are {', '.join(DTYPES)}")
    facts = TensorFacts(tuple(shape), DTYPES[code])
    if facts.bytes != end - begin:
        raise damaged_file(
            path,
            f"its header gives {name} {end - begin:,} bytes, but {code} {list(shape)} takes {facts.bytes:,}",
        )
    return TensorPlace(path, data_start + begin, facts)


def header_of(tensors: Mapping[str, TensorFacts], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file before its data: length, and JSON padded with spaces to a multiple of 8 bytes.

    Raises:
        UserError: a tensor has a name or a type that the format does not have.
    """
    header: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    end = 0
    for name, facts in tensors.items():
        if name == METADATA_KEY or facts.dtype not in DTYPE_CODES:
            raise UserError(f"{name} ({facts.dtype}): safetensors have no such name or type")
        begin, end = end, end + facts.bytes
        header[name] = {
            "dtype": DTYPE_CODES[facts.dtype],
            "shape": list(facts.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
