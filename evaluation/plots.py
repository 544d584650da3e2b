"""The figures of the run report and of the README, drawn with matplotlib.

`report_figures` and `ablation_figures` give SVG images as addresses that an `<img>` of a self-contained
page can hold; `readme_figure` writes a PNG.
"""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_prep.figure_style import HOUSE_STYLE
from data_prep.output_files import partial_path, publish_file
from evaluation import panels
from evaluation.held_out_figures import HeldOutFigures
from evaluation.run_metrics import RunMetrics

COLUMN_INCHES = (5.0, 3.1)  # one column of the page, and all of a phone's width
README_INCHES = (10.0, 4.15)
PNG_DPI = 120
STYLE = {
    **HOUSE_STYLE,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "cola",  # the same figures give the same bytes
}

Draw = Callable[[Axes], None]


def render(draws: Sequence[Draw], *, kind: str, size_inches: tuple[float, float] = COLUMN_INCHES) -> bytes:
    """Draw panels side by side and encode them as `kind` ("svg" or "png")."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=size_inches, layout="constrained")
        for draw, axes in zip(draws, figure.subplots(1, len(draws), squeeze=False)[0], strict=True):
            draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def svg_data_uri(draw: Draw) -> str:
    """One panel as an SVG image address."""
    return "data:image/svg+xml;base64," + base64.b64encode(render([draw], kind="svg")).decode()


def base_level(idm: RunMetrics, figures: HeldOutFigures) -> tuple[str, float]:
    """The frozen base's loss: on the validation batches of the IDM stage, else on the held-out blocks."""
    measured = idm.series("base_loss", "validation").values
    return "frozen base", measured[-1] if measured else figures.base_loss


def report_figures(runs: Mapping[str, RunMetrics], figures: HeldOutFigures) -> dict[str, str]:
    """Every figure of the report by name, as image addresses; `runs` has base, idm and policy."""
    base, idm, policy = runs["base"], runs["idm"], runs["policy"]
    num_actions = figures.num_actions
    most_used = {"always the most used action": max(figures.action_counts) / sum(figures.action_counts)}
    draws: dict[str, Draw] = {
        "base_loss": lambda axes: panels.draw_losses(
            axes, base, title="Stage 1, base: next-token loss", colour=panels.BASE
        ),
        "idm_loss": lambda axes: panels.draw_losses(
            axes,
            idm,
            title="Stage 2, IDM + world model: next-token loss",
            colour=panels.IDM,
            level=base_level(idm, figures),
        ),
        "policy_loss": lambda axes: panels.draw_losses(
            axes,
            policy,
            title="Stage 3, policy: action loss",
            colour=panels.POLICY,
            level=(f"chance, ln {num_actions}", math.log(num_actions)),
        ),
        "policy_accuracy": lambda axes: panels.draw_policy_accuracy(
            axes, policy, title="Stage 3, policy: guesses the IDM's action", levels=most_used
        ),
        "action_usage": lambda axes: panels.draw_action_usage(axes, idm, title="Share of tokens by action"),
        "alive_actions": lambda axes: panels.draw_alive_actions(
            axes, idm, title="Actions in use", num_actions=num_actions
        ),
        "source_losses": lambda axes: panels.draw_source_losses(
            axes, figures, title="Held-out loss by source"
        ),
        "throughput": lambda axes: panels.draw_throughput(
            axes, median_speeds(runs), title="Training speed, median"
        ),
    }
    return {name: svg_data_uri(draw) for name, draw in draws.items()}


def median_speeds(runs: Mapping[str, RunMetrics]) -> dict[str, float]:
    """Median tokens a second of each stage that measured them."""
    speeds = {stage: run.median_tokens_per_second() for stage, run in runs.items()}
    return {stage: speed for stage, speed in speeds.items() if speed is not None}


def ablation_figures(runs: Mapping[str, RunMetrics], level: tuple[str, float]) -> dict[str, str]:
    """Validation loss and actions in use of the compared runs, by name."""
    losses = {name: run.objective("validation") for name, run in runs.items()}
    alive = {name: run.series("alive_actions") for name, run in runs.items()}
    return {
        "ablation_loss": svg_data_uri(
            lambda axes: panels.draw_runs(
                axes, losses, title="Validation loss", ylabel="loss, nats", level=level
            )
        ),
        "ablation_alive": svg_data_uri(
            lambda axes: panels.draw_runs(axes, alive, title="Actions in use", ylabel="actions")
        ),
    }


def readme_figure(runs: Mapping[str, RunMetrics], figures: HeldOutFigures, output: Path) -> None:
    """Write the README's figure: IDM-stage losses, action usage and held-out losses side by side (PNG)."""
    draws: list[Draw] = [
        lambda axes: panels.draw_losses(
            axes, runs["idm"], title="Loss given IDM actions, stage 2", colour=panels.IDM,
            level=base_level(runs["idm"], figures),
        ),
        lambda axes: panels.draw_action_usage(axes, runs["idm"], title="Share of tokens of each action"),
        lambda axes: panels.draw_held_out_bars(axes, figures, title="Held-out next-token loss"),
    ]  # fmt: skip
    partial_path(output).write_bytes(render(draws, kind="png", size_inches=README_INCHES))
    publish_file(output)
