"""Which files belong to a source, their splits and names, and what is refused."""

from pathlib import Path

import pytest

from data_prep.corpus_sources import find_files, has_own_validation, source_format
from data_prep.errors import UserError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_splits_and_unit_names_and_test_left_out(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(
            f"{part}/a.jsonl.zst"
            for part in ("train/chunk1", "train/chunk2", "validation/chunk1", "test/chunk1")
        ),
    )
    files = find_files("slimpajama", tmp_path)
    assert [(file.split, file.unit) for file in files] == [
        ("train", "chunk1__a"), ("train", "chunk2__a"), ("validation", "chunk1__a")
    ]  # fmt: skip
    assert has_own_validation(files)
    assert not has_own_validation(files[:2])


@pytest.mark.parametrize(
    ("source", "units"),
    [
        ("slimpajama", ["c"]),
        ("starcoder", ["d__e"]),
        ("wudao", ["d__e", "part-0"]),
        ("mine", ["a", "b", "c", "d__e"]),
    ],
)
def test_each_source_takes_its_own_endings(tmp_path: Path, source: str, units: list[str]) -> None:
    touch(
        tmp_path,
        "a.jsonl",
        "b.jsonl.gz",
        "c.jsonl.zst",
        "d/e.parquet",
        "part-0.json",
        "other.json",
        "README.md",
    )
    assert [file.unit for file in find_files(source, tmp_path)] == units


def test_the_text_field_can_be_named() -> None:
    assert source_format("wudao", None).text_field == "content"
    assert source_format("mine", None).text_field == "text"
    assert source_format("mine", "body").text_field == "body"
    assert source_format("slimpajama", "body").dropped_sets == {"RedPajamaGithub"}


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--input .*nowhere is not a folder"):
        find_files("wudao", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no \*\.parquet or part-\*\.json file"):
        find_files("wudao", tmp_path)
    touch(tmp_path, "train/a.jsonl.zst", "a.jsonl.zst", "train/b/a.jsonl.zst", "train/b__a.jsonl.zst")
    with pytest.raises(UserError, match="share the name b__a"):
        find_files("slimpajama", tmp_path)
    touch(tmp_path / "own", "a.jsonl", "a.parquet")
    with pytest.raises(UserError, match="share the name a;"):
        find_files("mine", tmp_path / "own")
