"""Parquet: nulls, broken text and files of other columns are counted; what is no text column is refused."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpus_readers import read_batches
from data_prep.corpus_sources import source_format
from data_prep.errors import InputDataError
from tests.data_prep.readers.reading import corpus_file, read_all


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_null_empty_and_broken_texts_are_counted(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array([b"x", None, b"", b"\xff\xfe", "\u4e16".encode()]).view(pa.binary())
    column = texts.cast(pa.large_binary()).view(kind) if kind == pa.large_string() else texts.view(kind)
    pq.write_table(pa.table({"title": ["t"] * 5, "content": column}), tmp_path / "a.parquet")
    assert read_all("wudao", tmp_path / "a.parquet") == (["x", "\u4e16"], Counter(empty=2, invalid_unicode=1))


def test_every_row_group_is_read_in_batches_with_progress(tmp_path: Path) -> None:
    texts = [str(number) * 3000 for number in range(1000, 2000)]
    pq.write_table(pa.table({"content": texts}), tmp_path / "a.parquet", row_group_size=90)
    batches = list(read_batches(corpus_file(tmp_path / "a.parquet"), source_format("starcoder", None)))
    assert [text for batch in batches for text in batch.texts] == texts
    progress = [batch.progress for batch in batches]
    assert len(batches) > 5
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_starcoders_folders_of_other_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"diff": ["a", "b"]}), tmp_path / "a.parquet")
    commits = "git-commits-cleaned/a.parquet"
    assert read_all("starcoder", tmp_path / "a.parquet", commits) == ([], Counter(other_columns=2))
    with pytest.raises(InputDataError, match="has no column 'content', only diff"):
        read_all("starcoder", tmp_path / "a.parquet", "python/a.parquet")
    pq.write_table(pa.table({"content": ["text"]}), tmp_path / "a.parquet")
    assert read_all("starcoder", tmp_path / "a.parquet", commits) == (["text"], Counter())


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(InputDataError, match=r"a\.parquet: is not a whole parquet file"):
        read_all("wudao", tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(InputDataError, match=r"b\.parquet: has no column 'content', only text"):
        read_all("starcoder", tmp_path / "b.parquet")
    pq.write_table(pa.table({"content": [1]}), tmp_path / "c.parquet")
    with pytest.raises(InputDataError, match="does not hold text"):
        read_all("starcoder", tmp_path / "c.parquet")
    whole = pa.table({"content": [str(number) for number in range(5000)]})
    pq.write_table(whole, tmp_path / "d.parquet", compression="zstd")
    data = bytearray((tmp_path / "d.parquet").read_bytes())
    data[100:200] = b"\xff" * 100
    (tmp_path / "d.parquet").write_bytes(data)
    with pytest.raises(InputDataError, match=r"d\.parquet: is not a whole parquet file"):
        read_all("wudao", tmp_path / "d.parquet")
