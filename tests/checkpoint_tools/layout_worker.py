"""Loads imported checkpoints as the trainer does, under a layout of ranks, and saves them again from there.

Started by tests/checkpoint_tools/test_hf_to_megatron.py, with the folders OUTPUT RUN...; writes
OUTPUT/<layout>/<run>/checkpoints/step_00000000 for layouts of TP {1, 2} x PP {1, 2}, each on forked ranks.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from pretrain import cpu_redirects

cpu_redirects.apply()

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from checkpoint_tools.formats.opened_model import HF_FILES_FOLDER
from pretrain.checkpoints.checkpoint_folder import read_description, resolve_checkpoint, step_folder
from pretrain.checkpoints.checkpoint_writer import (
    BACKEND,
    BACKEND_VERSION,
    WriterProcess,
    Written,
    plan_folder,
)
from pretrain.checkpoints.checkpointing import load_checked, sharded_weights
from pretrain.config import ParallelConfig
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext, parallel_context
from pretrain.recipes import recipe_fields, recipe_from_fields
from tests.forked_ranks import run_ranks

LAYOUTS = [(2, 1), (1, 2), (2, 2)]
WRITE_SECONDS = 60


def run_rank(tensor: int, pipeline: int, runs: list[Path], output: Path) -> None:
    """One rank of a layout, through all runs."""
    with parallel_context(tensor, 0, pipeline) as context:
        for run in runs:
            save_under_layout(context, run, output / run.name)


def save_under_layout(context: ParallelContext, run: Path, output: Path) -> None:
    """Load (which checks every tensor's fingerprint), save, and say how many parameters each rank held."""
    checkpoint = resolve_checkpoint(run)
    description = read_description(checkpoint)
    recipe = recipe_from_fields(description.recipe, str(checkpoint))
    layout = ParallelConfig(
        tensor_parallel_size=context.tensor_parallel_size, pipeline_parallel_size=context.pipeline_size
    )
    recipe = replace(recipe, parallel=layout)
    parts = tuple(description.parts)
    weights = step_folder(output, 0) / "weights"
    model = ColaModel(recipe, context.groups, parts)
    load_checked(model, parts, checkpoint)
    weights.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    write_weights(context, model, parts, weights.parent)
    held = [0] * context.world_size
    dist.all_gather_object(held, sum(p.numel() for p in model.parameters()))
    if dist.get_rank() == 0:
        shutil.copytree(checkpoint / HF_FILES_FOLDER, weights.parent / HF_FILES_FOLDER)
        (output / "parameters_by_rank.json").write_text(json.dumps(held))
        fields = json.loads((checkpoint / "cola.json").read_text())
        (weights.parent / "cola.json").write_text(json.dumps({**fields, "recipe": recipe_fields(recipe)}))


def write_weights(
    context: ParallelContext, model: ColaModel, parts: tuple[str, ...], checkpoint: Path
) -> None:
    """The weights of a checkpoint as the trainer writes them, without an optimizer beside them. Collective."""
    plan = plan_folder(sharded_weights(model, parts), checkpoint, "weights", context.is_first_rank)
    process = WriterProcess([plan], checkpoint, WRITE_SECONDS)
    while process.poll():
        time.sleep(0.02)
    assert process.written is not None, process.failure
    shares: list[Written | None] = [None] * context.world_size
    dist.all_gather_object(shares, process.written)
    if context.is_first_rank:
        plan.writer.finish(plan.metadata, [share.results[0] for share in shares if share is not None])
        save_config(CheckpointingConfig(BACKEND, BACKEND_VERSION), str(checkpoint / "weights"))


def main() -> None:
    """All layouts, one after another."""
    output, runs = Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]]
    for tensor, pipeline in LAYOUTS:
        place = output / f"tp{tensor}_pp{pipeline}"
        place.mkdir()
        run_ranks(tensor * pipeline, place / "rendezvous", run_rank, tensor, pipeline, runs, place)
