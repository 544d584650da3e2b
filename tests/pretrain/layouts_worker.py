"""Run by torchrun on two ranks: every stage under tensor and under data parallelism, and two deliberate faults.

torchrun --nproc-per-node 2 layouts_worker.py DATA REFERENCE_RUNS OUTPUT
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import sys
from collections.abc import Callable
from pathlib import Path

from pretrain import cpu_redirects

cpu_redirects.apply()

import torch
import torch.distributed as dist

import pretrain.model.world_model
import pretrain.stages.idm
from pretrain.run import train
from tests.pretrain.tiny_runs import STARTS, tiny_recipe

# The published form: its merge layers do not start at zero, so gradients reach the IDM from the first step.
ACTIONS = {"output": "reference"}
WHOLE_NOISE = pretrain.stages.idm.gumbel_noise


def train_stages(data: Path, reference: Path, output: Path, tensor_parallel_size: int, *stages: str) -> None:
    """Train `stages`, each from the one-rank run of the stage before, with the one-rank run's micro-batches."""
    for stage in stages:
        start = STARTS[stage]
        recipe = tiny_recipe(
            stage,
            output / stage,
            data,
            reference / start if start else None,
            parallel={"tensor_parallel_size": tensor_parallel_size},
            training={"micro_batch_size": 2 * tensor_parallel_size},
            actions=ACTIONS,
        )
        train(recipe, resume=False, overwrite=False)


def with_fault(
    module: object, name: str, fault: Callable[..., torch.Tensor], run: Callable[[], None]
) -> None:
    """Run with `module.name` replaced, then put it back."""
    whole = getattr(module, name)
    setattr(module, name, fault)
    try:
        run()
    finally:
        setattr(module, name, whole)


def noise_by_rank(seed: int, *arguments: object) -> torch.Tensor:
    """The fault of drawing noise by rank instead of by sample."""
    return WHOLE_NOISE(seed + 1 + dist.get_rank(), *arguments)  # type: ignore[arg-type]


def without_sum_over_ranks(choice_SBA: torch.Tensor, group: object) -> torch.Tensor:
    """The fault of forgetting that each rank's part of the table gives part of the gradient."""
    return choice_SBA


def main() -> None:
    """All layouts in one launch."""
    data, reference, output = (Path(argument) for argument in sys.argv[1:4])
    dist.init_process_group("gloo")  # once: the runs below use it one after the other
    stages = ("base", "idm", "policy")
    train_stages(data, reference, output / "tensor_parallel", 2, *stages)
    train_stages(data, reference, output / "data_parallel", 1, *stages)

    def idm(name: str, tensor_parallel_size: int) -> None:
        train_stages(data, reference, output / name, tensor_parallel_size, "idm")

    with_fault(pretrain.stages.idm, "gumbel_noise", noise_by_rank, lambda: idm("fault_noise", 1))
    name = "copy_to_tensor_model_parallel_region"
    with_fault(pretrain.model.world_model, name, without_sum_over_ranks, lambda: idm("fault_gradient", 2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
