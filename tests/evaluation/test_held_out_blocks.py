"""Held-out blocks and prompts are the shards' own tokens, shared out by weight."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.blended_data import BlendedData, open_blend
from data_prep.errors import UserError
from evaluation.held_out_blocks import check_fit, document_prompts, held_out_blocks, open_stream, share_blocks
from evaluation.huggingface_model import ExportedModel
from tests.evaluation.tiny_demo import DOCUMENT_TOKENS, DOCUMENTS, EOS_ID, WEIGHTS


@pytest.fixture(scope="module")
def data(demo_folder: Path) -> BlendedData:
    return open_blend(demo_folder / "data")


@pytest.mark.parametrize("blocks", [1, 5, 10, 63, 64])
def test_blocks_are_shared_by_weight(blocks: int) -> None:
    shares = share_blocks({"a": 0.5, "b": 0.3, "c": 0.2, "unused": 0.0}, blocks)
    assert set(shares) == {"a", "b", "c"}
    assert min(shares.values()) >= 1
    if blocks >= 5:
        assert sum(shares.values()) == blocks
        for source, weight in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
            assert abs(shares[source] - weight * blocks) < 1


def test_blocks_are_tokens_of_the_shard(data: BlendedData) -> None:
    blocks = held_out_blocks(data, sequence_length=10, tokens=300)
    assert {source: len(tokens_NS) for source, tokens_NS in blocks.items()} == {
        source: round(weight * 30) for source, weight in WEIGHTS.items()
    }
    for source, tokens_NS in blocks.items():
        stream, _ = open_stream(data, source)
        grid = torch.from_numpy(stream[: len(stream) // 10 * 10].astype("int64")).view(-1, 10)
        rows = [int((grid == block_S).all(1).nonzero()[0]) for block_S in tokens_NS]
        assert rows == sorted(set(rows)), "no block twice"
        assert rows[-1] > len(grid) // 2, "spread over the shard"


def test_a_shard_that_is_too_short_is_refused(data: BlendedData) -> None:
    with pytest.raises(UserError, match=r"validation.slimpajama: holds \d+ blocks of 10 tokens.*--tokens"):
        held_out_blocks(data, sequence_length=10, tokens=10_000)


def test_prompts_are_beginnings_of_documents(data: BlendedData, exported: ExportedModel) -> None:
    prompts = document_prompts(data, exported.tokenizer, prompt_tokens=7, per_source=2)
    assert [prompt.source for prompt in prompts] == [source for source in WEIGHTS for _ in range(2)]
    for prompt in prompts:
        stream, _ = open_stream(data, prompt.source)
        documents = torch.from_numpy(stream.astype("int64")).view(DOCUMENTS, DOCUMENT_TOKENS + 1)
        assert prompt.tokens in documents[:, :7].tolist()
        assert EOS_ID not in prompt.tokens
        assert prompt.text == exported.tokenizer.decode(prompt.tokens)
    with pytest.raises(UserError, match="only 0 documents"):
        document_prompts(data, exported.tokenizer, prompt_tokens=DOCUMENT_TOKENS, per_source=1)


def test_data_of_another_tokenizer_or_size_are_refused(data: BlendedData, exported: ExportedModel) -> None:
    check_fit(data, exported, 128)
    with pytest.raises(UserError, match="another tokenizer"):
        check_fit(replace(data, tokenizer_fingerprint="other"), exported, 128)
    with pytest.raises(UserError, match="vocabulary of 5000"):
        check_fit(replace(data, vocab_size=5000), exported, 128)
    with pytest.raises(UserError, match="at most"):
        check_fit(data, exported, exported.model.config.max_position_embeddings + 1)
    with pytest.raises(UserError, match="no validation shard of wudao"):
        open_stream(replace(data, validation_prefixes={}), "wudao")
