"""Tokenizers behind one small interface: sentencepiece `.model` and Hugging Face `tokenizer.json` files.

For pre-training text every character of a document is text: no beginning-of-sequence token is added, and a
literal `<|begin_of_text|>` or `</s>` in a document is split into ordinary tokens, never read as the control
token. Libraries: `tokenizers` and `sentencepiece`, the formats' own implementations.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Protocol

import sentencepiece
from tokenizers import Tokenizer

from data_prep.errors import UserError
from data_prep.output_files import read_json_object

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
# Llama 3 ends documents with the first; an Instruct folder's config names the end of a chat turn instead.
PREFERRED_EOS_TOKEN = "<|end_of_text|>"
OTHER_EOS_TOKENS = ("</s>", "<|endoftext|>")
# Where tokenizers differ: digits, runs of white space, Chinese, an emoji, combining marks, control words.
PROBE_TEXT = (
    "The 2,048 tokens of  a\n\n\tdef f(x):\r\n        return x**2  # it's\u3000"
    "\u4e16\u754c\uff0c\u4f60\u597d e\u0301\ufb01 \U0001f600 </s><|end_of_text|><unk>"
)


class TextTokenizer(Protocol):
    """What the data preparation asks of a tokenizer."""

    vocab_size: int
    """Number of token ids; every id is below it."""
    eos_id: int
    """The token that ends a document."""
    fingerprint: str
    """Hash of the vocabulary, the EOS id and a probe text's ids: equal for tokenizers that agree."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text: no BOS, no EOS, control words as plain text."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; control tokens are written out."""
        ...


def compute_fingerprint(pieces: list[str], eos_id: int, probe_ids: list[int]) -> str:
    """Hash what makes two tokenizers interchangeable; formatting of their files does not matter."""
    content = json.dumps([pieces, eos_id, probe_ids], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


class SentencePieceTokenizer:
    """A sentencepiece model. Raises UserError when the file is not one or defines no end of sequence."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--tokenizer {path} is not a sentencepiece model (Llama 3's tokenizer.model is a "
                f"tiktoken list: give the folder with its tokenizer.json instead)"
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"--tokenizer {path} defines no end-of-sequence piece; train one with eos_id set")
        pieces = [self._model.id_to_piece(index) for index in range(self.vocab_size)]
        self.fingerprint = compute_fingerprint(pieces, self.eos_id, self.encode(PROBE_TEXT))

    def encode(self, text: str) -> list[int]:
        """See TextTokenizer."""
        return self._model.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See TextTokenizer."""
        return self._model.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        """See TextTokenizer."""
        return "".join(
            self._model.id_to_piece(run[0]) if self._model.is_control(run[0]) else self._model.decode(run)
            for run in self._runs(ids)
        )

    def _runs(self, ids: list[int]) -> list[list[int]]:
        """Cut ids before and after each control token, which sentencepiece would leave out."""
        runs: list[list[int]] = []
        for token in ids:
            if runs and not self._model.is_control(token) and not self._model.is_control(runs[-1][-1]):
                runs[-1].append(token)
            else:
                runs.append([token])
        return runs


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Raises UserError when the file is not one or has no end-of-document token."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"--tokenizer {path} is not a Hugging Face tokenizer.json ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Without this a document that quotes "<|begin_of_text|>" would hold the control token itself.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = self._find_eos(path, vocabulary)
        pieces = [self._tokenizer.id_to_token(index) or "" for index in range(self.vocab_size)]
        self.fingerprint = compute_fingerprint(pieces, self.eos_id, self.encode(PROBE_TEXT))

    @staticmethod
    def _find_eos(path: Path, vocabulary: dict[str, int]) -> int:
        candidates = [PREFERRED_EOS_TOKEN]
        config_path = path.with_name("tokenizer_config.json")
        if config_path.is_file():
            configured = read_json_object(config_path, "repair it or fetch the tokenizer again").get(
                "eos_token"
            )
            if isinstance(configured, dict):  # older files write the token with its flags
                configured = configured.get("content")
            candidates += [configured] if isinstance(configured, str) else []
        for token in [*candidates, *OTHER_EOS_TOKENS]:
            if token in vocabulary:
                return vocabulary[token]
        raise UserError(
            f"--tokenizer {path} has no end-of-document token; name it as eos_token in {config_path}"
        )

    def encode(self, text: str) -> list[int]:
        """See TextTokenizer."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See TextTokenizer."""
        return [
            encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: list[int]) -> str:
        """See TextTokenizer."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def find_tokenizer_file(path: Path) -> Path:
    """Return the file that defines the tokenizer at `path`. Raises UserError when there is none."""
    if path.is_dir():
        for name in TOKENIZER_FILES[:2]:
            if (path / name).is_file():
                return path / name
        raise UserError(f"--tokenizer {path} holds neither tokenizer.json nor tokenizer.model")
    if not path.is_file():
        raise UserError(
            f"--tokenizer {path} does not exist; give a tokenizer folder, tokenizer.json or .model file"
        )
    if path.suffix not in (".json", ".model"):
        raise UserError(
            f"--tokenizer {path} must be a folder, a tokenizer.json or a sentencepiece .model file"
        )
    return path


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Open a tokenizer.

    Args:
        path: a folder (its tokenizer.json, else its tokenizer.model), a `tokenizer.json`, or a `.model` file.

    Raises:
        UserError: nothing there, an unreadable file, or no end-of-document token.
    """
    file = find_tokenizer_file(Path(path))
    return HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


def copy_tokenizer(path: Path, folder: Path) -> None:
    """Copy the tokenizer's own files into a folder (nothing else: a model folder holds the weights too)."""
    file = find_tokenizer_file(path)
    folder.mkdir(parents=True, exist_ok=True)
    if file.name in TOKENIZER_FILES:
        for name in TOKENIZER_FILES:
            if (sibling := file.with_name(name)).is_file():
                shutil.copyfile(sibling, folder / name)
    else:
        shutil.copyfile(file, folder / f"tokenizer{file.suffix}")
