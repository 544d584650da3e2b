"""Held-out text from the validation shards of a blend: blocks to score, beginnings of documents to continue.

Everything is a pure function of the shards: the same data give the same blocks and prompts.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from data_prep.blended_data import BlendedData
from data_prep.errors import UserError
from data_prep.indexed_shards import bin_path, read_index
from data_prep.text_tokenizer import load_tokenizer
from evaluation.continuations import Prompt
from evaluation.huggingface_model import ExportedModel, decode

# N blocks, S tokens of a block.

DEFAULT_SEQUENCE_LENGTH = 128


def check_fit(data: BlendedData, exported: ExportedModel, length_tokens: int) -> None:
    """`UserError` unless the model knows the data's tokenizer and texts of `length_tokens`."""
    config = exported.model.config
    remedy = "give the --data that the model was trained on"
    if data.vocab_size > config.vocab_size:
        raise UserError(
            f"{data.folder}: has a vocabulary of {data.vocab_size}, the model {exported.folder} only of "
            f"{config.vocab_size}; {remedy}"
        )
    if load_tokenizer(exported.folder).fingerprint != data.tokenizer_fingerprint:
        raise UserError(f"{data.folder}: made with another tokenizer than {exported.folder} holds; {remedy}")
    if length_tokens > config.max_position_embeddings:
        raise UserError(
            f"{exported.folder}: made for at most {config.max_position_embeddings} tokens at once, "
            f"{length_tokens} are asked for; choose shorter blocks or continuations"
        )


def share_blocks(weights: Mapping[str, float], blocks: int) -> dict[str, int]:
    """Divide `blocks` among sources in proportion to their weights (largest remainder), at least one each."""
    total = sum(weights.values())
    exact = {source: blocks * weight / total for source, weight in weights.items() if weight > 0}
    shares = {source: int(wanted) for source, wanted in exact.items()}
    by_remainder = sorted(exact, key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: blocks - sum(shares.values())]:
        shares[source] += 1
    return {source: max(1, share) for source, share in shares.items()}


def held_out_blocks(data: BlendedData, *, sequence_length: int, tokens: int) -> dict[str, torch.Tensor]:
    """About `tokens` held-out tokens as {source: [N, S] int64}, sources in proportion to the blend's weights.

    A source's blocks lie evenly over its validation shard; like training samples they run across the ends of
    documents. `UserError` where a shard is too short.
    """
    blocks = {}
    for source, wanted in share_blocks(data.weights, tokens // sequence_length).items():
        stream, _ = open_stream(data, source)
        available = len(stream) // sequence_length
        if available < wanted:
            raise UserError(
                f"{data.validation_prefixes[source]}: holds {available} blocks of {sequence_length} tokens, "
                f"{wanted} are wanted; ask for fewer --tokens or blend more validation data"
            )
        chosen = np.arange(wanted) * available // wanted
        grid = stream[: available * sequence_length].reshape(available, sequence_length)
        blocks[source] = torch.from_numpy(grid[chosen].astype(np.int64))
    return blocks


def document_prompts(
    data: BlendedData, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, per_source: int
) -> list[Prompt]:
    """The first `prompt_tokens` tokens of `per_source` held-out documents of each source.

    The documents lie evenly over the shard and go on after the prompt; `UserError` where there are too few.
    """
    prompts = []
    for source in share_blocks(data.weights, 0):
        stream, lengths_tokens = open_stream(data, source)
        starts = np.cumsum(lengths_tokens, dtype=np.int64) - lengths_tokens
        long_enough = starts[lengths_tokens > prompt_tokens + 1]
        if len(long_enough) < per_source:
            raise UserError(
                f"{data.validation_prefixes[source]}: only {len(long_enough)} documents go on after "
                f"{prompt_tokens} tokens; ask for shorter --prompt-tokens or fewer --prompts-per-source"
            )
        for start in long_enough[np.arange(per_source) * len(long_enough) // per_source]:
            ids = stream[start : start + prompt_tokens].tolist()
            prompts.append(Prompt(source=source, text=decode(tokenizer, ids), tokens=ids))
    return prompts


def open_stream(data: BlendedData, source: str) -> tuple[np.ndarray, np.ndarray]:
    """A source's validation tokens in one row, read on demand, and the lengths of its documents."""
    if source not in data.validation_prefixes:
        raise UserError(f"{data.folder}: has no validation shard of {source}; blend the data anew")
    prefix = Path(data.validation_prefixes[source])
    index = read_index(prefix)
    if index.tokens == 0:
        raise UserError(f"{prefix}: holds no tokens; blend more validation data")
    return np.memmap(bin_path(prefix), dtype=index.dtype, mode="r"), index.lengths_tokens
