"""Tokenizing a source: what the shards hold, the same bytes from any number of workers, resume, bad input."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.corpus_readers import read_batches
from data_prep.corpus_sources import SOURCES, CorpusFile, SourceFormat, find_files
from data_prep.errors import UserError
from data_prep.readers.row_batch import RowErrors
from data_prep.text_tokenizer import TextTokenizer
from data_prep.tokenize_corpus import TokenizeConfig, tokenize_corpus
from data_prep.tokenize_unit import is_held_out
from data_prep.unit_manifest import read_unit_manifest
from tests.data_prep.folders import digest_of_files, documents_of, unit_prefixes

GOLDEN_SHA256 = "a6f258cfce0e0b088dbaa38d396141e7c2b5816c79e6e960f7a2203d71a2f6c7"


@pytest.fixture
def config(corpora: Path, tokenizer_folder: Path, tmp_path: Path) -> TokenizeConfig:
    return TokenizeConfig(
        source="wudao",
        input=str(corpora / "wudao"),
        tokenizer=tokenizer_folder,
        output=tmp_path / "wudao",
        validation_fraction=0.1,
    )


@pytest.mark.parametrize("source", SOURCES)
def test_every_document_is_there_once_without_bos_and_with_eos(
    source: str, corpora: Path, tokenized: Path, tokenizer: TextTokenizer
) -> None:
    texts = [
        text
        for file in find_files(source, corpora / source)
        for batch in read_batches(file, SOURCES[source])
        for text in batch.texts
    ]
    documents = documents_of(*unit_prefixes(tokenized / source / "train")) + documents_of(
        *unit_prefixes(tokenized / source / "validation")
    )
    assert Counter(documents) == Counter((*tokenizer.encode(text), tokenizer.eos_id) for text in texts)
    assert not [document for document in documents if tokenizer.eos_id in document[:-1]]


def test_manifests_count_what_is_there_and_what_was_dropped(corpora: Path, tokenized: Path) -> None:
    manifests = [read_unit_manifest(path) for path in sorted((tokenized / "slimpajama").glob("*/*.json"))]
    assert {manifest.split for manifest in manifests} == {"train", "validation"}
    wanted: Counter[str] = Counter()
    for file in find_files("slimpajama", corpora / "slimpajama"):
        for batch in read_batches(file, SOURCES["slimpajama"]):
            wanted += batch.dropped
    assert wanted["RedPajamaGithub"] > 0
    assert sum((Counter(manifest.dropped) for manifest in manifests), Counter()) == wanted
    assert sum(manifest.documents for manifest in manifests) == len(
        documents_of(*unit_prefixes(tokenized / "slimpajama/train"))
    ) + len(documents_of(*unit_prefixes(tokenized / "slimpajama/validation")))
    assert all(
        manifest.settings["held_out_fraction"] == 0 for manifest in manifests
    )  # it has a validation split of its own


def test_held_out_slice_depends_on_the_text_alone(tokenized: Path, tokenizer: TextTokenizer) -> None:
    for split, expected in (("train", False), ("validation", True)):
        documents = documents_of(*unit_prefixes(tokenized / "wudao" / split))
        texts = [tokenizer.decode(list(document[:-1])) for document in documents]
        assert texts
        assert {is_held_out(text.encode(), 0.1) for text in texts} == {expected}


def test_two_workers_write_the_same_bytes(config: TokenizeConfig, tokenized: Path) -> None:
    tokenize_corpus(dataclasses.replace(config, workers=2))
    assert digest_of_files(config.output) == digest_of_files(tokenized / "wudao")


def test_resume_after_an_interruption_gives_the_same_bytes(
    config: TokenizeConfig, tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: CorpusFile, source: SourceFormat, errors: RowErrors):  # type: ignore[no-untyped-def]
        yield from read_batches(file, source, errors)
        if "00001-of" in file.path.name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.tokenize_unit.read_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(config)
    left = {path.name for path in (config.output / "train").iterdir()}
    assert left == {f"train-00000-of-00003.{ending}" for ending in ("bin", "idx", "json")}
    with pytest.raises(UserError, match="--resume"):
        tokenize_corpus(config)
    # What a kill leaves: files without a manifest, and half of one.
    shutil.copyfile(config.output / "units.json", config.output / "train/train-00001-of-00003.bin")
    (config.output / "train/train-00001-of-00003.bin.partial").write_bytes(b"half")
    kept = config.output / "train/train-00000-of-00003.bin"
    written_at = kept.stat().st_mtime_ns
    tokenize_corpus(dataclasses.replace(config, resume=True))
    assert kept.stat().st_mtime_ns == written_at
    assert digest_of_files(config.output) == digest_of_files(tokenized / "wudao")


def test_resume_repairs_damage_and_overwrite_starts_anew(config: TokenizeConfig, tokenized: Path) -> None:
    shutil.copytree(tokenized / "wudao", config.output)
    damaged = config.output / "train/train-00001-of-00003.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    tokenize_corpus(dataclasses.replace(config, resume=True))
    assert digest_of_files(config.output) == digest_of_files(tokenized / "wudao")
    (config.output / "train/stale.json").write_text("{}")
    (config.output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"stale\.json"):
        tokenize_corpus(dataclasses.replace(config, resume=True))
    tokenize_corpus(dataclasses.replace(config, overwrite=True))
    assert digest_of_files(config.output).keys() == {*digest_of_files(tokenized / "wudao"), "notes.txt"}


def test_resume_with_other_settings_is_refused(
    config: TokenizeConfig, tokenized: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenized / "wudao", config.output)
    with pytest.raises(UserError, match=r"held_out_fraction was 0\.1, now it is 0\.2"):
        tokenize_corpus(dataclasses.replace(config, resume=True, validation_fraction=0.2))
    other = tmp_path / "tokenizer"
    shutil.copytree(config.tokenizer, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["normalizer"] = None
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer_fingerprint was"):
        tokenize_corpus(dataclasses.replace(config, resume=True, tokenizer=other))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_file_leaves_nothing_of_its_unit(
    config: TokenizeConfig, corpora: Path, tmp_path: Path, workers: int
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(corpora / "wudao", corpus)
    pq.write_table(pa.table({"text": ["x"]}), corpus / "train-00002-of-00003.parquet")
    with pytest.raises(UserError, match="has no column 'content'"):
        tokenize_corpus(dataclasses.replace(config, input=str(corpus), workers=workers))
    assert not [
        path for path in config.output.rglob("*") if "00002-of" in path.name or path.suffix == ".partial"
    ]
    for path in corpus.glob("train-0000[01]*"):
        path.unlink()
    shutil.rmtree(config.output)
    with pytest.raises(UserError, match="has no column 'content'"):
        tokenize_corpus(dataclasses.replace(config, input=str(corpus)))
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "nowhere"}, "--input nowhere is not a folder"),
        ({"tokenizer": Path("nowhere")}, "--tokenizer nowhere does not exist"),
        ({"source": "slimpajama"}, r"holds no \*\.jsonl\.zst file"),
        ({"workers": 0}, "--workers 0"),
        ({"validation_fraction": 1.5}, "--validation-fraction 1.5"),
    ],
)
def test_bad_settings_leave_nothing(config: TokenizeConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenize_corpus(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    assert not config.output.exists()


def test_resume_and_overwrite_exclude_each_other(config: TokenizeConfig) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        tokenize_corpus(dataclasses.replace(config, resume=True, overwrite=True))


def test_validation_share_by_default_depends_on_the_size(config: TokenizeConfig) -> None:
    manifests = tokenize_corpus(dataclasses.replace(config, validation_fraction=None))
    assert {manifest.settings["held_out_fraction"] for manifest in manifests} == {0.04}


def test_command_line_ends_in_one_line(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "data_prep" / "tokenize_corpus.py"
    arguments = [
        "--source",
        "wudao",
        "--input",
        "nowhere",
        "--tokenizer",
        "none",
        "--output",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: --input nowhere is not a folder")
    assert result.stderr.count("\n") == 1


def test_golden_bytes_of_the_sample(corpora: Path, tmp_path: Path) -> None:
    # Two sources whose sample is the generators' alone, and a tokenizer of 256 bytes: written down once.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: index for index, sign in enumerate([*alphabet, "<|end_of_text|>"])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    (tmp_path / "tokenizer").mkdir()
    bytes_only.save(str(tmp_path / "tokenizer/tokenizer.json"))
    digest = hashlib.sha256()
    for source in ("proof_pile_2", "wudao"):
        tokenize_corpus(
            TokenizeConfig(
                source=source,
                input=str(corpora / source),
                tokenizer=tmp_path / "tokenizer",
                output=tmp_path / source,
            )
        )
        for path in sorted((tmp_path / source).rglob("*")):
            if path.suffix in (".bin", ".idx"):
                digest.update(path.read_bytes())
    assert digest.hexdigest() == GOLDEN_SHA256
