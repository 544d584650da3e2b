"""Llama 3's tokenizer as a tokenizer.json, made from the tiktoken list in the PyPI package `llama-models`.

    python benchmarks/llama3_tokenizer.py --output runs/bench/tokenizer

Benchmarks and optional tests need the real vocabulary of 128,256 tokens. Nothing of it is part of the project.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import tyro
from tokenizers import AddedToken, Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from data_prep.errors import UserError, run_cli
from data_prep.output_files import new_folder, write_json_whole

SPECIAL_TOKENS = 256
# In the order of their ids; the places between and after them are reserved.
NAMED_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
# How a text is cut before byte pairs are merged: contractions, words, up to three digits, signs, white space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class Llama3TokenizerConfig:
    """Make a tokenizer.json of Llama 3's vocabulary."""

    output: Path = Path("runs/bench/tokenizer")
    """Folder to make."""


def vocabulary_file() -> Path | None:
    """The tiktoken list in the package `llama-models`; None where that, or tiktoken to read it, is missing."""
    package = importlib.util.find_spec("llama_models")
    if package is None or not package.submodule_search_locations or not importlib.util.find_spec("tiktoken"):
        return None
    return Path(package.submodule_search_locations[0]) / "llama3" / "tokenizer.model"


def special_tokens() -> list[str]:
    """The 256 control tokens, in the order of their ids."""
    names, reserved = [], 0
    for place in range(SPECIAL_TOKENS):
        if place in NAMED_TOKENS:
            names.append(NAMED_TOKENS[place])
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def make_llama3_tokenizer(output: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises UserError without the package `llama-models`."""
    source = vocabulary_file()
    if source is None:
        raise UserError("llama-models or tiktoken is not installed; pip install -r requirements-bench.txt")
    tokenizer: Tokenizer = TikTokenConverter(vocab_file=str(source), pattern=SPLIT_PATTERN).converted()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in special_tokens()]
    )
    with new_folder(
        output, overwrite=True, is_ours=lambda path: (path / "tokenizer.json").is_file()
    ) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json_whole(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": NAMED_TOKENS[1]},
        )


def main() -> None:
    """Entry point."""
    make_llama3_tokenizer(tyro.cli(Llama3TokenizerConfig, description=__doc__).output)


if __name__ == "__main__":
    run_cli(main)
