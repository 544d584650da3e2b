"""The tokenizer libraries that were considered, behind one call: texts to a flat array of ids.

Each gets the fastest way in that gives the reference's tokens: control words in a document as plain text, no BOS,
no EOS, one thread.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.llama3_tokenizer import SPLIT_PATTERN, vocabulary_file
from data_prep.text_tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from data_prep.token_encoder import FastEncoder

Encode = Callable[[list[str]], np.ndarray]


def _flat(lists: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.array(ids, np.uint32) for ids in lists])


def open_fastokens(folder: Path) -> Encode:
    """fastokens, through the flat call that data_prep uses."""
    encoder = FastEncoder(folder / "tokenizer.json")
    return lambda texts: encoder.encode(texts).ids


def open_gigatoken(folder: Path) -> Encode:
    """gigatoken on the calling thread; it has no switch for control words, so it is given none to know."""
    import awkward
    from gigatoken.gigatoken_rs import load_hf_json

    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    tokenizer = load_hf_json(json.dumps(content))
    return lambda texts: awkward.to_numpy(awkward.flatten(tokenizer.encode_batch(texts, parallel=False)))


def open_tiktoken(folder: Path) -> Encode:
    """tiktoken with the ranks of the package `llama-models`; knows no other vocabulary."""
    import tiktoken

    source = vocabulary_file()
    assert source is not None, "llama-models is not installed"
    lines = (line.split() for line in source.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    encoding = tiktoken.Encoding("llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: _flat([encoding.encode_ordinary(text) for text in texts])


def open_tokenizers(folder: Path) -> Encode:
    """tokenizers: the reference for every tokenizer.json."""
    tokenizer = HuggingFaceTokenizer(folder / "tokenizer.json")
    return lambda texts: _flat(tokenizer.encode_batch(texts))


def open_sentencepiece(folder: Path) -> Encode:
    """sentencepiece: the reference for every .model."""
    model = SentencePieceTokenizer(folder / "tokenizer.model")
    return lambda texts: _flat(model.encode_batch(texts))


BYTE_LEVEL_ENGINES: dict[str, Callable[[Path], Encode]] = {
    "fastokens": open_fastokens,
    "gigatoken": open_gigatoken,
    "tiktoken": open_tiktoken,
    "tokenizers": open_tokenizers,
}
SENTENCEPIECE_ENGINES: dict[str, Callable[[Path], Encode]] = {
    "fastokens": open_fastokens,
    "gigatoken": open_gigatoken,
    "sentencepiece": open_sentencepiece,
    "tokenizers": open_tokenizers,
}
