"""What a training run is: one frozen, typed object, checked before anything starts.

Every field has its meaning and unit under it; the command line and its `--help` are made from these classes
(`pretrain.recipes`). Nothing here imports torch, so a recipe is read and checked in milliseconds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

StageName = Literal["base", "idm", "policy"]

# A run folder holds these two files, and checkpoints/.
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the Llama base; the action modules reuse its width."""

    vocab_size: int
    """Rows of the embedding and of the output head, tokens."""
    hidden_size: int
    """Width H of the residual stream."""
    ffn_hidden_size: int
    """Width F of the SwiGLU MLPs."""
    num_layers: int
    """Decoder blocks of the base."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key/value heads (grouped-query attention)."""
    head_size: int
    """Width of one attention head."""
    rms_norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    rope_theta: float = 500000.0
    """Base of the rotary frequencies."""
    rope_scaling_factor: float | None = None
    """Factor of Llama 3.1's frequency scaling (low 1, high 4, original length 8192); null: no scaling."""
    max_position_embeddings: int = 8192
    """Longest context the exported model announces, tokens."""


@dataclass(frozen=True, kw_only=True)
class ActionConfig:
    """Latent actions: sizes and the two choices recorded in checkpoint and export."""

    num_actions: int = 64
    """Size K of the action set."""
    num_idm_layers: int = 4
    """Decoder blocks of the inverse dynamics model."""
    num_merge_layers: int = 2
    """Merge MLPs of the world model."""
    num_policy_layers: int = 8
    """Decoder blocks of the policy."""
    output: Literal["reference", "residual"] = "residual"
    """World-model output: reference = norm(state) - h as published; residual = state, which starts as the base."""
    assignment: Literal["gumbel", "vq"] = "gumbel"
    """How the IDM's output becomes an action: straight-through Gumbel-softmax, or nearest VQ code (ablation)."""
    temperature: float = 2.0
    """Gumbel-softmax temperature; shapes gradients only, never the distribution of sampled actions."""
    regulariser: Literal["token", "usage"] = "usage"
    """token: negative entropy of each relaxed sample (the paper's); usage: of the batch-mean action distribution."""
    regulariser_coefficient: float = 0.1
    """Weight of the regulariser in the loss (the paper: 0.001 with `token`)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from."""

    path: Path
    """Folder written by data_prep/blend.py."""
    sequence_length: int
    """Tokens a sample."""
    loader_workers: int = 0
    """Data-loader processes a rank; 0 loads in the training process."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then cosine to the minimum."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    min_learning_rate: float = 4e-5
    """Learning rate at the end of the decay."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up from zero."""
    decay_steps: int
    """Optimizer step at which the cosine reaches its minimum."""
    weight_decay: float = 0.01
    """Decoupled weight decay on everything trained, norms included, but never on the action codebook."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    clip_gradient_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and precision."""

    steps: int
    """Optimizer steps of the whole run, counted from its first start."""
    global_batch_size: int = 512
    """Sequences a step, over all ranks."""
    micro_batch_size: int = 4
    """Sequences a rank works on at once."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the forward and backward pass; master weights and losses are always fp32."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work; what tensor parallelism leaves over is data parallelism."""

    tensor_parallel_size: int = 1
    """Ranks that share every layer's tensors."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out loss during training, with argmax actions."""

    interval_steps: int = 1000
    """Steps between validations; one more follows the last step."""
    steps: int = 10
    """Global batches a validation reads, always the same ones."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save."""

    interval_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 3
    """Newest checkpoints kept; older ones are deleted after a new one is complete."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written while training."""

    interval_steps: int = 10
    """Steps averaged into one line of metrics.jsonl."""
    wandb: Literal["auto", "offline", "off"] = "auto"
    """Weights & Biases: auto = online where the user is logged in, else offline."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    stage: StageName
    """base: plain Llama; idm: IDM, codebook and merge on a frozen base; policy: the policy on both, frozen."""
    run_folder: Path
    """Everything the run writes: config, metrics, checkpoints."""
    start_from: Path | None = None
    """Run (or checkpoint) whose result is frozen here: a base run for idm, an idm run for policy."""
    seed: int = 42
    """Seed of initial weights, sample order and action noise."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    actions: ActionConfig = field(default_factory=ActionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def tokens_per_step(self) -> int:
        """Tokens one optimizer step reads, over all ranks."""
        return self.training.global_batch_size * self.data.sequence_length


def find_problems(config: RunConfig, world_size: int) -> list[str]:
    """Everything wrong with `config` on `world_size` ranks that can be told without reading files."""
    return [
        *_stage_problems(config),
        *_size_problems(config),
        *_optimizer_problems(config.optimizer),
        *_layout_problems(config, world_size),
    ]


