"""One IDM run from a base for each layout of two forked ranks, its checkpoint self-contained or not.

python self_contained_worker.py DATA BASE OUTPUT
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path

from pretrain import cpu_redirects

cpu_redirects.apply()

import torch.distributed as dist

from pretrain.config import RunConfig
from pretrain.run import train
from tests.pretrain.tiny_runs import tiny_recipe

RANKS = 2
# Ranks, and whether the checkpoint is self-contained.
LAYOUTS = {
    "tensor": ({"tensor_parallel_size": RANKS}, True),
    "pipeline": ({"pipeline_parallel_size": RANKS}, True),
    "pipeline_ordinary": ({"pipeline_parallel_size": RANKS}, False),
}
PADDED = {"vocab_padding": 6}


def layout_recipe(name: str, output: Path, data: Path, base: Path) -> RunConfig:
    """Three steps in the layout of that name."""
    parallel, self_contained = LAYOUTS[name]
    return tiny_recipe(
        "idm",
        output / name,
        data,
        base,
        model=PADDED,
        parallel=parallel,
        training={"steps": 3},
        checkpoint={"self_contained": self_contained},
    )


def run_rank(rank: int, data: Path, base: Path, output: Path) -> None:
    """All layouts, one after the other, on one rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{output}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    for name in LAYOUTS:
        train(layout_recipe(name, output, data, base), resume=False, overwrite=False)
    dist.destroy_process_group()


def main() -> None:
    """Fork the ranks, so that Megatron is imported once, and wait for them."""
    folders = [Path(argument) for argument in sys.argv[1:4]]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, *folders)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
