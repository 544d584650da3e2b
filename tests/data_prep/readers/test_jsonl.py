"""JSON lines: what is dropped and counted, what stops, what --on-error skip passes over; memory stays flat."""

import gzip
import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus_readers import read_batches
from data_prep.corpus_sources import source_format
from data_prep.errors import InputDataError
from data_prep.readers.jsonl import read_jsonl
from data_prep.readers.row_batch import (
    BATCH_TEXT_CHARACTERS,
    MAX_TEXT_BYTES,
    RowErrors,
    TooManySkippedError,
)
from tests.data_prep.readers.reading import corpus_file, read_all, slim_row, write_zst


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


def test_bytes_that_are_not_utf8_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": "caf\xc3\xa9"}\n')
    assert read_all("mine", path) == (["caf\u00e9"], Counter(invalid_unicode=1))


def test_proof_pile_needs_no_set_name_and_keeps_every_row(tmp_path: Path) -> None:
    path = write_zst(
        tmp_path / "a.jsonl.zst", [json.dumps({"text": "x", "meta": {}}), slim_row("y", "RedPajamaGithub")]
    )
    assert read_all("proof_pile_2", path) == (["x", "y"], Counter())


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), max_size=20),
    compression=st.sampled_from(["", ".gz", ".zst"]),
    ascii_only=st.booleans(),
    frames=st.integers(1, 3),
)
def test_every_text_comes_back_from_every_compression(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    compression: str,
    ascii_only: bool,
    frames: int,
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / f"a.jsonl{compression}"
    lines = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()
    compress: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": zstandard.compress,
    }
    path.write_bytes(compress[compression](lines) * frames or b"\n")
    assert read_all("mine", path) == (texts * frames, Counter())


def test_a_last_line_without_end_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one"}\r\n{"text": "two"}')
    assert read_all("mine", tmp_path / "a.jsonl")[0] == ["one", "two"]


def test_long_files_come_in_batches_with_progress(tmp_path: Path) -> None:
    path = write_zst(tmp_path / "a.jsonl.zst", [slim_row("x" * (BATCH_TEXT_CHARACTERS // 4))] * 10)
    batches = list(read_batches(corpus_file(path), source_format("slimpajama", None)))
    assert [len(batch.texts) for batch in batches] == [4, 4, 2]
    progress = [batch.progress for batch in batches]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_lines_and_texts_that_are_too_long_are_counted(tmp_path: Path) -> None:
    path = write_zst(
        tmp_path / "a.jsonl.zst", ['{"text": "' + "x" * 400 + '"}', '{"text": "short"}', '{"text": "y"}']
    )
    errors = RowErrors(path, max_skipped=0)
    batches = list(read_jsonl(path, source_format("mine", None), errors, max_line_bytes=100))
    assert [text for batch in batches for text in batch.texts] == ["short", "y"]
    assert batches[0].dropped == Counter(too_long=1)
    write_zst(
        path,
        [
            slim_row("x" * (MAX_TEXT_BYTES + 1)),
            slim_row("x" * MAX_TEXT_BYTES),
            slim_row("\u4e16" * (MAX_TEXT_BYTES // 3 + 1)),
        ],
    )
    texts, dropped = read_all("slimpajama", path)
    assert ([len(text) for text in texts], dropped) == ([MAX_TEXT_BYTES], Counter(too_long=2))


def test_memory_does_not_grow_with_the_file_or_an_endless_line(tmp_path: Path) -> None:
    def peak_bytes(lines: int) -> int:
        path = tmp_path / "a.jsonl.zst"
        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
            for _ in range(lines):
                stream.write(slim_row("x" * 200_000).encode() + b"\n")
            stream.write(b" " * (64 << 20))  # a line of 64 MB, of which at most 1 MB may be kept
        tracemalloc.start()
        errors = RowErrors(path, max_skipped=0)
        for _ in read_jsonl(path, source_format("slimpajama", None), errors, max_line_bytes=1 << 20):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(400) < peak_bytes(20) + (8 << 20) < 64 << 20


BAD_ROWS = [
    ([slim_row("x"), "{broken"], r"a\.jsonl\.zst: row 2 is not JSON"),
    ([slim_row("x"), "[1]"], "row 2 has no text under the key 'text'"),
    ([slim_row("x"), "[" * 100_000], "row 2 is not JSON"),
    ([json.dumps({"content": "x"})], r"row 1 has no text.*--source"),
    ([slim_row(5)], "row 1 has no text"),
    ([json.dumps({"text": "x"})], r"row 1 has no meta\.redpajama_set_name"),
    ([json.dumps({"text": "x", "meta": "RedPajamaC4"})], r"row 1 has no meta\.redpajama_set_name"),
]


@pytest.mark.parametrize(("lines", "message"), BAD_ROWS)
def test_bad_rows_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputDataError, match=f"{message}.*--on-error skip"):
        read_all("slimpajama", write_zst(tmp_path / "a.jsonl.zst", lines))


@pytest.mark.parametrize(("lines", "message"), BAD_ROWS)
def test_bad_rows_are_skipped_listed_and_limited(tmp_path: Path, lines: list[str], message: str) -> None:
    path = write_zst(tmp_path / "a.jsonl.zst", [*lines, slim_row("last")])
    errors = RowErrors(path, max_skipped=1)
    texts, _ = read_all("slimpajama", path, errors=errors)
    assert texts[-1] == "last"
    assert [skipped.row for skipped in errors.skipped] == [len(lines)]
    assert re.search(message.split(": ")[-1], f"row {len(lines)} {errors.skipped[0].reason}")
    write_zst(path, [*lines, *lines])
    with pytest.raises(TooManySkippedError, match=r"1 rows of this file were skipped already"):
        read_all("slimpajama", path, errors=RowErrors(path, max_skipped=1))


@pytest.mark.parametrize(("ending", "compress"), [("zst", zstandard.compress), ("gz", gzip.compress)])
def test_damaged_compression_is_named(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress("\n".join(slim_row(str(number)) for number in range(1000)).encode())
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(whole[:-10])
    with pytest.raises(
        InputDataError, match=rf"a\.jsonl\.{ending}: is not a whole .* file.*fetch the file again"
    ):
        read_all("mine", path)
    path.write_bytes(slim_row("x").encode())
    with pytest.raises(InputDataError, match="is not a whole"):
        read_all("mine", path)
