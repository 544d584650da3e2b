"""Sizes and choices of the plain CoLA: what its model, losses and trainer need and nothing else."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["base", "idm", "policy"]


@dataclass(frozen=True, kw_only=True)
class PlainSizes:
    """A Llama base and the action modules of its width."""

    vocab_size: int
    """Rows of the embedding and of the head, tokens."""
    hidden_size: int
    """Width H of the residual stream."""
    ffn_hidden_size: int
    """Width F of the SwiGLU MLPs."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key/value heads."""
    head_size: int
    """Width of one attention head."""
    rms_norm_epsilon: float
    """Added to the mean square in every RMSNorm."""
    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling_factor: float | None
    """Factor of Llama 3.1's frequency scaling; None: no scaling."""
    qkv_bias: bool
    """Bias on queries, keys and values, as Qwen2.5 has."""
    tied_embeddings: bool
    """The head is the embedding."""
    num_layers: int
    """Blocks of the base."""
    num_idm_layers: int
    """Blocks of the inverse dynamics model."""
    num_merge_layers: int
    """Merge MLPs of the world model."""
    num_policy_layers: int
    """Blocks of the policy."""
    num_actions: int
    """Size A of the action set."""


@dataclass(frozen=True, kw_only=True)
class PlainMethod:
    """How actions are chosen and used (docs/method.md)."""

    output: Literal["reference", "residual"]
    """The head reads norm(state) - h (reference) or the state (residual)."""
    temperature: float
    """Of the Gumbel-softmax whose gradient the chosen action passes on."""
    regulariser: Literal["token", "usage"]
    """Entropy of each relaxed choice, or of the batch's mean distribution."""
    regulariser_coefficient: float
    """Weight of the regulariser in the loss."""


@dataclass(frozen=True, kw_only=True)
class PlainOptimizer:
    """AdamW, its schedule and clipping."""

    learning_rate: float
    """Peak learning rate."""
    min_learning_rate: float
    """Learning rate from `decay_steps` on."""
    warmup_steps: int
    """Optimizer steps of linear warm-up; the first one has 1 / warmup_steps of the peak."""
    decay_steps: int
    """Optimizer step at which the cosine reaches its minimum."""
    weight_decay: float
    """Decoupled weight decay of everything trained but the codebook."""
    beta1: float
    """Decay of the first moment."""
    beta2: float
    """Decay of the second moment."""
    epsilon: float
    """Added to the root of the second moment."""
    clip_gradient_norm: float
    """Largest global gradient norm."""
