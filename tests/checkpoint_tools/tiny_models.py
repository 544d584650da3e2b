"""Hugging Face folders written as checkpoints of the trainer, and changed by hand."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint_tools.random_cola import random_cola


def cola_folder(folder: Path, **fields: Any) -> Path:
    """A random CoLA model, at a width where one product of 2H and the sum of two of H are rounded differently."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    random_cola(**{**sizes, "num_policy_layers": 1, "output_form": "residual", **fields}).save_pretrained(
        folder
    )
    return folder


def save_as_checkpoint(folder: Path, run: Path, **fields: Any) -> Path:
    """Write the model in the Hugging Face `folder` as the only checkpoint of a `run`; returns the run.

    `fields` replace those of its ModelConfig, e.g. vocab_padding.
    """
    from checkpoint_tools.formats.converted_reader import seen_as_megatron
    from checkpoint_tools.formats.megatron_files import model_entries, write_weights
    from checkpoint_tools.formats.opened_model import open_model
    from checkpoint_tools.formats.weight_map import weight_rules
    from data_prep.checksum_list import list_whole_folder
    from pretrain.checkpoints.checkpoint_folder import (
        DESCRIPTION_FILE,
        FORMAT_VERSION,
        CheckpointDescription,
        LoopState,
        step_folder,
    )
    from pretrain.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
    from pretrain.recipes import recipe_fields

    opened = open_model(folder)
    dtype = next(iter(opened.reader.facts.values())).dtype
    recipe = RunConfig(
        stage="policy" if "policy" in opened.parts else "base",
        run_folder=run,
        model=replace(opened.model, **fields),
        actions=opened.actions,
        data=DataConfig(path=folder, sequence_length=512),
        training=TrainingConfig(steps=0, precision="bf16" if dtype == torch.bfloat16 else "fp32"),
        optimizer=OptimizerConfig(decay_steps=0),
    )
    checkpoint = step_folder(run, 0)
    (checkpoint / "weights").mkdir(parents=True)
    rules = weight_rules(recipe.model, recipe.actions, opened.parts)
    entries = model_entries(recipe, opened.parts)
    reader = seen_as_megatron(opened.reader, rules)
    description = CheckpointDescription(
        format_version=FORMAT_VERSION,
        stage=recipe.stage,
        step=0,
        consumed_samples=0,
        consumed_tokens=0,
        parts=list(opened.parts),
        start_from=None,
        tokenizer_fingerprint="",
        data_fingerprint="",
        recipe=recipe_fields(recipe),
        loop=LoopState(),
        fingerprints=write_weights(checkpoint / "weights", entries, reader, "write"),
        megatron_version="",
    )
    (checkpoint / DESCRIPTION_FILE).write_text(json.dumps(asdict(description)))
    list_whole_folder(checkpoint)
    return run


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let `edit` change the tensors of a Hugging Face folder of one file."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    contiguous = {name: weight.clone().contiguous() for name, weight in weights.items()}
    save_file(contiguous, file, metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Let `edit` change the fields of a folder's config.json."""
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    edit(fields)
    file.write_text(json.dumps(fields))
