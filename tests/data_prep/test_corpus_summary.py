"""The summary of tokenized sources is the sum of their manifests, and is drawn whatever they hold."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import corpus_summary
from data_prep.corpus_figure import draw_summary, power_of_two, with_unit
from data_prep.corpus_summary import (
    SplitSummary,
    left_out_table,
    summarise,
    summary_table,
    total_of,
    write_summary,
)
from data_prep.errors import IntegrityError, UserError
from data_prep.indexed_shards import manifest_path
from data_prep.unit_manifest import length_histogram, read_unit_manifest
from tests.data_prep.small_shards import UNITS, write_source


@pytest.fixture
def tokenized(tmp_path: Path) -> Path:
    for source in ("wudao", "starcoder"):
        write_source(tmp_path / source, source)
    return tmp_path


def test_sums_are_those_of_the_manifests(tokenized: Path) -> None:
    summary = summarise(tokenized)
    assert list(summary) == ["starcoder", "wudao"]
    for source, splits in summary.items():
        assert list(splits) == ["train", "validation"]
        for split, row in splits.items():
            prefixes = [tokenized / source / split / unit for unit in UNITS[split]]
            manifests = [read_unit_manifest(manifest_path(prefix)) for prefix in prefixes]
            assert row.files == len(manifests) and row.missing_files == 0
            assert row.documents == sum(row.length_histogram) == sum(m.documents for m in manifests)
            assert row.tokens == sum(m.tokens for m in manifests)
            assert row.text_bytes == sum(m.text_bytes for m in manifests)
            assert row.bytes_per_token == 4.0
        assert splits["train"].dropped == {"contaminated": 2, "empty": 4}
        assert (splits["train"].skipped, splits["train"].checked_documents) == (2, 8)
        assert splits["validation"].dropped == {}
    total = total_of(row for splits in summary.values() for row in splits.values())
    assert (total.files, total.documents, total.skipped) == (6, 180, 4)
    assert total.dropped == {"contaminated": 4, "empty": 8}


def test_unfinished_units_are_counted_as_missing(tokenized: Path) -> None:
    manifest_path(tokenized / "wudao" / "train" / "part.1").unlink()
    row = summarise(tokenized)["wudao"]["train"]
    assert (row.files, row.missing_files, row.documents) == (1, 1, 30)
    assert "1/2" in list(corpus_summary._cells(row))


def test_a_changed_manifest_is_refused(tokenized: Path) -> None:
    path = manifest_path(tokenized / "wudao" / "train" / "part.1")
    path.write_text(path.read_text().replace('"documents": 30', '"documents": 31'))
    with pytest.raises(IntegrityError, match=r"part\.1\.json: was changed"):
        summarise(tokenized)


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="holds no tokenized source"):
            summarise(folder)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_the_median_is_right_within_its_bin(lengths: list[int]) -> None:
    histogram = length_histogram(np.array(lengths))
    estimate = SplitSummary(length_histogram=histogram.tolist()).median_length_tokens
    assert estimate is not None
    median = sorted(lengths)[(len(lengths) - 1) // 2]
    bits = median.bit_length()
    assert 2 ** (bits - 1) <= estimate <= 2**bits


def test_nothing_has_no_median_and_no_fertility() -> None:
    assert SplitSummary().median_length_tokens is None
    assert SplitSummary().bytes_per_token is None


def test_files_are_written_whole(tokenized: Path) -> None:
    summary = summarise(tokenized)
    output = tokenized / "out" / "new"
    write_summary(summary, output)
    assert sorted(path.name for path in output.iterdir()) == ["summary.json", "summary.png"]
    content = json.loads((output / "summary.json").read_text())
    train = summary["wudao"]["train"]
    assert content["sources"]["wudao"]["train"]["tokens"] == train.tokens
    assert content["sources"]["wudao"]["train"]["bytes_per_token"] == 4.0
    assert content["total"]["documents"] == 180
    with Image.open(output / "summary.png") as image:
        assert image.width > 1400 and image.height > 800


@pytest.mark.parametrize(("count", "documents"), [(1, 0), (9, 5)])
def test_draws_sources_without_documents_and_without_drops(count: int, documents: int) -> None:
    sources = {f"a_long_name_of_a_source_{number}": SplitSummary() for number in range(count)}
    sources["a_long_name_of_a_source_0"].documents = documents
    sources["a_long_name_of_a_source_0"].length_histogram[4] = documents
    with Image.open(io.BytesIO(draw_summary(sources))) as image:
        assert image.width > 1400
    summary = {name: {"train": row} for name, row in sources.items()}
    assert summary_table(summary).row_count == count + 1
    assert left_out_table(summary).row_count == count


def test_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenized: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["corpus_summary.py", "--tokenized", str(tokenized)])
    corpus_summary.main()
    printed = capsys.readouterr().out
    assert (tokenized / "summary.json").exists() and (tokenized / "summary.png").exists()
    assert "starcoder validation" in " ".join(printed.split())
    assert "contaminated" in printed and "skipped, not readable" in printed
    assert max(map(len, printed.splitlines()[:12])) <= 80


def test_counts_are_written_short() -> None:
    counts = [0, 7, 999, 1000, 12_345, 999_400, 999_600, 627e9, 1.2e12]
    assert [with_unit(count) for count in counts] == [
        "0", "7", "999", "1 k", "12.3 k", "999 k", "1 M", "627 G", "1.2 T",
    ]  # fmt: skip
    assert [power_of_two(exponent) for exponent in (-1, 0, 9, 10, 19, 20, 23)] == [
        "0", "1", "512", "1k", "512k", "1M", "8M",
    ]  # fmt: skip
