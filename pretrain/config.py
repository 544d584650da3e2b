"""What a training run is: one frozen, typed object, checked before anything starts.

Every field has its meaning and unit under it; the command line and its `--help` are made from these classes
(`pretrain.recipes`). Nothing here imports torch, so a recipe is read and checked in milliseconds.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

StageName = Literal["base", "idm", "policy"]

# What a run folder holds, besides checkpoints/.
CONFIG_FILE = "config.yaml"
LOGS_FOLDER = "logs"
METRICS_FILE = "metrics.jsonl"
HISTORY_FILE = "history.jsonl"
ENVIRONMENT_FILE = "environment.json"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the Llama base; the action modules reuse its width."""

    vocab_size: int
    """Tokens there are; each has a row in the embedding and one in the output head."""
    vocab_padding: int = 0
    """Rows at the end of embedding and head that are no tokens, so that tensor-parallel ranks share them evenly; they
    never get probability."""
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
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2.5), in every block."""
    tied_embeddings: bool = False
    """The output head is the transposed embedding (small Qwen2.5 and Llama 3.2)."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output head."""
        return self.vocab_size + self.vocab_padding


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
    base_micro_batch_size: int | None = None
    """Sequences at once through the frozen base, which stores nothing; null: micro_batch_size."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the forward and backward pass; master weights and losses are always fp32."""
    fp8: Literal["off", "tensorwise", "delayed", "blockwise"] = "off"
    """FP8 recipe of the trained parts' linear layers; needs Transformer Engine and a GPU of compute capability 9."""
    base_fp8: Literal["off", "tensorwise", "blockwise"] = "off"
    """FP8 recipe of the frozen base, its weights quantised once; off keeps it in `precision`."""
    deterministic: bool = False
    """Bit-identical reruns: deterministic kernels only, at some cost in speed."""


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """What happens when a step goes wrong, or nothing happens at all."""

    bad_step: Literal["stop", "skip", "roll_back"] = "skip"
    """What follows a step whose loss or gradient is not finite, or whose loss spikes: the end of the run; the next
    step, the optimizer unmoved; or the last checkpoint, to go on from there with the data after the bad step."""
    max_bad_steps: int = 3
    """Bad steps in a row that are skipped, or roll-backs without a new checkpoint in between; one more ends the run."""
    spike_factor: float | None = None
    """A training loss above this multiple of the median of the last 64 is a bad step; null: only what is not finite."""
    hang_seconds: int = 300
    """Seconds without progress after which a rank writes the stacks of its threads to its log and ends the run."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work; what tensor and pipeline parallelism leave over is data parallelism."""

    tensor_parallel_size: int = 1
    """Ranks that share every layer's tensors."""
    sequence_parallel: bool = False
    """Share norms and residual streams along the sequence too, over the tensor-parallel ranks."""
    pipeline_parallel_size: int = 1
    """Pipeline stages: ranks that hold consecutive layers."""
    pipeline_layout: str | None = None
    """Layers of each pipeline stage, e.g. "base*28 | base*4 idm*4", a half being a block's attention or its MLP; null:
    by the FLOPs of the layers."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out loss during training, with argmax actions."""

    interval_steps: int = 1000
    """Steps between validations; one more follows the last step."""
    steps: int = 10
    """Global batches a validation reads, always the same ones."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what."""

    interval_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 3
    """Newest checkpoints kept; older ones are deleted after a new one is complete."""
    keep_every_steps: int | None = None
    """Checkpoints of multiples of this many steps are kept for good; null: none."""
    write_timeout_seconds: int = 1800
    """Seconds after which writing a checkpoint in the background counts as failed, and is tried again."""
    self_contained: bool = False
    """Put the frozen parts in too, so that a checkpoint needs no other."""


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
    init_from: Path | None = None
    """Checkpoint whose weights the trained parts begin with, e.g. released ones, converted; null: random weights."""
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
    faults: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def tokens_per_step(self) -> int:
        """Tokens one optimizer step reads, over all ranks."""
        return self.training.global_batch_size * self.data.sequence_length
