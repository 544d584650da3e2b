"""A program of two ranks: each writes the number of its parameters, by part, for every layout.

Started by tests/pretrain/planning/test_parameters.py, with the folder OUTPUT.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import json
import sys
from pathlib import Path
from typing import Any

from pretrain import cpu_redirects

cpu_redirects.apply()

import torch

from pretrain.config import RunConfig
from pretrain.model.cola import ColaModel
from pretrain.parallel import parallel_context
from pretrain.stages.registry import stage_class
from tests.forked_ranks import run_ranks
from tests.pretrain.tiny_runs import tiny_recipe

LAYOUTS: dict[str, dict[str, Any]] = {
    "idm_tensor": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "policy_tensor": {"tensor_parallel_size": 2},
    "idm_pipeline": {"pipeline_parallel_size": 2},
    "policy_pipeline": {"pipeline_parallel_size": 2},
    "policy_tied": {"pipeline_parallel_size": 2},
    "idm_halves": {"pipeline_parallel_size": 2, "pipeline_layout": "base*2.5 | base*2.5 idm*3"},
    "policy_halves": {"pipeline_parallel_size": 2, "pipeline_layout": "base*5 idm*3 policy*1.5 | policy*1.5"},
}


def layout_recipe(name: str) -> RunConfig:
    """A tiny run in the layout of that name."""
    stage, kind = name.split("_")
    return tiny_recipe(
        stage,
        Path("run"),
        Path("data"),
        Path("start"),
        model={"num_layers": 5, "qkv_bias": True, "tied_embeddings": kind == "tied", "vocab_padding": 6},
        actions={"num_idm_layers": 3, "num_policy_layers": 3},
        parallel=LAYOUTS[name],
    )


def run_rank(output: Path) -> None:
    """All layouts, on one of the ranks."""
    for name in LAYOUTS:
        config = layout_recipe(name)
        sizes = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
        with parallel_context(sizes[0], config.seed, sizes[1]) as context:
            stage = stage_class(config)
            with torch.device("meta"):
                model = ColaModel(config, context.groups, (*stage.frozen_parts, *stage.trained_parts))
            counts = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in model.parts}
            (output / f"{name}_{context.rank}.json").write_text(json.dumps(counts))


def main() -> None:
    """The program that the tests start."""
    output = Path(sys.argv[1])
    run_ranks(2, output / "rendezvous", run_rank, output)
