"""Compare output forms, regularisers and assignments of actions on the demo's base and data.

    python demo/run_ablation.py [--folder runs/demo] [--ranks 2] [--dry-run]

Needs a finished `make demo`, whose own idm run is one of those compared. Trains the other variants of stage idm
into <folder>/ablation, writes <folder>/ablation.json and renews the report, which then shows the curves. Run
again, it skips what is finished and resumes what was interrupted.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from data_prep.errors import UserError, run_cli
from data_prep.output_files import write_json_whole
from demo.run_demo import finish_steps, print_plan, training_step
from demo.step_state import Step
from evaluation.ablation import ABLATION_FILE, read_ablation
from evaluation.run_metrics import read_metrics
from pretrain.config import METRICS_FILE

# The paper's coefficient goes with its regulariser, the demo's with the other.
TOKEN = ("--actions.regulariser", "token", "--actions.regulariser-coefficient", "0.001")
REFERENCE = ("--actions.output", "reference")
VQ = ("--actions.assignment", "vq")
DEMO_VARIANT = "residual, usage (the demo)"
# By name in the report: run folder, and what differs from configs/demo_idm.yaml.
VARIANTS = {
    "reference, token (published)": ("reference_token", (*REFERENCE, *TOKEN)),
    "reference, usage": ("reference_usage", REFERENCE),
    "residual, token": ("residual_token", TOKEN),
    "residual, VQ-VAE assignment": ("residual_vq", VQ),
}


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """Train the variants of stage idm on the demo's base and compare them."""

    folder: Path = Path("runs/demo")
    """Folder of a finished demo."""
    ranks: int = 2
    """Training processes; each uses its share of the cores."""
    dry_run: bool = False
    """List the runs and what would be done with each, then stop."""


def ablation_steps(folder: Path, ranks: int) -> list[Step]:
    """One training run a variant."""
    return [
        training_step(folder, "idm", ranks, name=name, run_folder=folder / "ablation" / run, changes=changes)
        for name, (run, changes) in VARIANTS.items()
    ]


def write_list(folder: Path) -> Path:
    """Write ablation.json: every variant's metrics file and what its last validation found."""
    metrics = {DEMO_VARIANT: Path("idm") / METRICS_FILE}
    metrics |= {name: Path("ablation") / run / METRICS_FILE for name, (run, _) in VARIANTS.items()}
    runs = [
        {"name": name, "metrics": str(path), "figures": final_figures(folder / path)}
        for name, path in metrics.items()
    ]
    write_json_whole(folder / ABLATION_FILE, {"runs": runs})
    return folder / ABLATION_FILE


def final_figures(metrics_file: Path) -> dict[str, float]:
    """What the last validation of an idm run found, with argmax actions."""
    last = read_metrics(metrics_file).validation[-1]
    if None in (last.prediction_loss, last.base_loss, last.alive_actions, last.action_perplexity):
        raise UserError(f"{metrics_file}: its last validation is not that of an idm run; train it anew")
    assert last.prediction_loss and last.base_loss and last.alive_actions and last.action_perplexity
    return {
        "loss": last.prediction_loss,
        "loss / base": last.prediction_loss / last.base_loss,
        "alive actions": last.alive_actions,
        "action perplexity": last.action_perplexity,
    }


def print_table(path: Path) -> None:
    """The final figures on the terminal."""
    runs = read_ablation(path)
    table = Table(title="Stage idm, held-out, argmax actions")
    table.add_column("variant")
    for name in runs[0].figures:
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(run.name, *(f"{value:.4g}" for value in run.figures.values()))
    Console().print(table)


def run(options: AblationOptions) -> None:
    """Train what is missing, write the list, renew the report."""
    report = options.folder / "report.html"
    if not report.is_file():
        raise UserError(
            f"{report}: not there; run make demo first, its base and data are what is compared on"
        )
    steps = ablation_steps(options.folder, options.ranks)
    if options.dry_run:
        print_plan(options.folder / "ablation", steps)
        return
    finish_steps(options.folder / "ablation", steps)
    path = write_list(options.folder)
    arguments = ("--demo-folder", str(options.folder), "--output", str(report), "--overwrite")
    subprocess.run([sys.executable, "evaluation/report.py", *arguments], check=True)
    print_table(path)


def main() -> None:
    """Command line."""
    run(tyro.cli(AblationOptions, description=__doc__))


if __name__ == "__main__":
    run_cli(main)
