"""A small world shared by the tests: sample corpora, a tokenizer, the four sources tokenized, one blend."""

from pathlib import Path

import pytest

from data_prep.blend import BlendConfig, blend
from data_prep.corpus_readers import read_batches
from data_prep.corpus_sources import SOURCES, find_files
from data_prep.sample_corpus import SampleCorpusConfig, make_corpora
from data_prep.text_tokenizer import TextTokenizer, load_tokenizer
from data_prep.tokenize_corpus import TokenizeConfig, tokenize_corpus
from data_prep.train_tokenizer import TrainTokenizerConfig, train_tokenizer

SIZE_MB = 0.8
VOCAB_SIZE = 1300
BLEND_TOKENS = 100_000


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample corpora of less than a megabyte."""
    folder = tmp_path_factory.mktemp("world") / "corpora"
    make_corpora(SampleCorpusConfig(output=folder, size_mb=SIZE_MB))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpora: Path) -> Path:
    """A small tokenizer trained on them."""
    folder = corpora.parent / "tokenizer"
    train_tokenizer(TrainTokenizerConfig(corpora=corpora, output=folder, vocab_size=VOCAB_SIZE))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    """The tokenizer, open."""
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def tokenized(corpora: Path, tokenizer_folder: Path) -> Path:
    """All four sources as token shards; a tenth of those without validation is held out."""
    folder = corpora.parent / "tokenized"
    for source in SOURCES:
        tokenize_corpus(
            TokenizeConfig(
                source=source,
                input=str(corpora / source),
                tokenizer=tokenizer_folder,
                output=folder / source,
                validation_fraction=0.1,
            )
        )
    return folder


@pytest.fixture(scope="session")
def blend_config(tokenized: Path, tokenizer_folder: Path) -> BlendConfig:
    """A blend of the four sources in four shards, with the published weights."""
    return BlendConfig(
        tokenized=tokenized,
        tokenizer=tokenizer_folder,
        output=tokenized.parent / "blend",
        total_tokens=BLEND_TOKENS,
        shard_tokens=BLEND_TOKENS // 4,
        validation_tokens=5_000,
    )


@pytest.fixture(scope="session")
def blend_folder(blend_config: BlendConfig) -> Path:
    """The blend, written."""
    blend(blend_config)
    return blend_config.output


@pytest.fixture(scope="session")
def sample_documents(corpora: Path) -> list[str]:
    """All documents of the four sources that are not dropped."""
    return [
        text
        for source, source_format in SOURCES.items()
        for file in find_files(source, corpora / source)
        for batch in read_batches(file, source_format)
        for text in batch.texts
    ]
