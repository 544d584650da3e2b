"""How fast both stages train on this machine, beside training the whole base and beside plain PyTorch.

    python benchmarks/train_bench.py     (make bench-train)

Three runs of the trainer itself (stages `idm` and `policy`, and `base`: full training of the same base) and two of a
plain PyTorch trainer of the same stages (benchmarks/plain_cola), with the same sizes, weights and real text, in fp32 on
one rank with all cores. Each is a whole process that warms up and is then timed; they take turns, and ratios are of
medians over all rounds. Then the plain trainer runs once more with the trainer's own action noise: the loss curves
must be the same. Last, the time that the loop waits for data. Prints tables and writes `runs/bench/train.json`.
"""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from benchmarks.machine import describe_machine
from benchmarks.measured_process import run_measured
from benchmarks.train_bench_figures import BARS, comparison_table, figures_of, largest_difference, ways_table
from benchmarks.train_bench_setup import (
    DEFAULT_SIZES,
    SMALL_SIZES,
    SPARE_STEPS,
    TrainBenchSizes,
    bench_recipe,
    make_data,
    make_starts,
    write_recipe,
)
from data_prep.errors import UserError, run_cli
from data_prep.output_files import read_json_object, write_json_whole
from data_prep.progress import with_progress
from pretrain.config import StageName

FROZEN_BASE_STAGES: tuple[StageName, ...] = ("idm", "policy")
WORKER = "benchmarks/train_bench_worker.py"


@dataclass(frozen=True, kw_only=True)
class TrainBenchConfig:
    """Time both training stages beside full training and beside plain PyTorch."""

    folder: Path = Path("runs/bench")
    """Folder for everything that is written; the figures go to train.json in it."""
    rounds: int = 3
    """How many times each way has its turn, in a fresh process."""
    steps: int = 5
    """Timed optimizer steps of each process."""
    warmup_steps: int = 1
    """Steps before them."""
    with_checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also the plain trainer with activation checkpointing, as the authors train."""
    small: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Tiny sizes, to see that it works; the figures say nothing and go to train_small.json."""

    @property
    def name(self) -> str:
        """Of the folder of runs and of the file of figures."""
        return "train_small" if self.small else "train"

    @property
    def work(self) -> Path:
        """Folder of runs and data."""
        return self.folder / self.name

    @property
    def sizes(self) -> TrainBenchSizes:
        """Of the model and its batches."""
        return SMALL_SIZES if self.small else DEFAULT_SIZES


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of training."""

    name: str
    stage: StageName
    options: tuple[str, ...] = ()
    """Arguments of the worker beside the recipe; none: the trainer itself."""


WAYS = (
    Way(name="idm", stage="idm"),
    Way(name="plain_idm", stage="idm", options=("plain",)),
    Way(name="policy", stage="policy"),
    Way(name="plain_policy", stage="policy", options=("plain",)),
    Way(name="base", stage="base"),
)
CHECKPOINTED_WAYS = tuple(
    Way(name=f"checkpointed_{stage}", stage=stage, options=("plain", "--activation-checkpointing"))
    for stage in FROZEN_BASE_STAGES
)


class TrainBench:
    """The benchmark's processes, one after another, all cores each."""

    def __init__(self, config: TrainBenchConfig) -> None:
        self.config = config
        self.cores = 1 if config.small else len(os.sched_getaffinity(0))
        self.log = config.work / "log.txt"
        self.steps = config.warmup_steps + config.steps
        self.recipes: dict[StageName, Path] = {}

    def prepare(self) -> None:
        """Data and starting points (kept for the next time), recipes, and what the plain trainer reads."""
        config = self.config
        config.work.mkdir(parents=True, exist_ok=True)
        make_data(config.sizes, config.work)
        make_starts(config.sizes, config.work, self.log)
        for stage in ("base", *FROZEN_BASE_STAGES):
            recipe = bench_recipe(config.sizes, config.work, stage, self.steps + SPARE_STEPS, stage)
            self.recipes[stage] = write_recipe(recipe, config.work)
        for stage in FROZEN_BASE_STAGES:
            self.start_worker("inputs", stage, self.inputs_options(stage))

    def inputs_options(self, stage: StageName) -> list[str]:
        """Where the plain trainer's weights and micro-batches are."""
        return ["--inputs", str(self.config.work / f"inputs_{stage}.pt")]

    def measure(self, way: Way) -> dict[str, Any]:
        """One process of a way; its report."""
        program, *options = way.options or ("ours",)
        if program == "plain":
            options += self.inputs_options(way.stage)
        return self.report(program, way.stage, options)

    def report(self, program: str, stage: StageName, options: list[str]) -> dict[str, Any]:
        """What a worker wrote into its report."""
        path = self.config.work / "report.json"
        self.start_worker(program, stage, [*options, "--report", str(path)])
        return read_json_object(path, "run the benchmark again")

    def start_worker(self, program: str, stage: StageName, options: list[str]) -> None:
        """Run benchmarks/train_bench_worker.py; UserError if it fails."""
        flags = ["--program", program, "--recipe", str(self.recipes[stage]), "--steps", str(self.steps)]
        run_measured([WORKER, *flags, *options], self.cores, self.log)

    def loss_difference(self, stage: StageName, losses: list[float]) -> float:
        """Between our `losses` and the plain trainer's with our noise, relative, of the step where it is largest."""
        plain = self.report("plain", stage, [*self.inputs_options(stage), "--our-noise"])
        return largest_difference(losses, plain["losses"])


def run(config: TrainBenchConfig) -> dict[str, Any]:
    """All of it; returns what train.json holds."""
    bench = TrainBench(config)
    bench.prepare()
    ways = WAYS + (CHECKPOINTED_WAYS if config.with_checkpointing else ())
    reports: dict[str, list[dict[str, Any]]] = {way.name: [] for way in ways}
    for way in with_progress([way for _ in range(config.rounds) for way in ways], "ways"):
        reports[way.name].append(bench.measure(way))
    differences = {
        stage: bench.loss_difference(stage, reports[stage][0]["losses"]) for stage in FROZEN_BASE_STAGES
    }
    stall = bench.report("stall", "idm", [])
    recipes = {
        stage: bench_recipe(config.sizes, config.work, stage, 1, stage) for stage in FROZEN_BASE_STAGES
    }
    figures = figures_of(reports, stall, recipes, config.warmup_steps)
    return {
        **figures,
        "loss_difference": differences,
        "bars": BARS,
        "machine": describe_machine() | {"threads": bench.cores},
        "sizes": asdict(config.sizes),
        "settings": {
            "rounds": config.rounds,
            "steps": config.steps,
            "warmup_steps": config.warmup_steps,
            "precision": "fp32",
        },
        "command": " ".join(["python", WORKER.replace("_worker", ""), *sys.argv[1:]]),
        "reports": reports,
        "stall_seconds": stall,
    }


def main() -> None:
    """Entry point."""
    config = tyro.cli(TrainBenchConfig, description=__doc__)
    problems = [
        f"--{name.replace('_', '-')} {getattr(config, name)} must be at least 1"
        for name in ("rounds", "steps", "warmup_steps")
        if getattr(config, name) < 1
    ]
    if problems:
        raise UserError("; ".join(problems))
    content = run(config)
    write_json_whole(config.folder / f"{config.name}.json", content)
    console = Console()
    console.print(ways_table(content))
    console.print(comparison_table(content))


if __name__ == "__main__":
    run_cli(main)
