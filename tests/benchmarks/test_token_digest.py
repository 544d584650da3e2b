"""The checksum sees every document, whatever the order and the files."""

from pathlib import Path

import numpy as np

from benchmarks.token_digest import datatrove_documents, digest_documents

DOCUMENTS = [np.array(tokens, np.int32) for tokens in ([1, 2, 3], [4], [5, 6])]


def test_order_does_not_matter_but_content_and_borders_do() -> None:
    wanted = digest_documents(iter(DOCUMENTS))
    assert (wanted.documents, wanted.tokens) == (3, 6)
    assert digest_documents(reversed(DOCUMENTS)) == wanted
    moved = [np.array(tokens, np.int32) for tokens in ([1, 2], [3, 4], [5, 6])]
    assert digest_documents(iter(moved)) != wanted
    assert digest_documents(iter([*DOCUMENTS, DOCUMENTS[0]])) != wanted


def test_datatroves_files(tmp_path: Path) -> None:
    np.concatenate(DOCUMENTS).tofile(tmp_path / "a.ds")
    np.cumsum([len(tokens) for tokens in DOCUMENTS]).astype(np.uint64).tofile(tmp_path / "a.ds.index")
    assert digest_documents(datatrove_documents(tmp_path)) == digest_documents(iter(DOCUMENTS))
