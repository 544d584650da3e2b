"""The whole way on this machine: sample corpora, data, three training stages, export, held-out table, report.

    python demo/run_demo.py [--folder runs/demo] [--ranks 2] [--dry-run]

Run it from the repository's root (`make demo` does). Everything it makes lies in the folder: corpora,
tokenizer, tokenized, data, the runs base, idm and policy, the Hugging Face model hf, held_out.json,
summary.json, report.html, and steps.json with the state and the seconds of each step. Run again, it skips
what is finished and resumes what was interrupted; a step whose command or recipe changed is run anew, and so
is all after it.
"""

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from data_prep.corpus_sources import SOURCES
from data_prep.errors import UserError, run_cli
from demo.progress import ProgressDisplay
from demo.step_runner import RunInterruptedError, StepFailedError, run_steps
from demo.step_state import Step, StepState
from pretrain.recipes import load_recipe

STAGES = ("base", "idm", "policy")
STAGE_BEFORE = {"idm": "base", "policy": "idm"}
CONFIGS = Path("configs")
STEP_FAILED_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130  # what a shell reports for a command ended by Ctrl-C


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The whole way on this machine, from sample corpora to a controllable model and its report."""

    folder: Path = Path("runs/demo")
    """Where everything goes."""
    ranks: int = 2
    """Training processes; each uses its share of the cores."""
    dry_run: bool = False
    """List the steps and what would be done with each, then stop."""


def demo_steps(folder: Path, ranks: int) -> list[Step]:
    """All steps in order. Commands are relative to the repository's root."""
    return [
        *_data_steps(folder),
        *(training_step(folder, stage, ranks) for stage in STAGES),
        *_use_steps(folder),
    ]


def _data_steps(folder: Path) -> list[Step]:
    corpora, tokenizer, tokens = (folder / name for name in ("corpora", "tokenizer", "tokenized"))
    cores = _cores()
    sample = Step(
        name="sample corpora",
        command=("data_prep/sample_corpus.py", "--output", str(corpora)),
        target=corpora,
        outputs=("corpora/corpora.json",),
        threads=cores,
    )
    train_tokenizer = Step(
        name="tokenizer",
        command=("data_prep/train_tokenizer.py", "--corpora", str(corpora), "--output", str(tokenizer)),
        target=tokenizer,
        outputs=("tokenizer/tokenizer.model", "tokenizer/tokenizer.json"),
        threads=cores,
    )
    tokenize = [
        Step(
            name=f"tokenize {source}",
            command=(
                *("data_prep/tokenize_corpus.py", "--source", source, "--input", str(corpora / source)),
                *("--tokenizer", str(tokenizer), "--output", str(tokens / source), "--workers", str(cores)),
            ),
            target=tokens / source,
            outputs=(f"tokenized/{source}/train/*.json", f"tokenized/{source}/validation/*.json"),
            resumable=True,
        )
        for source in SOURCES
    ]
    recipe = CONFIGS / "blend_demo.yaml"
    blend = Step(
        name="blend",
        command=(
            *("data_prep/blend.py", "--config", str(recipe), "--tokenized", str(tokens)),
            *("--tokenizer", str(tokenizer), "--output", str(folder / "data")),
        ),
        target=folder / "data",
        outputs=("data/blend.json",),
        recipes=(recipe,),
        resumable=True,
        threads=cores,
    )
    return [sample, train_tokenizer, *tokenize, blend]


