"""Readers take the published formats, count what they drop, and name the file and row that is wrong."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.corpus_readers import BATCH_TEXT_CHARACTERS, find_files, has_own_validation, read_batches
from data_prep.errors import UserError

GOOD_ROW = {"text": "good", "meta": {"redpajama_set_name": "RedPajamaC4"}}


def write_zst(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress("".join(line + "\n" for line in lines).encode()))
    return path


def slim_row(text: object, set_name: str = "RedPajamaC4") -> str:
    return json.dumps({"text": text, "meta": {"redpajama_set_name": set_name}})


def read_all(source: str, path: Path) -> tuple[list[str], Counter[str]]:
    texts: list[str] = []
    dropped: Counter[str] = Counter()
    for batch in read_batches(source, path):
        texts += batch.texts
        dropped += batch.dropped
    return texts, dropped


def test_slimpajama_drops_github_empty_and_broken_unicode(tmp_path: Path) -> None:
    rows = [
        slim_row("one"),
        slim_row("code", "RedPajamaGithub"),
        slim_row(""),
        slim_row("\ud800"),
        "",
        slim_row("two"),
    ]
    path = write_zst(tmp_path / "a.jsonl.zst", rows)
    assert read_all("slimpajama", path) == (
        ["one", "two"],
        Counter(RedPajamaGithub=1, empty=1, invalid_unicode=1),
    )


def test_proof_pile_needs_no_set_name_and_keeps_every_row(tmp_path: Path) -> None:
    path = write_zst(
        tmp_path / "a.jsonl.zst", [json.dumps({"text": "x", "meta": {}}), slim_row("y", "RedPajamaGithub")]
    )
    assert read_all("proof_pile_2", path) == (["x", "y"], Counter())


def test_parquet_null_and_empty_are_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"title": ["t"] * 3, "content": ["x", None, ""]}), tmp_path / "a.parquet")
    assert read_all("wudao", tmp_path / "a.parquet") == (["x"], Counter(empty=2))


def test_long_files_come_in_batches_with_progress(tmp_path: Path) -> None:
    path = write_zst(tmp_path / "a.jsonl.zst", [slim_row("x" * (BATCH_TEXT_CHARACTERS // 4))] * 10)
    batches = list(read_batches("slimpajama", path))
    assert [len(batch.texts) for batch in batches] == [4, 4, 2]
    progress = [batch.progress for batch in batches]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_two_frames_are_one_file(tmp_path: Path) -> None:
    path = write_zst(tmp_path / "a.jsonl.zst", [slim_row("one")])
    path.write_bytes(path.read_bytes() * 2)
    assert read_all("slimpajama", path)[0] == ["one", "one"]


def test_find_files_knows_splits_and_leaves_test_out(tmp_path: Path) -> None:
    for name in ("train/chunk1/a", "train/chunk2/a", "validation/chunk1/a", "test/chunk1/a"):
        write_zst(tmp_path / f"{name}.jsonl.zst", [slim_row("x")])
    files = find_files("slimpajama", tmp_path)
    assert [(file.split, file.unit) for file in files] == [
        ("train", "chunk1__a"), ("train", "chunk2__a"), ("validation", "chunk1__a")
    ]  # fmt: skip
    assert has_own_validation(files)
    assert not has_own_validation(files[:2])


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-10])
    return path


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([slim_row("x"), "{broken"], r"a\.jsonl\.zst: row 2 is not JSON"),
        ([slim_row("x"), "[1]"], "row 2 has no text under the key 'text'"),
        ([json.dumps({"content": "x"})], "row 1 has no text.*--source"),
        ([slim_row(5)], "row 1 has no text"),
        ([json.dumps({"text": "x"})], "row 1 has no meta.redpajama_set_name"),
        ([json.dumps({"text": "x", "meta": "RedPajamaC4"})], "row 1 has no meta.redpajama_set_name"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_all("slimpajama", write_zst(tmp_path / "a.jsonl.zst", lines))


def test_bad_files_are_named(tmp_path: Path) -> None:
    whole = write_zst(tmp_path / "a.jsonl.zst", [slim_row(str(number)) for number in range(1000)])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: is not a whole zstandard file"):
        read_all("slimpajama", cut(whole))
    (tmp_path / "plain.jsonl.zst").write_text(slim_row("x"))
    with pytest.raises(UserError, match="is not a whole zstandard file"):
        read_all("slimpajama", tmp_path / "plain.jsonl.zst")
    (tmp_path / "empty.jsonl.zst").touch()
    with pytest.raises(UserError, match="is empty"):
        read_all("slimpajama", tmp_path / "empty.jsonl.zst")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"a\.parquet: is not a whole parquet file"):
        read_all("wudao", tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: has no column 'content', only text"):
        read_all("starcoder", tmp_path / "b.parquet")
    pq.write_table(pa.table({"content": [1]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="does not hold text"):
        read_all("starcoder", tmp_path / "c.parquet")


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--input .*nowhere is not a folder"):
        find_files("wudao", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no \*\.parquet file"):
        find_files("wudao", tmp_path)
    with pytest.raises(UserError, match="--source 'pile' is unknown"):
        find_files("pile", tmp_path)
    for name in ("train/a", "a"):
        write_zst(tmp_path / f"{name}.jsonl.zst", [slim_row("x")])
    write_zst(tmp_path / "train/b/a.jsonl.zst", [slim_row("x")])
    write_zst(tmp_path / "train/b__a.jsonl.zst", [slim_row("x")])
    with pytest.raises(UserError, match="share the name b__a"):
        find_files("slimpajama", tmp_path)
