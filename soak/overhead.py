"""What safety costs: saving beside training, checksums, and starting again.

    python soak/overhead.py     (make bench-faults)

Trains stage `idm` at the sizes of benchmarks/train_bench.py by the real command, on one rank with all cores, in turns:
a run that saves only at its end, and one that saves every few steps. Then the latter goes on from its last checkpoint,
for the time of a restart. A step's time is from its end to the end of the next, with all that lies between. Training
waits for a save while the state is copied and, later, while the checkpoint gets its name; the bar is one step. Prints
tables and writes `runs/bench/faults.json`.
"""

import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.measured_process import run_measured
from benchmarks.train_bench_setup import (
    DEFAULT_SIZES,
    SMALL_SIZES,
    bench_recipe,
    make_data,
    make_starts,
    write_recipe,
)
from data_prep.checksum_list import find_damage
from data_prep.errors import UserError, run_cli
from data_prep.output_files import write_json_whole
from data_prep.progress import with_progress
from pretrain.checkpoints.checkpoint_folder import newest_checkpoint
from pretrain.config import METRICS_FILE, CheckpointConfig, LoggingConfig, RunConfig
from pretrain.run_record.history import Event, read_history

START_PARTS = ("import_seconds", "groups_seconds", "load_seconds", "first_step_seconds")
BAR = "training waits at most one step for a save"


@dataclass(frozen=True, kw_only=True)
class OverheadConfig:
    """Time steps with and without checkpoints, saves, checksums and restarts."""

    folder: Path = Path("runs/bench")
    """Folder for everything that is written; the figures go to faults.json in it."""
    rounds: int = 2
    """How many times each run has its turn."""
    steps: int = 21
    """Optimizer steps of each run."""
    interval_steps: int = 5
    """Steps between checkpoints, in the run that saves."""
    small: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Tiny sizes, to see that it works; the figures say nothing and go to faults_small.json."""

    @property
    def name(self) -> str:
        """Of the file of figures."""
        return "faults_small" if self.small else "faults"


class OverheadBench:
    """The runs, one after another."""

    def __init__(self, config: OverheadConfig) -> None:
        self.config = config
        self.sizes = SMALL_SIZES if config.small else DEFAULT_SIZES
        self.work = config.folder / ("train_small" if config.small else "train")  # shares data and starts
        self.log = self.work / f"{config.name}.log"

    def prepare(self) -> None:
        """Data and the base to start from (kept for the next time)."""
        self.work.mkdir(parents=True, exist_ok=True)
        make_data(self.sizes, self.work)
        make_starts(self.sizes, self.work, self.log)

    def recipe(self, name: str, interval_steps: int) -> RunConfig:
        """Of a run that saves every `interval_steps`."""
        recipe = bench_recipe(self.sizes, self.work, "idm", self.config.steps, f"overhead_{name}")
        return replace(
            recipe,
            checkpoint=CheckpointConfig(interval_steps=interval_steps),
            logging=LoggingConfig(interval_steps=1, wandb="off"),
        )

    def train(self, recipe: RunConfig, *mode: str) -> None:
        """One process. UserError if it fails."""
        file = write_recipe(recipe, self.work)
        run_measured(["-m", "pretrain.train", str(file), *mode], len(os.sched_getaffinity(0)), self.log)


def run(config: OverheadConfig) -> dict[str, object]:
    """All of it; what faults.json holds."""
    bench = OverheadBench(config)
    bench.prepare()
    without = bench.recipe("without", config.steps)
    saving = bench.recipe("saving", config.interval_steps)
    step_seconds: dict[str, list[float]] = {"without": [], "saving": []}
    saves: list[Event] = []
    for _ in with_progress(range(config.rounds), "rounds"):
        for name, recipe in (("without", without), ("saving", saving)):
            bench.train(recipe, "--overwrite")
            step_seconds[name] += step_times(recipe.run_folder)
        # Not the last one, which the end of the run waits for.
        saves += events(saving.run_folder, "saved")[:-1]
    checksum_seconds = time_checksums(saving.run_folder)
    longer = replace(saving, training=replace(saving.training, steps=config.steps + 2))
    bench.train(longer, "--resume")
    starts = [event["facts"] for event in events(saving.run_folder, "training")]
    step = statistics.median(step_seconds["without"])
    blocked = [float(event["facts"]["blocked_seconds"] or 0.0) for event in saves]
    return {
        "step_seconds": {name: figures(values) for name, values in step_seconds.items()},
        "blocked_seconds": figures(blocked),
        "blocked_steps": figures([seconds / step for seconds in blocked]),
        "save_seconds": figures([float(event["facts"]["seconds"] or 0.0) for event in saves]),
        "checkpoint_bytes": saves[-1]["facts"]["bytes"],
        "checksum_seconds": checksum_seconds,
        "start_seconds": {
            name: {part: facts[part] for part in START_PARTS}
            for name, facts in zip(("first start", "restart"), (starts[0], starts[-1]), strict=True)
        },
        "bar": BAR,
        "machine": describe_machine(),
        "sizes": asdict(bench.sizes),
        "settings": {"rounds": config.rounds, "steps": config.steps, "interval_steps": config.interval_steps},
        "command": " ".join(["python", *sys.argv]),
    }


def step_times(run_folder: Path) -> list[float]:
    """Seconds from the end of each training step to the end of the next."""
    lines = [json.loads(line) for line in (run_folder / METRICS_FILE).read_text().splitlines()]
    ends = [line["elapsed_seconds"] for line in lines if line["split"] == "train"]
    return [after - before for before, after in itertools.pairwise(ends)]


def events(run_folder: Path, name: str) -> list[Event]:
    """Events of one kind in a run's history."""
    return [event for event in read_history(run_folder) if event["event"] == name]


