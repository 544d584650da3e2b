"""Runs for the GPU tests: small, but of sizes that FP8 products take, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from pretrain.config import RunConfig
from pretrain.recipes import dump_recipe
from tests.pretrain.tiny_runs import metrics, tiny_recipe
from tests.repository_rules import ROOT

Device = Literal["gpu", "cpu"]
TIMEOUT_SECONDS = 600
BASE_STEPS = 60  # of the base that the other stages start from
YOUNGER_STEPS = 45  # of its checkpoint before
# Every side of a product is a multiple of 128, as blockwise scaling asks; the others ask for 16.
SIZES: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 256, "ffn_hidden_size": 512, "num_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": 64,
    },
    "actions": {"num_actions": 64, "num_idm_layers": 1, "num_policy_layers": 1},
    "data": {"sequence_length": 128},
    "optimizer": {"learning_rate": 2e-3, "min_learning_rate": 1e-3, "warmup_steps": 4, "decay_steps": 60},
}  # fmt: skip


def gpu_recipe(
    stage: str, run_folder: Path, blend: Path, start_from: Path | None = None, **training: Any
) -> RunConfig:
    """A BF16 recipe of 20 steps; `training` replaces fields of that section, e.g. fp8="tensorwise"."""
    steps = int(training.get("steps", 20))
    sections: dict[str, dict[str, Any]] = {
        **SIZES,
        "training": {"precision": "bf16", "steps": steps, **training},
        "validation": {"interval_steps": steps, "steps": 1},
        "checkpoint": {"interval_steps": min(steps, YOUNGER_STEPS)},
    }
    return tiny_recipe(stage, run_folder, blend, start_from, **sections)


def train(config: RunConfig, device: Device, *flags: str) -> None:
    """Run the trainer on `device`; fails with its last words."""
    recipe = config.run_folder.with_suffix(".yaml")
    recipe.write_text(dump_recipe(config))
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, "-m", "pretrain.train", str(recipe), *flags]
    answer = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]


def print_speed(config: RunConfig) -> None:
    """The median of the last half of the steps, for whoever runs pytest -s; nothing here asserts a speed."""
    lines = metrics(config.run_folder)
    line = sorted(lines[len(lines) // 2 :], key=lambda line: line["tokens_per_second"])[len(lines) // 4]
    print(
        f"\n{config.run_folder.name}: {line['tokens_per_second']:,.0f} tokens/s, "
        f"{line['tflops_per_second']:.2f} TFLOP/s, {line['memory_gib']:.2f} GiB"
    )
