"""The fast engine gives the reference's tokens on every document, and a difference stops the run."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.llama3_tokenizer import SPLIT_PATTERN, make_llama3_tokenizer, vocabulary_file
from data_prep.errors import IntegrityError, UserError
from data_prep.text_tokenizer import TextTokenizer, load_tokenizer
from data_prep.token_encoder import (
    CHECKED_EVERY_DOCUMENTS,
    CHECKED_FIRST_DOCUMENTS,
    FastEncoder,
    ReferenceEncoder,
    SampleCheck,
    TokenBatch,
    TokenEncoder,
    open_encoder,
)

CONTROL_WORDS = "<|begin_of_text|>a<|end_of_text|></s><unk> <|eot_id|>"


@pytest.fixture(scope="session")
def byte_level_folder(sample_documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer that cuts texts as Llama 3's does, with its control words."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_documents, trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def llama3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real vocabulary, where the package that carries it is installed."""
    if vocabulary_file() is None:
        pytest.skip("llama-models, which carries Llama 3's vocabulary, or tiktoken is not installed")
    folder = tmp_path_factory.mktemp("llama3") / "tokenizer"
    make_llama3_tokenizer(folder)
    return folder


@pytest.fixture(params=["tokenizer_folder", "byte_level_folder", "llama3_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each family of tokenizers: sentencepiece's twin, byte-level, and Llama 3's own."""
    return request.getfixturevalue(request.param)


def differences(encoder: TokenEncoder, tokenizer: TextTokenizer, texts: list[str]) -> list[str]:
    """The texts on which an engine and the reference differ."""
    ids, offsets = encoder.encode(texts)
    assert (len(offsets), offsets[0], offsets[-1]) == (len(texts) + 1, 0, len(ids))
    pairs = zip(texts, tokenizer.encode_batch(texts), offsets, offsets[1:], strict=False)
    return [text for text, wanted, begin, end in pairs if ids[begin:end].tolist() != wanted]


def test_every_sample_document_has_the_references_tokens(folder: Path, sample_documents: list[str]) -> None:
    tokenizer = load_tokenizer(folder)
    encoder = open_encoder(folder, tokenizer, "fast")
    assert not encoder.is_reference
    assert not differences(encoder, tokenizer, sample_documents)


def test_control_words_in_a_document_are_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    encoder = open_encoder(folder, tokenizer, "fast")
    assert not differences(encoder, tokenizer, [CONTROL_WORDS])
    assert tokenizer.eos_id not in encoder.encode([CONTROL_WORDS]).ids


def test_an_engine_that_reads_control_words_is_found_out(byte_level_folder: Path) -> None:
    class Fault(FastEncoder):
        def encode(self, texts: list[str]) -> TokenBatch:
            ids, offsets = self._tokenizer.encode_batch_flat(texts, split_special_tokens=False)
            return TokenBatch(np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.int64))

    fault = Fault(byte_level_folder / "tokenizer.json")
    tokenizer = load_tokenizer(byte_level_folder)
    assert differences(fault, tokenizer, [CONTROL_WORDS]) == [CONTROL_WORDS]
    with pytest.raises(IntegrityError, match=r"document 2: token 1 of the fast engine.*--engine reference"):
        SampleCheck(tokenizer, Path("a")).check(
            ["fine", CONTROL_WORDS], fault.encode(["fine", CONTROL_WORDS])
        )


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=80), max_size=6))
def test_any_text_has_the_references_tokens(
    byte_level_folder: Path, tokenizer_folder: Path, texts: list[str]
) -> None:
    for folder in (byte_level_folder, tokenizer_folder):
        tokenizer = load_tokenizer(folder)
        assert not differences(open_encoder(folder, tokenizer, "fast"), tokenizer, texts)


def pathological_texts(length: int) -> Iterator[str]:
    """What makes tokenizers crash or stall: long runs, no spaces, random letters, combining signs."""
    draw = random.Random(0)
    for unit in (
        " ",
        "a",
        "\n",
        "7",
        "\u4e2d",
        "!",
        " \t",
        "\r\n",
        "\0",
        "\u00a0",
        "\u3000",
        "e\u0301",
        "'s'LL",
    ):
        yield (unit * length)[:length]
    yield "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))
    yield "".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(length))
    yield "".join(chr(draw.randrange(0x1F300, 0x1F650)) for _ in range(length))


def test_pathological_documents(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    texts = [*pathological_texts(30_000), ""]
    assert not differences(open_encoder(folder, tokenizer, "fast"), tokenizer, texts)


@pytest.mark.parametrize("unit", [" ", "a"])
def test_a_megabyte_of_one_character(folder: Path, unit: str) -> None:
    encoder = FastEncoder(folder / "tokenizer.json")
    assert len(encoder.encode([unit * 1_000_000]).ids) > 0


def test_the_sample_is_the_first_documents_and_every_nth(tokenizer: TextTokenizer) -> None:
    count = 2 * CHECKED_EVERY_DOCUMENTS + 1
    texts = [f"document {number}" for number in range(count)]
    encoder = ReferenceEncoder(tokenizer)

    def found(faulty: int, batch_size: int) -> bool:
        check = SampleCheck(tokenizer, Path("file"))
        for start in range(0, count, batch_size):
            part = texts[start : start + batch_size]
            wrong = [f"{text}!" if start + place == faulty else text for place, text in enumerate(part)]
            try:
                check.check(part, encoder.encode(wrong))
            except IntegrityError:
                return True
        assert check.checked_documents == CHECKED_FIRST_DOCUMENTS + 2
        return False

    for batch_size in (700, count):
        wanted = {*range(CHECKED_FIRST_DOCUMENTS), CHECKED_EVERY_DOCUMENTS, 2 * CHECKED_EVERY_DOCUMENTS}
        for number in (*wanted, CHECKED_FIRST_DOCUMENTS, CHECKED_EVERY_DOCUMENTS + 1):
            assert found(number, batch_size) == (number in wanted)


def test_a_sentencepiece_model_is_left_to_its_own_library(tokenizer_folder: Path) -> None:
    path = tokenizer_folder / "tokenizer.model"
    assert open_encoder(path, load_tokenizer(path), "fast").is_reference
    assert open_encoder(tokenizer_folder, load_tokenizer(tokenizer_folder), "reference").is_reference


def test_an_engine_that_cannot_read_the_tokenizer_says_so(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"parts that fastokens does not know.*--engine reference"):
        open_encoder(tmp_path, tokenizer, "fast")


def test_an_engine_that_differs_on_the_probe_is_refused(
    byte_level_folder: Path, tokenizer: TextTokenizer
) -> None:
    with pytest.raises(IntegrityError, match="gives other tokens than the reference"):
        open_encoder(byte_level_folder, tokenizer, "fast")