def time_checksums(run_folder: Path) -> float:
    """Seconds that it takes to read and check every file of the newest checkpoint, once it is in memory."""
    newest = newest_checkpoint(run_folder)
    assert newest is not None, "the run has ended"
    find_damage(newest)
    began = time.monotonic()
    damage = find_damage(newest)
    seconds = time.monotonic() - began
    if damage is not None:
        raise UserError(f"{newest}: {damage}")
    return round(seconds, 4)


def figures(values: list[float]) -> dict[str, float]:
    """Mean, median and largest."""
    return {
        "mean": round(statistics.fmean(values), 4),
        "median": round(statistics.median(values), 4),
        "most": round(max(values), 4),
    }


def costs_table(content: dict[str, dict[str, dict[str, float]]], bytes_saved: int) -> Table:
    """Steps, saves and checksums, side by side."""
    table = Table(title="What checkpoints cost")
    for heading in ("seconds", "mean", "median", "most"):
        table.add_column(heading, justify="left" if heading == "seconds" else "right")
    rows = {
        "step, without checkpoints": content["step_seconds"]["without"],
        "step, with checkpoints": content["step_seconds"]["saving"],
        "training waits for a save": content["blocked_seconds"],
        "the same, in steps (bar: 1)": content["blocked_steps"],
        "a save, start to end": content["save_seconds"],
    }
    for title, row in rows.items():
        table.add_row(title, *[f"{row[name]:.3f}" for name in ("mean", "median", "most")])  # type: ignore[index]
    table.add_row(f"checksums of {bytes_saved / 1e6:.0f} MB", "", f"{content['checksum_seconds']:.3f}", "")
    return table


def starts_table(starts: dict[str, dict[str, float]]) -> Table:
    """A first start and a restart by part."""
    table = Table(title="Until the first step is done, seconds")
    table.add_column("start")
    for part in (*START_PARTS, "all"):
        table.add_column(part.removesuffix("_seconds").replace("_", " "), justify="right")
    for name, parts in starts.items():
        seconds = [parts[part] for part in START_PARTS]
        table.add_row(name, *[f"{value:.2f}" for value in (*seconds, sum(seconds))])
    return table


def main() -> None:
    """Entry point."""
    config = tyro.cli(OverheadConfig, description=__doc__)
    if min(config.rounds, config.interval_steps) < 1 or config.steps <= 2 * config.interval_steps:
        raise UserError("--rounds and --interval-steps must be at least 1, --steps more than two intervals")
    content = run(config)
    write_json_whole(config.folder / f"{config.name}.json", content)
    console = Console()
    console.print(costs_table(content, content["checkpoint_bytes"]))  # type: ignore[arg-type]
    console.print(starts_table(content["start_seconds"]))  # type: ignore[arg-type]


if __name__ == "__main__":
    run_cli(main)
