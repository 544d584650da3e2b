"""Llama's decoder blocks in plain PyTorch: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Modules are named as in published Llama checkpoints. Shapes: B batch, S sequence, H hidden, N query heads, G key/value
heads, D head size, F MLP width.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.plain_cola.settings import PlainSizes

Rotary = tuple[torch.Tensor, torch.Tensor]

# Llama 3.1: frequencies with fewer than LOW turns in the original context are divided, those with more than HIGH kept.
ORIGINAL_CONTEXT_TOKENS = 8192
LOW_TURNS, HIGH_TURNS = 1, 4


def rotary_frequencies(sizes: PlainSizes) -> torch.Tensor:
    """Radians a token of each pair of channels, [D / 2], fp32."""
    exponents = torch.arange(0, sizes.head_size, 2, dtype=torch.float32) / sizes.head_size
    # In fp32 and in this order, as Llama's other implementations: at position p a rounding counts p times.
    frequencies = 1 / sizes.rope_theta**exponents
    if sizes.rope_scaling_factor is None:
        return frequencies
    turns = ORIGINAL_CONTEXT_TOKENS * frequencies / (2 * math.pi)
    kept = ((turns - LOW_TURNS) / (HIGH_TURNS - LOW_TURNS)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / sizes.rope_scaling_factor)


def rotary_tables(frequencies: torch.Tensor, sequence_length: int) -> Rotary:
    """Cosines and sines [S, D] of positions 0..S-1, channel i paired with channel i + D / 2."""
    positions_S = torch.arange(sequence_length, device=frequencies.device, dtype=torch.float32)
    angles_SD = torch.outer(positions_S, frequencies).repeat(1, 2)
    return angles_SD.cos(), angles_SD.sin()


def rotate(heads_BNSD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn each pair of channels by its angle; same shape and dtype."""
    cosine_SD, sine_SD = (table.to(heads_BNSD.dtype) for table in rotary)
    first, second = heads_BNSD.chunk(2, dim=-1)
    return heads_BNSD * cosine_SD + torch.cat([-second, first], dim=-1) * sine_SD


class Norm(nn.RMSNorm):
    """RMSNorm in the dtype of its input; mixed dtypes would miss the fused kernel."""

    def forward(self, state_BSH: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype."""
        return F.rms_norm(state_BSH, self.normalized_shape, self.weight.to(state_BSH.dtype), self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, sizes: PlainSizes) -> None:
        super().__init__()
        self.head_size = sizes.head_size
        query_size = sizes.num_attention_heads * sizes.head_size
        key_size = sizes.num_key_value_heads * sizes.head_size
        self.q_proj = nn.Linear(sizes.hidden_size, query_size, bias=sizes.qkv_bias)
        self.k_proj = nn.Linear(sizes.hidden_size, key_size, bias=sizes.qkv_bias)
        self.v_proj = nn.Linear(sizes.hidden_size, key_size, bias=sizes.qkv_bias)
        self.o_proj = nn.Linear(query_size, sizes.hidden_size, bias=False)

    def forward(self, state_BSH: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """What the positions before and at each one contribute, [B, S, H]."""
        query_BNSD, key_BGSD, value_BGSD = (
            projection(state_BSH).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        context_BNSD = F.scaled_dot_product_attention(
            rotate(query_BNSD, rotary), rotate(key_BGSD, rotary), value_BGSD, is_causal=True, enable_gqa=True
        )
        return self.o_proj(context_BNSD.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU; `input_size` is 2H where it reads [state; action]."""

    def __init__(self, sizes: PlainSizes, input_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(input_size, sizes.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(input_size, sizes.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(sizes.ffn_hidden_size, sizes.hidden_size, bias=False)

    def forward(self, input_BSI: torch.Tensor) -> torch.Tensor:
        """W_down(silu(W_gate x) * W_up x), [B, S, H]."""
        return self.down_proj(F.silu(self.gate_proj(input_BSI)) * self.up_proj(input_BSI))


class Block(nn.Module):
    """A pre-norm decoder block."""

    def __init__(self, sizes: PlainSizes) -> None:
        super().__init__()
        self.input_layernorm = Norm(sizes.hidden_size, sizes.rms_norm_epsilon)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = Norm(sizes.hidden_size, sizes.rms_norm_epsilon)
        self.mlp = Mlp(sizes, sizes.hidden_size)

    def forward(self, state_BSH: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """The residual stream [B, S, H] after attention and MLP."""
        state_BSH = state_BSH + self.self_attn(self.input_layernorm(state_BSH), rotary)
        return state_BSH + self.mlp(self.post_attention_layernorm(state_BSH))


def run_blocks(
    blocks: nn.ModuleList, state_BSH: torch.Tensor, rotary: Rotary, activation_checkpointing: bool
) -> torch.Tensor:
    """All blocks in a row; with checkpointing, the backward pass computes each block's activations again."""
    for block in blocks:
        if activation_checkpointing and torch.is_grad_enabled():
            state_BSH = checkpoint(block, state_BSH, rotary, use_reentrant=False)
        else:
            state_BSH = block(state_BSH, rotary)
    return state_BSH
