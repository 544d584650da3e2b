"""The sample corpora have the published formats, no document twice, and are the same every time."""

import io
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import UserError
from data_prep.sample_corpus import SampleCorpusConfig, make_corpora
from tests.data_prep.folders import digest_of_files


def rows_of(path: Path) -> list[dict[str, object]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open("rb") as raw:
        return [json.loads(line) for line in io.BufferedReader(pa.input_stream(raw, compression="zstd"))]


def test_formats(corpora: Path) -> None:
    for pattern, count in {
        "slimpajama/train/chunk*/*.jsonl.zst": 4,
        "slimpajama/validation/chunk1/*.jsonl.zst": 1,
        "starcoder/python/*.parquet": 3,
        "proof_pile_2/*/train/*.jsonl.zst": 6,
        "proof_pile_2/*/validation/*.jsonl.zst": 3,
        "wudao/*.parquet": 3,
    }.items():
        assert len(list(corpora.glob(pattern))) == count, pattern
    slim = rows_of(next(corpora.glob("slimpajama/train/chunk1/*.zst")))
    assert {"text", "meta"} == set(slim[0])
    assert set(rows_of(next(corpora.glob("wudao/*.parquet")))[0]) == {"title", "content"}
    assert "content" in rows_of(next(corpora.glob("starcoder/python/*.parquet")))[0]


def test_no_document_twice_and_github_rows_present(corpora: Path) -> None:
    rows = [
        row for path in corpora.rglob("*") if path.suffix in (".zst", ".parquet") for row in rows_of(path)
    ]
    texts = Counter(str(row.get("text", row.get("content"))) for row in rows)
    assert max(texts.values()) == 1
    sets = Counter(row["meta"].get("redpajama_set_name") for row in rows if isinstance(row.get("meta"), dict))  # type: ignore[attr-defined]
    assert sets["RedPajamaGithub"] > 0


def test_same_seed_same_bytes_other_seed_other_bytes(corpora: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    make_corpora(SampleCorpusConfig(output=again, size_mb=0.8))
    make_corpora(SampleCorpusConfig(output=other, size_mb=0.8, seed=1))
    assert digest_of_files(again) == digest_of_files(corpora)
    assert (
        digest_of_files(other)["wudao/train-00000-of-00003.parquet"]
        != digest_of_files(corpora)["wudao/train-00000-of-00003.parquet"]
    )


def test_existing_folder_is_refused_or_replaced(tmp_path: Path) -> None:
    config = SampleCorpusConfig(output=tmp_path / "corpora", size_mb=0.1)
    make_corpora(config)
    with pytest.raises(UserError, match="--overwrite"):
        make_corpora(config)
    make_corpora(SampleCorpusConfig(output=tmp_path / "corpora", size_mb=0.1, overwrite=True))
    (tmp_path / "foreign").mkdir()
    with pytest.raises(UserError, match="not written by this command"):
        make_corpora(SampleCorpusConfig(output=tmp_path / "foreign", size_mb=0.1, overwrite=True))
    with pytest.raises(UserError, match="--size-mb"):
        make_corpora(SampleCorpusConfig(output=tmp_path / "tiny", size_mb=0.01))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpora", "foreign"]
