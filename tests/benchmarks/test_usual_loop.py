"""The yardsticks write the same tokens as ours, and a difference would be seen."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.token_digest import digest_documents, indexed_documents
from data_prep.sample_corpus import SampleCorpusConfig, make_corpora
from data_prep.tokenize_corpus import TokenizeConfig, tokenize_corpus
from data_prep.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from tests.repository_rules import ROOT


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small corpora, a tokenizer, and ours of two sources, one of each format."""
    folder = tmp_path_factory.mktemp("yardsticks")
    make_corpora(SampleCorpusConfig(output=folder / "corpora", size_mb=0.4))
    train_tokenizer(
        TrainTokenizerConfig(corpora=folder / "corpora", output=folder / "tokenizer", vocab_size=900)
    )
    for source in ("proof_pile_2", "wudao"):
        tokenize_corpus(
            TokenizeConfig(
                source=source,
                input=str(folder / "corpora" / source),
                tokenizer=folder / "tokenizer",
                output=folder / "ours" / source,
            )
        )
    return folder


@pytest.mark.parametrize(("source", "workers"), [("proof_pile_2", "1"), ("wudao", "2")])
def test_the_usual_loop_writes_our_tokens(world: Path, source: str, workers: str) -> None:
    output = world / "loop" / source
    command = [
        sys.executable,
        str(ROOT / "benchmarks/usual_loop.py"),
        "--source",
        source,
        "--workers",
        workers,
    ]
    command += ["--corpus", str(world / "corpora" / source), "--tokenizer", str(world / "tokenizer")]
    subprocess.run([*command, "--output", str(output)], check=True, capture_output=True)
    ours, loop = world / "ours" / source, output
    wanted = digest_documents(token.astype(np.int32) for token in indexed_documents(ours))
    assert wanted.documents > 10
    assert digest_documents(indexed_documents(loop)) == wanted
    path = next(path for path in sorted(loop.glob("*.bin")))
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert digest_documents(indexed_documents(loop)) != wanted
    shutil.rmtree(loop)


def test_the_limit_writes_as_many_tokens_as_asked(world: Path) -> None:
    output = world / "limit"
    command = [sys.executable, str(ROOT / "benchmarks/physical_limit.py"), "--source", "wudao"]
    command += ["--corpus", str(world / "corpora/wudao"), "--tokens", "10000", "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    assert digest_documents(indexed_documents(output)).tokens == pytest.approx(10_000, abs=5)
