"""Text out of packages, and the corpora made of it, in the sources' own formats."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from benchmarks.bench_corpus import take, write_source
from benchmarks.text_packages import SPLIT_CHARACTERS, documents
from data_prep.corpus_readers import read_batches
from data_prep.corpus_sources import SOURCES, find_files

LONG = "a word and another, " * 10


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Unpacked packages with one file of each kind."""
    folder = tmp_path / "packages"
    for name in ("cmake-doc", "dict-wn", "rust-src", "linux-source-6.1", "poems", "manpages-zh"):
        (folder / name).mkdir(parents=True)
    page = f"<head><title>no</title></head><p>{LONG}&amp; more</p><script>var no;</script>"
    (folder / "cmake-doc/a.html").write_text(page)
    (folder / "cmake-doc/copy.html").write_text(page)
    (folder / "dict-wn/wn.dict.dz").write_bytes(gzip.compress(b"w" * (2 * SPLIT_CHARACTERS)))
    (folder / "rust-src/a.rs").write_text(f"// {LONG}")
    with tarfile.open(folder / "linux-source-6.1/linux.tar.xz", "w:xz") as archive:
        data = f"/* {LONG} */".encode()
        member = tarfile.TarInfo("linux/a.c")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    poem = {"title": "t", "author": "a", "paragraphs": ["\u6625\u7720\u4e0d\u89c9\u6653"]}
    (folder / "poems/a.json").write_text(json.dumps([poem] * 400, ensure_ascii=False))
    return folder


def test_texts_out_of_packages(packages: Path) -> None:
    english = dict(documents("slimpajama", packages))
    assert english["cmake-doc"] == f"{LONG}& more"
    assert sum(kind == "dict-wn" for kind, _ in documents("slimpajama", packages)) == 2
    code = dict(documents("starcoder", packages))
    assert code == {"rust": f"// {LONG}", "c": f"/* {LONG} */"}
    poems = [text for _, text in documents("wudao", packages)]
    assert poems
    assert all(text.startswith("t\na\n\u6625") for text in poems)


@pytest.mark.parametrize("source", ["slimpajama", "starcoder", "wudao"])
def test_corpora_are_read_back(packages: Path, tmp_path: Path, source: str) -> None:
    found = take(source, packages, 1e9, seed=0)
    assert len({text for _, text in found}) == len(found)
    write_source(source, tmp_path / source, found)
    files = find_files(source, tmp_path / source)
    texts = [text for file in files for batch in read_batches(file, SOURCES[source]) for text in batch.texts]
    assert sorted(texts) == sorted(text for _, text in found)