def training_step(
    folder: Path,
    stage: str,
    ranks: int,
    name: str | None = None,
    run_folder: Path | None = None,
    changes: tuple[str, ...] = (),
) -> Step:
    """Train `stage` on the demo's data; another name, run folder or recipe fields (`changes`) where given."""
    recipe = CONFIGS / f"demo_{stage}.yaml"
    run_folder = run_folder or folder / stage
    overrides = ["--run-folder", str(run_folder), "--data.path", str(folder / "data"), *changes]
    if stage in STAGE_BEFORE:
        overrides += ["--start-from", str(folder / STAGE_BEFORE[stage])]
    last_step = load_recipe(recipe, overrides).training.steps
    return Step(
        name=name or f"train {stage}",
        command=("-m", "pretrain.launch", "--ranks-per-node", str(ranks), str(recipe), *overrides),
        target=run_folder,
        # This file is what makes a checkpoint complete.
        outputs=(f"{run_folder.name}/checkpoints/step_{last_step:08d}/cola.json",),
        recipes=(recipe,),
        resumable=True,
        threads=max(1, _cores() // ranks),
    )


def _use_steps(folder: Path) -> list[Step]:
    exported, data, held_out, report = (folder / n for n in ("hf", "data", "held_out.json", "report.html"))
    policy_run = str(folder / "policy")
    return [
        Step(
            name="export",
            command=("checkpoint_tools/megatron_to_hf.py", "--run", policy_run, "--output", str(exported)),
            target=exported,
            outputs=("hf/config.json", "hf/model*.safetensors", "hf/tokenizer.json"),
            threads=_cores(),
        ),
        Step(
            name="held-out table",
            command=(
                *("evaluation/held_out.py", "--model", str(exported), "--data", str(data)),
                *("--output", str(held_out)),
            ),
            target=held_out,
            outputs=("held_out.json",),
            threads=_cores(),
        ),
        Step(
            name="report",
            command=("evaluation/report.py", "--demo-folder", str(folder), "--output", str(report)),
            target=report,
            outputs=("report.html", "summary.json"),
            threads=_cores(),
        ),
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def print_plan(folder: Path, steps: list[Step]) -> None:
    """List the steps, what a run would do with each, and the commands, ready to be copied."""
    for number, planned in enumerate(StepState(folder).plan(steps), start=1):
        would = {
            "skip": f"finished ({planned.seconds:.1f} s)",
            "resume": f"would resume (after {planned.seconds:.1f} s)",
            "run": "would run",
            "run anew": "would run anew, replacing what is there",
        }[planned.action]
        print(f"[{number:2d}/{len(steps)}] {planned.step.name}: {would}")
        print(f"        {shlex.join(('python', *planned.step.command))}")


def print_results(folder: Path, console: Console) -> None:
    """The held-out table, with the speed of each training stage below."""
    from evaluation.held_out import (
        held_out_table,
    )  # imports torch, which a dry run or a failure need not wait for
    from evaluation.report import read_held_out

    table = held_out_table(read_held_out(folder / "held_out.json"))
    table.add_section()
    speeds = json.loads((folder / "summary.json").read_text())["tokens_per_second"]
    for stage in STAGES:
        table.add_row(f"training speed, {stage} (tokens/s)", f"{speeds[stage]:,.0f}", "")
    console.print(table)


def run(options: DemoOptions) -> None:
    """Do what the options ask for."""
    if not CONFIGS.is_dir():
        raise UserError("configs/: not here; run this from the repository's root, e.g. with `make demo`")
    if options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: must be at least 1")
    steps = demo_steps(options.folder, options.ranks)
    if options.dry_run:
        print_plan(options.folder, steps)
        return
    seconds = finish_steps(options.folder, steps)
    console = Console()
    print_results(options.folder, console)
    console.print(f"{len(steps)} steps, {seconds:.0f} seconds. Look at {options.folder / 'report.html'}")


def finish_steps(folder: Path, steps: list[Step]) -> float:
    """Bring every step to its end, with progress on the terminal; returns their seconds.

    A step that fails, or an interruption, ends the program with its message and exit code.
    """
    display = ProgressDisplay(sys.stdout)
    try:
        return run_steps(folder, steps, display)
    except StepFailedError as failure:
        display.clear()
        print(failure, file=sys.stderr)
        sys.exit(STEP_FAILED_EXIT_CODE)
    except RunInterruptedError as interruption:
        display.clear()
        print(f"stopped by {interruption}; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)


def main() -> None:
    """Command line."""
    run(tyro.cli(DemoOptions, description=__doc__))


if __name__ == "__main__":
    run_cli(main)