def _stage_problems(config: RunConfig) -> Iterator[str]:
    if config.stage == "base" and config.start_from is not None:
        yield "start_from: a base run starts from random weights; leave the field out"
    if config.stage != "base" and config.start_from is None:
        before = "base" if config.stage == "idm" else "idm"
        yield f"start_from: stage '{config.stage}' needs the {before} run it builds on, e.g. runs/demo/{before}"
    if config.actions.assignment == "vq" and config.stage == "policy":
        yield "actions.assignment: a policy is trained on 'gumbel' actions only; 'vq' is an ablation of stage 'idm'"


def _size_problems(config: RunConfig) -> Iterator[str]:
    sections = {
        "model": config.model, "actions": config.actions, "training": config.training,
        "validation": config.validation, "checkpoint": config.checkpoint, "logging": config.logging,
    }  # fmt: skip
    for name, section in sections.items():
        for key, value in vars(section).items():
            if (
                key != "regulariser_coefficient"
                and isinstance(value, int | float)
                and not 0 < value < math.inf
            ):
                yield f"{name}.{key}: must be positive, got {value}"
    if not 0 <= config.actions.regulariser_coefficient < math.inf:
        yield f"actions.regulariser_coefficient: must be 0 or more, got {config.actions.regulariser_coefficient}"
    if config.data.sequence_length > config.model.max_position_embeddings:
        yield (
            f"data.sequence_length: {config.data.sequence_length} exceeds model.max_position_embeddings "
            f"{config.model.max_position_embeddings}, which the exported model announces"
        )
    if not 0 <= config.seed < 2**32:
        yield f"seed: must be from 0 to 2^32 - 1, got {config.seed}"
    if config.data.sequence_length < 2:
        yield f"data.sequence_length: needs at least 2 tokens, got {config.data.sequence_length}"
    if config.data.loader_workers < 0:
        yield f"data.loader_workers: must be 0 or more, got {config.data.loader_workers}"
    if config.model.head_size % 2:
        yield f"model.head_size: rotary positions need an even size, got {config.model.head_size}"
    if config.model.hidden_size % max(config.model.num_attention_heads, 1):
        yield (
            f"model.hidden_size: {config.model.hidden_size} is not a multiple of model.num_attention_heads "
            f"{config.model.num_attention_heads}, without which transformers refuses the exported model"
        )
    if config.model.num_attention_heads % max(config.model.num_key_value_heads, 1):
        yield (
            f"model.num_attention_heads: {config.model.num_attention_heads} query heads do not share "
            f"{config.model.num_key_value_heads} key/value heads evenly"
        )


def _optimizer_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    for key in ("learning_rate", "decay_steps", "epsilon", "clip_gradient_norm"):
        if not 0 < getattr(optimizer, key) < math.inf:
            yield f"optimizer.{key}: must be positive, got {getattr(optimizer, key)}"
    for key in ("min_learning_rate", "warmup_steps", "weight_decay"):
        if not 0 <= getattr(optimizer, key) < math.inf:
            yield f"optimizer.{key}: must be 0 or more, got {getattr(optimizer, key)}"
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, key) < 1:
            yield f"optimizer.{key}: must be at least 0 and below 1, got {getattr(optimizer, key)}"
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield "optimizer.min_learning_rate: is above optimizer.learning_rate"
    if optimizer.decay_steps <= optimizer.warmup_steps:
        yield (
            f"optimizer.decay_steps: {optimizer.decay_steps} must exceed "
            f"optimizer.warmup_steps {optimizer.warmup_steps}"
        )


def _layout_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    tensor_parallel_size = config.parallel.tensor_parallel_size
    if tensor_parallel_size < 1 or world_size % tensor_parallel_size:
        yield (
            f"parallel.tensor_parallel_size: {tensor_parallel_size} does not divide the {world_size} ranks "
            "launched; change it or torchrun's --nproc-per-node"
        )
        return
    shared = {
        "model.vocab_size": config.model.vocab_size,
        "model.ffn_hidden_size": config.model.ffn_hidden_size,
        "model.num_attention_heads": config.model.num_attention_heads,
        "model.num_key_value_heads": config.model.num_key_value_heads,
        "actions.num_actions": config.actions.num_actions,
    }
    for name, value in shared.items():
        if value % tensor_parallel_size:
            yield f"{name}: {value} is not divisible by parallel.tensor_parallel_size {tensor_parallel_size}"
    data_parallel_size = world_size // tensor_parallel_size
    at_once = config.training.micro_batch_size * data_parallel_size
    if at_once > 0 and config.training.global_batch_size % at_once:
        yield (
            f"training.global_batch_size: {config.training.global_batch_size} is not divisible by "
            f"training.micro_batch_size {config.training.micro_batch_size} x {data_parallel_size} data-parallel ranks"
        )
