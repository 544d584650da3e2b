"""Data sets through `datasets`, streamed: a folder on disk takes the same way as a name on the Hub."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpus_sources import source_format
from data_prep.errors import InputDataError, UserError
from data_prep.readers.hub import find_hub_shards, read_hub_shard
from data_prep.readers.row_batch import RowErrors


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(3):
        texts = [f"{number} {row}" for row in range(300)]
        pq.write_table(pa.table({"text": texts}), folder / f"train-{number}.parquet")
    pq.write_table(pa.table({"text": ["held out"]}), folder / "validation-0.parquet")
    return f"hub:{folder}"


def test_every_row_of_every_shard_and_split(dataset: str) -> None:
    files = find_hub_shards(dataset)
    assert [(file.split, file.unit) for file in files] == [
        ("train", "00000-of-00003"),
        ("train", "00001-of-00003"),
        ("train", "00002-of-00003"),
        ("validation", "00000-of-00001"),
    ]
    texts = [
        [
            text
            for batch in read_hub_shard(file, source_format("mine", None), RowErrors(file.path, 0))
            for text in batch.texts
        ]
        for file in files
    ]
    assert texts[:3] == [[f"{number} {row}" for row in range(300)] for number in range(3)]
    assert texts[3] == ["held out"]


def test_rows_without_the_field_are_named(dataset: str) -> None:
    file = find_hub_shards(dataset)[0]
    with pytest.raises(InputDataError, match=r"row 1 has no text under 'content' \(see --text-field\)"):
        list(read_hub_shard(file, source_format("mine", "content"), RowErrors(file.path, 0)))


def test_what_cannot_be_opened_is_named(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--input hub:.*nowhere cannot be opened"):
        find_hub_shards(f"hub:{tmp_path}/nowhere")
    only_test = tmp_path / "only_test"
    only_test.mkdir()
    (only_test / "test.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(UserError, match="has no train split, only test"):
        find_hub_shards(f"hub:{only_test}")
