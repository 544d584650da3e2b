"""One IDM run from a base for each layout of two forked ranks, its checkpoint self-contained or not.

Started by tests/pretrain/test_self_contained.py, with the folders DATA BASE OUTPUT.
"""

# ruff: noqa: E402  Megatron is imported after the redirects
import sys
from pathlib import Path

from pretrain import cpu_redirects

cpu_redirects.apply()

from pretrain.config import RunConfig
from pretrain.run import train
from tests.forked_ranks import run_ranks
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


def run_rank(data: Path, base: Path, output: Path) -> None:
    """All layouts, one after the other, on one rank."""
    for name in LAYOUTS:
        train(layout_recipe(name, output, data, base), resume=False, overwrite=False)


def main() -> None:
    """All layouts on the same two ranks."""
    data, base, output = (Path(argument) for argument in sys.argv[1:4])
    run_ranks(RANKS, output / "rendezvous", run_rank, data, base, output)
