"""A rank of the soak's runs: the trainer itself, with orders for faults that only a rank can commit (`soak.orders`).

Takes the arguments of `pretrain.train`.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import run_cli
from pretrain import cpu_redirects, train
from soak import orders


def obey_orders(recipe: Path) -> None:
    """Make the training loop of this process obey the orders for the run of `recipe`."""
    cpu_redirects.apply()
    from pretrain.stages.contract import Batch
    from pretrain.train_loop import TrainLoop

    rank = int(os.environ.get("RANK", "0"))
    nan_gradients = orders.nan_gradients(recipe)
    plain_step, plain_finalize = TrainLoop.train_or_skip_step, TrainLoop.finalize_gradients
    now = {"step": 0}

    def step_with_orders(self: TrainLoop, batches: Iterator[Batch], step: int, last_norm: float) -> float:
        orders.obey_hang(recipe, rank)
        now["step"] = step
        return plain_step(self, batches, step, last_norm)

    def finalize_with_orders(self: TrainLoop, *arguments: Any, **options: Any) -> None:
        plain_finalize(self, *arguments, **options)
        if nan_gradients.get(now["step"]) == rank:
            for buffer in self.model.buffers:
                buffer.grad_data.fill_(float("nan"))

    TrainLoop.train_or_skip_step = step_with_orders  # type: ignore[method-assign]
    TrainLoop.finalize_gradients = finalize_with_orders  # type: ignore[method-assign]


def main() -> None:
    """Entry point."""
    obey_orders(Path(sys.argv[1]))
    train.main()


if __name__ == "__main__":
    run_cli(main)
