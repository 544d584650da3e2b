"""Headers: made as the library makes them, read back as they were, and refused when a byte of them cannot be right."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_tools.formats.safetensors_header import header_of, read_header
from checkpoint_tools.formats.tensor_reader import TensorFacts
from data_prep.errors import UserError
from tests.checkpoint_tools.formats.safetensors_folders import FACTS, NAMES

TWO = {"a": TensorFacts((2, 3), torch.float32), "b": TensorFacts((4,), torch.bfloat16)}


def write_file(folder: Path, header: object, data_bytes: int = 32) -> Path:
    """A file with any header: an object that becomes JSON, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


def header_with(**changes: object) -> dict[str, object]:
    """The right header of 32 bytes of data, with changes to its second tensor."""
    first = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    second = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
    return {"__metadata__": {"format": "pt"}, "a": first, "b": second | changes}


def refusal(path: Path) -> str:
    """The one line with which a file is refused; it names the file."""
    with pytest.raises(UserError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@given(st.dictionaries(NAMES, FACTS), st.dictionaries(st.text(), st.text()))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, TensorFacts], metadata: dict[str, str]
) -> None:
    header = header_of(tensors, metadata)
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    path.write_bytes(header + bytes(sum(facts.bytes for facts in tensors.values())))
    assert len(header) % 8 == 0
    places = read_header(path)
    assert {name: place.facts for name, place in places.items()} == tensors
    ends = [place.offset + place.facts.bytes for place in places.values()]
    assert [place.offset for place in places.values()] == [len(header), *ends][: len(ends)]


def test_the_unharmed_twin_of_the_damaged_files(tmp_path: Path) -> None:
    places = read_header(write_file(tmp_path, header_with()))
    assert {name: place.facts for name, place in places.items()} == TWO


def test_order_is_that_of_the_data(tmp_path: Path) -> None:
    header = header_with()
    assert list(read_header(write_file(tmp_path, dict(reversed(header.items()))))) == ["a", "b"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (header_with(data_offsets=[25, 33]), "gives b a hole before it"),
        (header_with(data_offsets=[20, 28]), "gives b an overlap with the tensor before it"),
        (header_with(shape=[5]), r"gives b 8 bytes, but BF16 \[5\] takes 10"),
        (header_with(dtype="F4"), "b is of type F4, unknown here"),
        (header_with(shape=[-4]), "does not give b a type, a shape and two offsets"),
        (header_with(shape=[4.0]), "does not give b a type, a shape and two offsets"),
        (header_with(shape=[True, 4]), "does not give b a type, a shape and two offsets"),
        (header_with(data_offsets=[24]), "does not give b a type, a shape and two offsets"),
        (header_with() | {"b": None}, "does not give b a type, a shape and two offsets"),
        (["a"], "is not a JSON object"),
        (b'{"a": ', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": 1, "a": 2}', "a name stands there twice"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_header(path := write_file(tmp_path, header))
    assert refusal(path)


@pytest.mark.parametrize("kept_bytes", [0, 7, 8, 40, -1])
def test_a_cut_file_is_refused(tmp_path: Path, kept_bytes: int) -> None:
    path = write_file(tmp_path, header_with())
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert "damaged: download" in refusal(path)


def test_a_file_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path, header_with(), data_bytes=33)
    size = path.stat().st_size
    assert f"has {size:,} bytes, but its header says {size - 1:,}" in refusal(path)


def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(path)


@pytest.mark.parametrize(("name", "dtype"), [("__metadata__", torch.float32), ("a", torch.complex128)])
def test_a_name_or_type_that_the_format_lacks_is_not_written(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match="safetensors have no such name or type"):
        header_of({name: TensorFacts((1,), dtype)}, {})
