"""Texts to one flat array of token ids, with the fastest engine that is exact, checked against the reference.

The reference is the tokenizer's own library (`tokenizers`, `sentencepiece`). The engine is `fastokens`: with Llama 3's
vocabulary the fastest that is exact, on English, code, mathematics and Chinese (docs/benchmarks.md). With a
sentencepiece vocabulary gigatoken is up to twice as fast, but it cannot be told to leave control words in a document as
text, and one engine is simpler than two. fastokens reads tokenizer.json only; a lone sentencepiece .model is left to
its own library.
"""

from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import fastokens
import numpy as np

from data_prep.errors import IntegrityError, UserError
from data_prep.text_tokenizer import PROBE_TEXT, TextTokenizer, find_tokenizer_file

Engine = Literal["fast", "reference"]

CHECKED_FIRST_DOCUMENTS = 4
CHECKED_EVERY_DOCUMENTS = 2048
MAX_CHECKED_CHARACTERS = 1 << 17


class TokenBatch(NamedTuple):
    """Tokens of several texts, one after another, without any EOS."""

    ids: np.ndarray
    """[tokens] uint32."""
    offsets: np.ndarray
    """[texts + 1] int64: text i has the ids from offsets[i] to offsets[i + 1]."""


class TokenEncoder(Protocol):
    """What tokenizing a corpus asks of an engine."""

    is_reference: bool
    """Whether it is the tokenizer's own library, so that there is nothing to check it against."""

    def encode(self, texts: list[str]) -> TokenBatch:
        """Return the ids of each text: no BOS, no EOS, control words as plain text."""
        ...


class ReferenceEncoder:
    """The tokenizer's own library."""

    is_reference = True

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> TokenBatch:
        """See TokenEncoder."""
        parts = [np.array(ids, dtype=np.uint32) for ids in self._tokenizer.encode_batch(texts)]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return TokenBatch(np.concatenate([np.empty(0, np.uint32), *parts]), offsets)


class FastEncoder:
    """fastokens: the same ids, tens of times as fast, in one flat array instead of a list a text."""

    is_reference = False

    def __init__(self, path: Path) -> None:
        """Args: path: a tokenizer.json. Raises UserError when fastokens cannot read it."""
        try:
            self._tokenizer = fastokens.Tokenizer.from_file(str(path))
        except ValueError as error:
            raise UserError(
                f"--tokenizer {path} has parts that fastokens does not know ({error}); pass --engine reference"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: list[str]) -> TokenBatch:
        """See TokenEncoder."""
        ids, offsets = self._tokenizer.encode_batch_flat(texts, split_special_tokens=True)
        return TokenBatch(np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.int64))


def open_encoder(path: Path, tokenizer: TextTokenizer, engine: Engine) -> TokenEncoder:
    """Open the engine for the tokenizer at `path`, of which `tokenizer` is the reference.

    Raises:
        UserError: the fast engine cannot read the tokenizer.
        IntegrityError: it gives other tokens on a probe.
    """
    file = find_tokenizer_file(path)
    if engine == "reference" or file.suffix != ".json":
        return ReferenceEncoder(tokenizer)
    encoder = FastEncoder(file)
    if encoder.encode([PROBE_TEXT]).ids.tolist() != tokenizer.encode(PROBE_TEXT):
        raise IntegrityError(
            f"--tokenizer {path}: the fast engine gives other tokens than the reference; pass --engine reference"
        )
    return encoder


class SampleCheck:
    """Compares a sample of a file's documents with the reference: the first ones, then every 2,048th."""

    def __init__(self, tokenizer: TextTokenizer, file: Path) -> None:
        """Args: tokenizer: the reference. file: the input file, for the message."""
        self._tokenizer = tokenizer
        self._file = file
        self._seen_documents = 0
        self.checked_documents = 0

    def check(self, texts: list[str], batch: TokenBatch) -> None:
        """Compare those documents of a batch that belong to the sample.

        Raises:
            IntegrityError: at the first document whose tokens differ.
        """
        first = self._seen_documents
        self._seen_documents += len(texts)
        chosen = [*range(first, min(CHECKED_FIRST_DOCUMENTS, first + len(texts)))]
        chosen += range(
            max(-(-first // CHECKED_EVERY_DOCUMENTS), 1) * CHECKED_EVERY_DOCUMENTS,
            first + len(texts),
            CHECKED_EVERY_DOCUMENTS,
        )
        for document in chosen:
            text = texts[document - first]
            if len(text) <= MAX_CHECKED_CHARACTERS:
                begin, end = batch.offsets[document - first : document - first + 2]
                self._compare(document, batch.ids[begin:end].tolist(), self._tokenizer.encode(text))
                self.checked_documents += 1

    def _compare(self, document: int, ids: list[int], reference_ids: list[int]) -> None:
        if ids == reference_ids:
            return
        pairs = enumerate(zip(ids, reference_ids, strict=False))
        place = next(
            (index for index, (ours, theirs) in pairs if ours != theirs), min(len(ids), len(reference_ids))
        )
        raise IntegrityError(
            f"{self._file}: document {document + 1}: token {place + 1} of the fast engine is not the reference "
            f"tokenizer's; nothing of this file was kept: pass --engine reference, and report the text to fastokens"
        )
