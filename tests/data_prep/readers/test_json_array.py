"""WuDao's original files: one JSON array each, read object by object."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import InputDataError
from data_prep.readers import json_array
from data_prep.readers.row_batch import RowErrors
from tests.data_prep.readers.reading import read_all


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), max_size=20),
    block=st.integers(1, 50),
    indent=st.sampled_from([None, 1]),
)
def test_every_text_comes_back_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], block: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("array") / "part-0.json"
    rows = [{"id": number, "title": "t", "content": text} for number, text in enumerate(texts)]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "BLOCK_CHARACTERS", block)
        assert read_all("wudao", path) == (texts, Counter())


def test_bytes_that_are_not_utf8_drop_their_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "part-0.json"
    path.write_bytes(b'[{"content": "a"}, {"content": "caf\xe9"}, {"content": "b"}]')
    assert read_all("wudao", path) == (["a", "b"], Counter(invalid_unicode=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"content": "a"}', "is no JSON array"),
        ("  ", "is no JSON array"),
        ('[{"content": "a"}', "is not a whole JSON array"),
        ('[{"content": "a"}, {"cont', "is not a whole JSON array"),
        ('[{"content": "a"}, nonsense]', "is not a whole JSON array"),
        ('[{"title": "a"}]', "row 1 has no text under the key 'content'"),
        ('[{"content": "a"}, 5]', "row 2 has no text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "part-0.json").write_text(content)
    with pytest.raises(InputDataError, match=rf"part-0\.json: {message}"):
        read_all("wudao", tmp_path / "part-0.json")


def test_rows_without_text_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "part-0.json"
    path.write_text('[{"title": "a"}, {"content": "b"}]')
    errors = RowErrors(path, max_skipped=5)
    assert read_all("wudao", path, errors=errors)[0] == ["b"]
    assert [skipped.row for skipped in errors.skipped] == [1]
