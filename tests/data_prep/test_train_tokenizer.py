"""The trained tokenizer, and that its two files agree token for token."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep.errors import UserError
from data_prep.text_tokenizer import TextTokenizer, load_tokenizer
from data_prep.train_tokenizer import TrainTokenizerConfig, check_twin, merge_order, train_tokenizer

# Short texts of few signs, where competing merges are likely.
KNOTTY_TEXTS = st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "a", "b", "ab", "=", "-", "*", "0", "the", "</s>", "\u4e16", "\r\n", "\t"]
    ),
    max_size=60,
).map("".join)


@pytest.fixture(scope="module")
def original(tokenizer_folder: Path) -> TextTokenizer:
    return load_tokenizer(tokenizer_folder / "tokenizer.model")


@pytest.fixture(scope="module")
def pieces(tokenizer_folder: Path) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    return [model.id_to_piece(index).replace("\u2581", " ") for index in range(258, model.vocab_size())]


def test_twin_agrees_on_the_sample(
    sample_documents: list[str], original: TextTokenizer, tokenizer: TextTokenizer
) -> None:
    assert original.encode_batch(sample_documents) == tokenizer.encode_batch(sample_documents)


@settings(max_examples=300, deadline=None)
@given(text=KNOTTY_TEXTS)
def test_twin_agrees_on_knotty_texts(original: TextTokenizer, tokenizer: TextTokenizer, text: str) -> None:
    assert original.encode(text) == tokenizer.encode(text)


def test_twin_agrees_on_random_rows_of_pieces(
    original: TextTokenizer, tokenizer: TextTokenizer, pieces: list[str]
) -> None:
    rng = random.Random(0)
    for _ in range(3000):
        few = rng.sample(pieces, rng.randint(1, 4))
        text = "".join(rng.choices(few, k=rng.randint(1, 12)))
        assert original.encode(text) == tokenizer.encode(text), text


@pytest.mark.parametrize("fault", ["merges reversed", "no byte fallback", "space not marked"])
def test_fault_twins_disagree(
    fault: str, tokenizer_folder: Path, tmp_path: Path, sample_documents: list[str]
) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    if fault == "merges reversed":
        content["model"]["merges"].reverse()
    elif fault == "no byte fallback":
        content["model"]["byte_fallback"] = False
    else:
        content["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="disagrees"):
        check_twin(tmp_path, sample_documents)
    (tmp_path / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text())
    check_twin(tmp_path, sample_documents)


def test_left_merge_comes_first_where_two_overlap() -> None:
    # aba is a + ba and ab + a: in ab.a.ba both pairs overlap, and sentencepiece takes the left one.
    order = list(merge_order(["a", "b", "ab", "ba", "aba"]))
    assert order.index(("ab", "a")) < order.index(("a", "ba"))


def test_vocabulary(tokenizer_folder: Path, tokenizer: TextTokenizer) -> None:
    assert tokenizer.vocab_size == 1300
    assert tokenizer.encode("2024") == [tokenizer.encode(digit)[0] for digit in "2024"]
    assert len(tokenizer.encode("\U0001f600")) == 4  # bytes
    assert "<s>" not in Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).get_vocab()


def test_transformers_loads_the_folder(tokenizer_folder: Path, tokenizer: TextTokenizer) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = "  it 's , a test .\n\tdef f(x):  # \u4e16\u754c \U0001f600"
    assert (loaded.eos_token, loaded.eos_token_id, loaded.bos_token) == ("</s>", tokenizer.eos_id, None)
    assert loaded(text)["input_ids"] == tokenizer.encode(text)
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded) == tokenizer.vocab_size


def test_same_input_same_files(corpora: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    config = TrainTokenizerConfig(corpora=corpora, output=tmp_path / "again", vocab_size=1300)
    train_tokenizer(config)
    for path in tokenizer_folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        train_tokenizer(config)


def test_bad_settings_leave_nothing(corpora: Path, tmp_path: Path) -> None:
    for size, message in {100: "no room", 1_000_000: "--vocab-size 1000000 does not fit"}.items():
        with pytest.raises(UserError, match=message):
            train_tokenizer(TrainTokenizerConfig(corpora=corpora, output=tmp_path / "out", vocab_size=size))
    with pytest.raises(UserError, match="--corpora"):
        train_tokenizer(TrainTokenizerConfig(corpora=tmp_path / "none", output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
