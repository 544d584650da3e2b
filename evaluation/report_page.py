"""Turn what was measured into the report's HTML: texts, numbers and figures for `report_template.html`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.ablation import AblationRun
from evaluation.action_vocabulary import ActionEntry
from evaluation.diversity import MODE_TITLES, DiversityResult
from evaluation.held_out import targets
from evaluation.held_out_figures import HeldOutFigures
from evaluation.plots import ablation_figures, base_level, median_speeds, report_figures
from evaluation.run_facts import machine_facts, run_configs, stage_seconds, step_seconds, version_facts
from evaluation.run_metrics import RunMetrics

TEMPLATE = "report_template.html"
ACTION_MODES = ("fixed_actions", "first_actions")  # each continuation stands for an action: all are shown
SHOWN_SAMPLES = 4  # of the other modes; all count in the figures


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything that the page shows, as measured."""

    demo_folder: Path
    figures: HeldOutFigures
    runs: Mapping[str, RunMetrics]
    """Metrics of the stages base, idm and policy."""
    entries: Sequence[ActionEntry]
    """The vocabulary of every action."""
    diversity: DiversityResult
    ablation: Sequence[AblationRun]
    """Runs of the ablation; empty leaves the section out."""


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One row of the headline table."""

    label: str
    meaning: str
    loss: float
    kind: str
    """base, idm, policy or random: decides the colour."""
    width: float
    """Length of the bar in percent."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One continuation of a prompt."""

    label: str
    text: str


@dataclass(frozen=True, kw_only=True)
class PromptView:
    """A prompt with its continuations by mode."""

    source: str
    text: str
    modes: list[tuple[str, list[Card]]]


@dataclass(frozen=True, kw_only=True)
class FactTable:
    """A titled list of facts."""

    title: str
    rows: Mapping[str, str]


def loss_rows(figures: HeldOutFigures) -> list[LossRow]:
    """The losses of the headline table with what each means."""
    rows = [
        ("Base model", "the frozen Llama alone", figures.base_loss, "base"),
        (
            "World model, IDM's actions",
            "told the action that leads to the right token",
            figures.idm_loss,
            "idm",
        ),
        (
            "World model, policy's mixture",
            "all actions, weighted by the policy",
            figures.mixture_loss,
            "policy",
        ),
        (
            "World model, policy's likeliest action",
            "no hedging: dear wherever the guess is wrong",
            figures.greedy_loss,
            "policy",
        ),
        ("World model, random actions", "actions drawn blindly", figures.random_loss, "random"),
    ]
    longest = max(row[2] for row in rows)
    return [
        LossRow(label=label, meaning=meaning, loss=loss, kind=kind, width=100 * loss / longest)
        for label, meaning, loss, kind in rows
    ]


def prompt_views(diversity: DiversityResult) -> list[PromptView]:
    """Continuations arranged by prompt; of sampled ones only the first few are shown."""
    views = []
    for index, prompt in enumerate(diversity.prompts):
        modes = []
        for mode in diversity.modes:
            pairs = zip(mode.labels, mode.texts[index], strict=True)
            cards = [Card(label=label, text=text) for label, text in pairs]
            shown = cards if mode.name in ACTION_MODES else cards[:SHOWN_SAMPLES]
            modes.append((MODE_TITLES[mode.name], shown))
        views.append(PromptView(source=prompt.source, text=prompt.text, modes=modes))
    return views


def fact_tables(content: ReportContent) -> list[FactTable]:
    """Machine, versions, stages and steps."""
    speeds, seconds = median_speeds(content.runs), stage_seconds(content.runs)
    stages = {}
    for stage, run in content.runs.items():
        parts = [f"{run.train[-1].step:,} steps"]
        if (tokens := run.train[-1].consumed_tokens) is not None:
            parts.append(f"{tokens / 1e6:,.2f} M tokens")
        if stage in seconds:
            parts.append(f"{seconds[stage]:,.0f} s")
        if stage in speeds:
            parts.append(f"{speeds[stage]:,.0f} tokens/s")
        stages[stage] = ", ".join(parts)
    steps = {name: f"{value:,.1f} s" for name, value in step_seconds(content.demo_folder).items()}
    tables = [
        FactTable(title="Training", rows=stages),
        FactTable(title="Seconds of each step", rows=steps),
        FactTable(title="Machine", rows=machine_facts()),
        FactTable(title="Versions", rows=version_facts()),
    ]
    return [table for table in tables if table.rows]


def render_page(content: ReportContent) -> str:
    """The whole page; everything it needs is inside it."""
    figures = content.figures
    images = report_figures(content.runs, figures)
    if content.ablation:
        compared = {run.name: run.metrics for run in content.ablation}
        images |= ablation_figures(compared, base_level(content.runs["idm"], figures))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE).render(
        figures=figures,
        images=images,
        targets=targets(figures),
        loss_rows=loss_rows(figures),
        entries=sorted(content.entries, key=lambda entry: -entry.usage),
        most_used=max(entry.usage for entry in content.entries),
        prompts=prompt_views(content.diversity),
        modes=[(MODE_TITLES[mode.name], mode.figures) for mode in content.diversity.modes],
        ablation=content.ablation,
        ablation_columns=sorted({name for run in content.ablation for name in run.figures}),
        facts=fact_tables(content),
        configs=run_configs(content.runs),
        folder=content.demo_folder,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
