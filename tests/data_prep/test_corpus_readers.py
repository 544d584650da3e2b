"""Every format goes to its reader, and a file of nothing is refused before that."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import InputDataError
from tests.data_prep.readers.reading import read_all, slim_row, write_zst


def test_every_ending_goes_to_its_reader(tmp_path: Path) -> None:
    write_zst(tmp_path / "a.jsonl.zst", [slim_row("x")])
    (tmp_path / "a.jsonl").write_text(slim_row("x"))
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "part-a.json").write_text(json.dumps([{"content": "x"}]))
    cases = {"a.jsonl.zst": "slimpajama", "a.jsonl": "mine", "a.parquet": "starcoder", "part-a.json": "wudao"}
    for name, source in cases.items():
        assert read_all(source, tmp_path / name)[0] == ["x"]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl", "a.parquet", "part-a.json"])
def test_a_file_of_nothing_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputDataError, match="is empty"):
        read_all("mine", tmp_path / name)
