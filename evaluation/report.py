"""One HTML page that shows what a run learned, and its figures as JSON.

    python evaluation/report.py --demo-folder runs/demo --output runs/demo/report.html

Reads {base,idm,policy}/metrics.jsonl, the exported model (hf), the blended data (data) and held_out.json
in the demo folder, and ablation.json where there is one. Writes the page, self-contained in one file, and
summary.json in the demo folder; with --readme-figure also the README's figure (PNG).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from data_prep.blended_data import open_blend
from data_prep.errors import UserError, run_cli
from data_prep.output_files import write_json_whole, write_text_whole
from evaluation.ablation import ABLATION_FILE, AblationRun, read_ablation
from evaluation.action_vocabulary import (
    DEFAULT_TOKENS,
    DEFAULT_TOP,
    ActionEntry,
    action_token_probs,
    top_tokens,
)
from evaluation.checks import output_problems, raise_problems
from evaluation.diversity import ContinuationSettings, DiversityResult, compare_modes, settings_problems
from evaluation.held_out_blocks import check_fit, document_prompts, held_out_blocks
from evaluation.held_out_figures import HeldOutFigures
from evaluation.huggingface_model import load_exported_model
from evaluation.plots import median_speeds, readme_figure
from evaluation.report_page import ReportContent, render_page
from evaluation.run_facts import machine_facts, stage_seconds, step_seconds, version_facts
from evaluation.run_metrics import RunMetrics, read_metrics
from pretrain.config import METRICS_FILE

STAGES = ("base", "idm", "policy")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(ContinuationSettings):
    """Make the report of a finished demo."""

    demo_folder: Path
    """Folder with base, idm, policy (runs), hf (exported model), data (blend) and held_out.json."""
    output: Path
    """HTML file to write."""
    ablation: Path | None = None
    """List of ablation runs; by default ablation.json in the demo folder, if it is there."""
    readme_figure: Path | None = None
    """PNG file to write the README's figure to; none by default."""
    overwrite: bool = False
    """Replace an output file that exists."""


def missing_inputs(demo_folder: Path) -> list[str]:
    """What the demo folder lacks, each with the command that makes it."""
    needed = {f"{stage}/{METRICS_FILE}": f"train the {stage} stage" for stage in STAGES} | {
        "hf/config.json": "export with checkpoint_tools/megatron_to_hf.py",
        "data/blend.json": "blend with data_prep/blend.py",
        "held_out.json": "measure with evaluation/held_out.py",
    }
    return [
        f"{demo_folder / name} is not there ({remedy})"
        for name, remedy in needed.items()
        if not (demo_folder / name).is_file()
    ]


def read_held_out(path: Path) -> HeldOutFigures:
    """The figures that `held_out.py` wrote; `UserError` where they are not all there."""
    try:
        return TypeAdapter(HeldOutFigures).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: {where}: {first['msg']}; measure anew with evaluation/held_out.py"
        ) from None


def most_used_actions(figures: HeldOutFigures, count: int) -> list[int]:
    """The `count` actions that the IDM uses most, most used first."""
    return sorted(range(figures.num_actions), key=lambda action: -figures.action_counts[action])[:count]


def measure_model(config: ReportConfig, figures: HeldOutFigures) -> tuple[list[ActionEntry], DiversityResult]:
    """What needs the model itself: the words of each action, and continuations."""
    data = open_blend(config.demo_folder / "data")
    exported = load_exported_model(config.demo_folder / "hf")
    check_fit(data, exported, figures.sequence_length_tokens)
    actions = most_used_actions(figures, config.continuations)
    raise_problems(settings_problems(config, actions, exported))
    blocks = held_out_blocks(data, sequence_length=figures.sequence_length_tokens, tokens=DEFAULT_TOKENS)
    probs_AV = action_token_probs(exported.model, torch.cat(list(blocks.values())))
    entries = top_tokens(probs_AV, figures.action_counts, exported.tokenizer, DEFAULT_TOP)
    prompts = document_prompts(data, exported.tokenizer, config.prompt_tokens, config.prompts_per_source)
    return entries, compare_modes(exported, prompts, actions, config)


def summary(
    figures: HeldOutFigures, runs: Mapping[str, RunMetrics], diversity: DiversityResult, demo_folder: Path
) -> dict[str, object]:
    """Every measured figure of the demo, for machines."""
    measured = {**asdict(figures), "tokens_per_second": median_speeds(runs)}
    measured["diversity"] = {mode.name: asdict(mode.figures) for mode in diversity.modes}
    measured["training_seconds"] = stage_seconds(runs)
    measured["machine"] = machine_facts()
    measured["versions"] = version_facts()
    if seconds := step_seconds(demo_folder):
        measured["step_seconds"] = seconds
    return measured


def run(config: ReportConfig) -> None:
    """Write the page, summary.json and, if asked for, the README's figure."""
    raise_problems(output_problems(config.output, config.overwrite) + missing_inputs(config.demo_folder))
    runs = {stage: read_metrics(config.demo_folder / stage / METRICS_FILE) for stage in STAGES}
    figures = read_held_out(config.demo_folder / "held_out.json")
    entries, diversity = measure_model(config, figures)
    content = ReportContent(
        demo_folder=config.demo_folder,
        figures=figures,
        runs=runs,
        entries=entries,
        diversity=diversity,
        ablation=_ablation_runs(config),
    )
    page = render_page(content)
    write_json_whole(
        config.demo_folder / "summary.json", summary(figures, runs, diversity, config.demo_folder)
    )
    if config.readme_figure is not None:
        readme_figure(runs, figures, config.readme_figure)
    write_text_whole(config.output, page)


def _ablation_runs(config: ReportConfig) -> list[AblationRun]:
    path = config.ablation or config.demo_folder / ABLATION_FILE
    return read_ablation(path) if config.ablation or path.is_file() else []


def main() -> None:
    """Command line."""
    config = tyro.cli(ReportConfig, description=__doc__)
    run(config)
    Console().print(f"written to {config.output} and {config.demo_folder / 'summary.json'}")


if __name__ == "__main__":
    run_cli(main)
