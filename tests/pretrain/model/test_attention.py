"""The core attention is causal softmax attention with grouped heads.

Shapes: S sequence, B batch, N query heads, G key/value heads, D head size.
"""

import math
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from pretrain.model.attention import ScaledDotProductCoreAttention
from pretrain.model.specs import transformer_config
from tests.pretrain.tiny_runs import tiny_recipe

S, B, N, G, D = 6, 2, 4, 2, 8


def random_inputs() -> list[torch.Tensor]:
    """Query, key and value as Megatron hands them over."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(S, B, N, D), (S, B, G, D), (S, B, G, D)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def explicit_attention(fault: str = "none") -> torch.Tensor:
    """Position by position, head by head; a query head reads the key/value head of its group."""
    query_SBND, key_SBGD, value_SBGD = random_inputs()
    scale = 1.0 if fault == "no scale" else 1 / math.sqrt(D)
    context_SBND = torch.empty_like(query_SBND)
    for head in range(N):
        group = head % G if fault == "heads dealt out in turn" else head // (N // G)
        for position in range(S):
            seen = slice(0, S if fault == "not causal" else position + 1)
            scores_TB = (query_SBND[position, :, head] * key_SBGD[seen, :, group]).sum(-1) * scale
            weights_TB1 = torch.softmax(scores_TB, dim=0)[..., None]
            context_SBND[position, :, head] = (weights_TB1 * value_SBGD[seen, :, group]).sum(0)
    return context_SBND.flatten(2)


def attention() -> torch.Tensor:
    """What the module under test gives."""
    config = transformer_config(tiny_recipe("base", Path("run"), Path("data")), "world_model")
    module = ScaledDotProductCoreAttention(config, 1, AttnMaskType.causal, "self")
    return module(*random_inputs(), attention_mask=None)


def test_it_is_explicit_causal_attention_with_grouped_heads() -> None:
    torch.testing.assert_close(attention(), explicit_attention(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fault", ["not causal", "heads dealt out in turn", "no scale"])
def test_other_attention_is_far_off(fault: str) -> None:
    """The fault twins."""
    found, faulty = attention(), explicit_attention(fault)
    assert float((found - faulty).norm() / found.norm()) > 0.1
