"""Faults that only a rank itself can commit are ordered through files in a folder beside the run's recipe."""

import json
import time
from pathlib import Path

from data_prep.output_files import write_json_whole

NAN_STEPS_FILE = "nan_steps.json"


def orders_folder(recipe: Path) -> Path:
    """Where the ranks of the run of `recipe` look for orders."""
    return recipe.with_suffix(".orders")


def order_nan_gradients(recipe: Path, rank_of_step: dict[int, int]) -> None:
    """Have a rank's gradient be NaN in each of the steps, however often the step is done."""
    orders_folder(recipe).mkdir(parents=True, exist_ok=True)
    write_json_whole(orders_folder(recipe) / NAN_STEPS_FILE, rank_of_step)


def nan_gradients(recipe: Path) -> dict[int, int]:
    """The rank whose gradient is NaN, by step."""
    file = orders_folder(recipe) / NAN_STEPS_FILE
    return {int(step): rank for step, rank in json.loads(file.read_text()).items()}


def order_hang(recipe: Path, rank: int) -> None:
    """Have a rank stand still, soon."""
    _hang_file(recipe, rank).touch()


def obey_hang(recipe: Path, rank: int) -> None:
    """Called by a rank at every step: stands still if that was ordered, once."""
    file = _hang_file(recipe, rank)
    if file.exists():
        file.unlink()
        while True:
            time.sleep(1)


def _hang_file(recipe: Path, rank: int) -> Path:
    return orders_folder(recipe) / f"hang_rank_{rank}"
