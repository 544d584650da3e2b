"""Both kinds of tokenizers behind the interface: control words stay text, no BOS, a telling fingerprint."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from data_prep.errors import UserError
from data_prep.text_tokenizer import TextTokenizer, copy_tokenizer, load_tokenizer

CONTROL_WORDS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
# U+2581 is the one sign that sentencepiece cannot give back: it stands for a space in its pieces.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)


def llama_like(folder: Path, eos_token: str | None = "<|eot_id|>") -> Path:
    """A byte-level BPE in the manner of Llama 3: control words as added tokens, and a BOS in its template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in CONTROL_WORDS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 256)]
    )
    tokenizer.enable_truncation(max_length=8)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if eos_token is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos_token}}))
    return folder


def test_llama_like_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llama_like(tmp_path / "llama"))
    assert tokenizer.vocab_size == 259
    assert tokenizer.eos_id == 257  # <|end_of_text|>, though an Instruct folder's config names <|eot_id|>
    ids = tokenizer.encode("quoted: <|begin_of_text|> and <|end_of_text|>")
    assert len(ids) == 45  # one a byte: no BOS, no truncation, no control token
    assert max(ids) < 256
    assert (
        tokenizer.decode([*ids, tokenizer.eos_id])
        == "quoted: <|begin_of_text|> and <|end_of_text|><|end_of_text|>"
    )


def test_fault_twin_the_library_alone_would_read_control_words(tmp_path: Path) -> None:
    plain = Tokenizer.from_file(str(llama_like(tmp_path / "llama") / "tokenizer.json"))
    ids = plain.encode("quoted: <|begin_of_text|>").ids
    assert ids != load_tokenizer(tmp_path / "llama").encode("quoted: <|begin_of_text|>")
    assert 256 in ids


def test_configured_eos_is_used_where_there_is_no_end_of_text(tmp_path: Path) -> None:
    folder = llama_like(tmp_path / "llama")
    content = (folder / "tokenizer.json").read_text().replace("<|end_of_text|>", "<|other|>")
    (folder / "tokenizer.json").write_text(content)
    assert load_tokenizer(folder).eos_id == 258
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="eos_token"):
        load_tokenizer(folder)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_round_trip(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text]) == [ids]
    assert tokenizer.eos_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_the_two_files_are_one_tokenizer(tokenizer_folder: Path) -> None:
    twins = [load_tokenizer(tokenizer_folder / name) for name in ("tokenizer.json", "tokenizer.model")]
    assert twins[0].fingerprint == twins[1].fingerprint
    text = "a </s> b <unk>\n"
    for tokenizer in twins:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.eos_id, *ids]) == text + "</s>" + text


def test_fingerprint_tells_tokenizers_apart_but_not_their_formatting(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    original = load_tokenizer(tokenizer_folder).fingerprint
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).fingerprint == original
    content["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).fingerprint != original


def test_copy_takes_the_tokenizer_and_nothing_else(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    copy_tokenizer(tmp_path / "model", tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
    ]  # fmt: skip
    assert load_tokenizer(tmp_path / "copy").fingerprint == load_tokenizer(tokenizer_folder).fingerprint
    shutil.copyfile(tokenizer_folder / "tokenizer.model", tmp_path / "mine.model")
    copy_tokenizer(tmp_path / "mine.model", tmp_path / "single")
    assert load_tokenizer(tmp_path / "single").fingerprint == load_tokenizer(tokenizer_folder).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "does not exist"),
        ("vocabulary.txt", b"a", "must be a folder"),
        ("tokenizer.json", b"{}", "not a Hugging Face tokenizer.json"),
        ("tokenizer.model", b"IQ== 0\n", "not a sentencepiece model.*tiktoken"),
        ("tokenizer.model", b"", "not a sentencepiece model"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / name)


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither"):
        load_tokenizer(tmp_path)
