"""Everything that can be wrong with a recipe and be told from it alone, all at once, each with its remedy."""

import math
from collections.abc import Iterator

from data_prep.errors import UserError
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.placement import chain_layers, place_layers

MAY_BE_ZERO = ("regulariser_coefficient", "vocab_padding")


def refuse(problems: list[str]) -> None:
    """Raise one error that lists all `problems`, if there are any."""
    if problems:
        raise UserError(f"{len(problems)} problem(s) in this run: " + "; ".join(problems))


def find_problems(config: RunConfig, world_size: int) -> list[str]:
    """Everything wrong with `config` on `world_size` ranks that can be told without reading files."""
    return [
        *_stage_problems(config),
        *_size_problems(config),
        *_optimizer_problems(config.optimizer),
        *_precision_problems(config),
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
        "validation": config.validation, "checkpoint": config.checkpoint, "faults": config.faults,
        "logging": config.logging,
    }  # fmt: skip
    for name, section in sections.items():
        for key, value in vars(section).items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if key in MAY_BE_ZERO and not 0 <= value < math.inf:
                yield f"{name}.{key}: must be 0 or more, got {value}"
            if key not in MAY_BE_ZERO and not 0 < value < math.inf:
                yield f"{name}.{key}: must be positive, got {value}"
    if config.faults.spike_factor is not None and config.faults.spike_factor <= 1:
        yield f"faults.spike_factor: must be above 1, got {config.faults.spike_factor}; null switches it off"
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
    parallel = config.parallel
    tensor_size, pipeline_size = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    if min(tensor_size, pipeline_size) < 1 or world_size % (tensor_size * pipeline_size):
        yield (
            f"parallel.tensor_parallel_size: {tensor_size} x parallel.pipeline_parallel_size {pipeline_size} does not "
            f"divide the {world_size} ranks launched; change them or the launcher's --ranks-per-node"
        )
        return
    shared = {
        "model.ffn_hidden_size": config.model.ffn_hidden_size,
        "model.num_attention_heads": config.model.num_attention_heads,
        "model.num_key_value_heads": config.model.num_key_value_heads,
        "actions.num_actions": config.actions.num_actions,
    }
    if parallel.sequence_parallel:
        shared["data.sequence_length"] = config.data.sequence_length
        if tensor_size == 1:
            yield (
                "parallel.sequence_parallel: shares the sequence over tensor-parallel ranks, of which there is one; "
                "raise parallel.tensor_parallel_size or switch it off"
            )
    for name, value in shared.items():
        if value % tensor_size:
            yield f"{name}: {value} is not divisible by parallel.tensor_parallel_size {tensor_size}"
    if config.model.padded_vocab_size % tensor_size:
        yield (
            f"model.vocab_padding: {config.model.vocab_size} tokens + {config.model.vocab_padding} rows are not "
            f"divisible by parallel.tensor_parallel_size {tensor_size}; re-import the base with "
            f"hf_to_megatron.py --pad-vocabulary-to-multiple-of {tensor_size} (a base trained from scratch: "
            f"set model.vocab_padding to {-config.model.vocab_size % tensor_size})"
        )
    yield from _pipeline_problems(config)
    yield from _batch_problems(config, world_size // (tensor_size * pipeline_size))


def _pipeline_problems(config: RunConfig) -> Iterator[str]:
    size = config.parallel.pipeline_parallel_size
    layers = sum(chain_layers(config))
    if config.parallel.pipeline_layout is None and layers < size:
        yield f"parallel.pipeline_parallel_size: {size} stages for {layers} layers; lower it"
        return
    try:
        placement = place_layers(config)
    except ValueError as error:
        yield f"parallel.pipeline_layout: {error}"
        return
    if config.stage == "base" and placement.stages[-1].base == 0:
        yield "parallel.pipeline_layout: the last stage of a base run must hold base layers"
    if config.stage == "policy" and placement.stages[-1].policy == 0:
        yield "parallel.pipeline_layout: the last stage of a policy run must hold policy layers"
    if config.model.tied_embeddings and config.stage == "base" and size > 1:
        yield (
            "parallel.pipeline_parallel_size: tied embeddings are trained on one pipeline stage only; "
            "set it to 1 or model.tied_embeddings to false"
        )


def _batch_problems(config: RunConfig, data_parallel_size: int) -> Iterator[str]:
    training = config.training
    at_once = training.micro_batch_size * data_parallel_size
    if at_once > 0 and training.global_batch_size % at_once:
        yield (
            f"training.global_batch_size: {training.global_batch_size} is not divisible by "
            f"training.micro_batch_size {training.micro_batch_size} x {data_parallel_size} data-parallel ranks"
        )
    base_size = training.base_micro_batch_size
    if base_size is None or base_size < 1 or at_once < 1:
        return
    if base_size % training.micro_batch_size or training.global_batch_size % (base_size * data_parallel_size):
        yield (
            f"training.base_micro_batch_size: {base_size} must be a multiple of training.micro_batch_size "
            f"{training.micro_batch_size} and divide the {training.global_batch_size // data_parallel_size} sequences "
            "of a rank's step"
        )
    if config.stage == "base" or config.parallel.pipeline_parallel_size > 1:
        yield (
            "training.base_micro_batch_size: a frozen base runs apart only where one pipeline stage holds all of it; "
            "leave it out"
        )


def _precision_problems(config: RunConfig) -> Iterator[str]:
    training = config.training
    chosen = {"training.fp8": training.fp8, "training.base_fp8": training.base_fp8}
    for name, recipe in chosen.items():
        if recipe != "off" and training.precision != "bf16":
            yield f"{name}: {recipe} needs training.precision bf16, got {training.precision}"
    if config.stage == "base" and training.base_fp8 != "off":
        yield "training.base_fp8: is for a frozen base; a base run's own recipe is training.fp8"
    if training.base_fp8 != "off" and config.checkpoint.self_contained:
        yield (
            f"checkpoint.self_contained: training.base_fp8 {training.base_fp8} leaves no exact base in memory to save; "
            "switch one of them off"
        )
    if training.base_fp8 != "off" and training.fp8 not in ("off", training.base_fp8):
        yield (
            f"training.base_fp8: {training.base_fp8} beside training.fp8 {training.fp8}: one Transformer Engine "
            "recipe a run; choose the same, or off for one of them"
        )
    if any(recipe != "off" for recipe in chosen.values()):
        multiple = 128 if "blockwise" in chosen.values() else 16
        model, parallel = config.model, config.parallel
        ranks = max(parallel.tensor_parallel_size, 1)
        sizes = {
            "model.hidden_size": model.hidden_size,
            "model.ffn_hidden_size / parallel.tensor_parallel_size": model.ffn_hidden_size // ranks,
            "model.num_attention_heads * model.head_size / parallel.tensor_parallel_size": (
                model.num_attention_heads * model.head_size // ranks
            ),
            "(model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_size / "
            "parallel.tensor_parallel_size": (
                (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_size // ranks
            ),
        }
        for name, size in sizes.items():
            if size % multiple:
                yield f"{name}: {size} is not a multiple of {multiple}, as FP8 products need"
        # The tokens are the long side of a weight's gradient; under sequence parallelism each rank quantises its own.
        tokens = config.data.sequence_length * training.micro_batch_size
        if tokens // (ranks if parallel.sequence_parallel else 1) % 16:
            yield (
                "data.sequence_length: times training.micro_batch_size must be a multiple of 16 for FP8 products, "
                "on each rank where parallel.sequence_parallel shares it"
            )
