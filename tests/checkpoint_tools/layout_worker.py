"""Loads imported checkpoints as the trainer does, under a layout of ranks, and saves them again from there.

    python layout_worker.py OUTPUT RUN...

Writes OUTPUT/<layout>/<run>/checkpoints/step_00000000 for layouts of TP {1, 2} x PP {1, 2}, each on forked ranks.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import json
import multiprocessing
import os
import shutil
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from pretrain import cpu_redirects

cpu_redirects.apply()

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from checkpoint_tools.formats.opened_model import HF_FILES_FOLDER
from pretrain.checkpoint_folder import read_description, resolve_checkpoint, step_folder
from pretrain.checkpointing import load_checked, sharded_weights
from pretrain.config import ParallelConfig
from pretrain.model.cola import ColaModel
from pretrain.parallel import ParallelContext, parallel_context
from pretrain.recipes import recipe_fields, recipe_from_fields

LAYOUTS = [(2, 1), (1, 2), (2, 2)]


def run_rank(rank: int, tensor: int, pipeline: int, runs: list[Path], output: Path) -> None:
    """One rank of a layout, through all runs."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(tensor * pipeline)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{output}/rendezvous",
        rank=rank,
        world_size=tensor * pipeline,
        timeout=timedelta(seconds=60),
    )
    with parallel_context(tensor, 0, pipeline) as context:
        for run in runs:
            save_under_layout(context, run, output / run.name)
    dist.destroy_process_group()


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
    dist_checkpointing.save(sharded_weights(model, parts), str(weights))
    held = [0] * context.world_size
    dist.all_gather_object(held, sum(p.numel() for p in model.parameters()))
    if dist.get_rank() == 0:
        shutil.copytree(checkpoint / HF_FILES_FOLDER, weights.parent / HF_FILES_FOLDER)
        (output / "parameters_by_rank.json").write_text(json.dumps(held))
        fields = json.loads((checkpoint / "cola.json").read_text())
        (weights.parent / "cola.json").write_text(json.dumps({**fields, "recipe": recipe_fields(recipe)}))


def main() -> None:
    """All layouts, one after another."""
    output, runs = Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]]
    fork = multiprocessing.get_context("fork")
    for tensor, pipeline in LAYOUTS:
        place = output / f"tp{tensor}_pp{pipeline}"
        place.mkdir()
        arguments = [(rank, tensor, pipeline, runs, place) for rank in range(tensor * pipeline)]
        ranks = [fork.Process(target=run_rank, args=each) for each in arguments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"{place}: exit codes {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main()
