"""Tiny recipes and data for tests that train: seconds on one core, every part of the real path."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.config import RunConfig
from pretrain.recipes import recipe_from_fields

if TYPE_CHECKING:
    import torch

    from pretrain.parallel import ParallelContext

VOCAB_SIZE = 1024
SEQUENCE_LENGTH = 32
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_size": 8,
    "rope_scaling_factor": 8.0,
}
# Every size another number, so that none can stand in for another.
UNLIKE_SIZES = {
    "hidden_size": 40,
    "ffn_hidden_size": 56,
    "vocab_size": 80,
    "num_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_size": 8,
}
STARTS = {"base": None, "idm": "base", "policy": "idm"}
"""The stage each stage starts from."""


def tiny_recipe(
    stage: str,
    run_folder: Path,
    data_folder: Path,
    start_from: Path | None = None,
    **sections: dict[str, Any],
) -> RunConfig:
    """A recipe of six steps; `sections` replace single fields, e.g. training={"steps": 3}."""
    fields: dict[str, Any] = {
        "stage": stage,
        "run_folder": str(run_folder),
        "start_from": str(start_from) if start_from else None,
        "model": MODEL,
        "actions": {"num_actions": 16, "num_idm_layers": 1, "num_policy_layers": 1},
        "data": {"path": str(data_folder), "sequence_length": SEQUENCE_LENGTH},
        "training": {"steps": 6, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 2, "decay_steps": 8},
        "validation": {"interval_steps": 3, "steps": 1},
        "checkpoint": {"interval_steps": 3},
        "logging": {"interval_steps": 1, "wandb": "off"},
        "faults": {},
        "parallel": {},
    }
    for name, changes in sections.items():
        fields[name] = {**fields[name], **changes}
    return recipe_from_fields(fields, "tiny recipe")


def metrics(run_folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one split."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def series(run_folder: Path, name: str, split: str = "train") -> np.ndarray:
    """One metric over the run."""
    return np.array([line[name] for line in metrics(run_folder, split)])


def saved_tensors(run: Path) -> "dict[str, torch.Tensor]":
    """Weights and optimizer state of the newest checkpoint, as whole tensors."""
    import torch
    from megatron.core import dist_checkpointing

    from pretrain.checkpoints.checkpoint_folder import resolve_checkpoint
    from pretrain.parallel import parallel_context

    checkpoint = resolve_checkpoint(run)
    with parallel_context(tensor_parallel_size=1, seed=0):
        return {
            f"{kind}/{name}": tensor
            for kind in ("weights", "optimizer")
            for name, tensor in dist_checkpointing.load_plain_tensors(str(checkpoint / kind)).items()
            if torch.is_tensor(tensor)
        }


def save_now(config: RunConfig, context: "ParallelContext", **snapshot: Any) -> None:
    """Write a checkpoint by itself, with the trainer's own code; `snapshot` are the fields of a Snapshot."""
    from pretrain.checkpoints.checkpoint_folder import LoopState
    from pretrain.checkpoints.checkpoint_saving import CheckpointSaver, RunOrigin, Snapshot
    from pretrain.run_record.history import History

    origin = RunOrigin(start=None, tokenizer_fingerprint="", data_fingerprint="")
    history = History(config.run_folder, active=False)
    saver = CheckpointSaver(config, context, origin, history, beat=lambda: None)
    taken = Snapshot(began=0.0, consumed_samples=0, loop=LoopState(), **snapshot)
    saver.save_and_wait(lambda: taken, taken.step)


def train_in_process(config: RunConfig, resume: bool = False) -> None:
    """Train `config` on one rank, in this process."""
    from pretrain import cpu_redirects

    cpu_redirects.apply()
    from pretrain.run import train

    train(config, resume=resume, overwrite=False)
