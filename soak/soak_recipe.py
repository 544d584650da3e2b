"""What the soak trains: a tiny stage `idm` on random tokens, on CPU ranks, with a checkpoint every few steps."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.synthetic_blend import write_synthetic_blend
from benchmarks.train_bench_setup import write_recipe
from data_prep.errors import UserError
from data_prep.output_files import write_text_whole
from pretrain.checkpoints.checkpoint_folder import CHECKPOINTS_FOLDER
from pretrain.config import CONFIG_FILE, RunConfig, StageName
from pretrain.recipes import dump_recipe, recipe_from_fields
from soak.plan import CHECKPOINT_INTERVAL_STEPS

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 512
SEQUENCE_LENGTH = 32
GLOBAL_BATCH_SIZE = 8
BASE_STEPS = 3
HANG_SECONDS = 20
WRITE_TIMEOUT_SECONDS = 5
KEPT_CHECKPOINTS = 4
DATA_FOLDER = "data"
# Ranks share the cores with other ranks and with whoever looks on.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


def prepare(folder: Path, steps: int) -> None:
    """Write the data for a run of `steps` steps, and train the base that it starts from, by the real command."""
    tokens = steps * GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH
    write_synthetic_blend(folder / DATA_FOLDER, VOCAB_SIZE, tokens + tokens // 10 + 10_000, 4_000)
    recipe = write_recipe(soak_recipe(folder, "base", "base", BASE_STEPS), folder)
    log = folder / "base.log"
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "pretrain.train", str(recipe)]
        ended = subprocess.run(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=stream, stderr=subprocess.STDOUT
        )
    if ended.returncode:
        raise UserError(f"the base to start from was not trained (exit code {ended.returncode}); see {log}")


def soak_recipe(folder: Path, name: str, stage: StageName, steps: int) -> RunConfig:
    """The recipe of the run `folder`/`name`."""
    recipe = recipe_from_fields(
        {
            "stage": stage,
            "run_folder": str(folder / name),
            "model": {
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "num_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_size": 8,
            },
            "actions": {"num_actions": 16, "num_idm_layers": 1, "num_policy_layers": 1},
            "data": {"path": str(folder / DATA_FOLDER), "sequence_length": SEQUENCE_LENGTH},
            "training": {
                "steps": steps,
                "global_batch_size": GLOBAL_BATCH_SIZE,
                "micro_batch_size": 2,
                "precision": "fp32",
                "deterministic": True,
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "decay_steps": max(steps, 10)},
            "validation": {"interval_steps": 50, "steps": 1},
            "checkpoint": {
                "interval_steps": CHECKPOINT_INTERVAL_STEPS,
                "keep_last": KEPT_CHECKPOINTS,
                "write_timeout_seconds": WRITE_TIMEOUT_SECONDS,
            },
            "faults": {"bad_step": "skip", "hang_seconds": HANG_SECONDS},
            "logging": {"interval_steps": 1, "wandb": "off"},
        },
        "soak",
    )
    return recipe if stage == "base" else replace(recipe, start_from=folder / "base")


def mark_as_started(recipe: RunConfig) -> Path:
    """Make the run folder as a first start does, so that its checkpoints/ can be put elsewhere; that folder."""
    checkpoints = recipe.run_folder / CHECKPOINTS_FOLDER
    checkpoints.mkdir(parents=True)
    write_text_whole(recipe.run_folder / CONFIG_FILE, dump_recipe(recipe))
    return checkpoints
