"""The single panels that the report's figures and the README's figure are made of.

Each function draws measured series on matplotlib axes it is given. Labels are ASCII: matplotlib's own
font has no Chinese.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from data_prep.figure_style import FAINT, INK
from evaluation.held_out_figures import HeldOutFigures
from evaluation.run_metrics import RunMetrics, Series

BASE, IDM, POLICY, RANDOM = "#8793a0", "#2b62a8", "#1f8a7d", "#c4704f"
RUN_COLOURS = (IDM, RANDOM, POLICY, "#7a5ea8", "#b8952f", "#4d5b69", "#a8476f", "#5b9bd5")
STAGE_COLOURS = {"base": BASE, "idm": IDM, "policy": POLICY}
LEVEL_LINE: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1}
ACTION_MAP = "Blues"
DARKEST_SHARE = 4.0  # in the usage map, times the even share 1/A; what is used more is as dark


def draw_losses(
    axes: Axes, run: RunMetrics, *, title: str, colour: str, level: tuple[str, float] | None = None
) -> None:
    """Train and validation loss over steps in nats, with a dashed level to compare with."""
    train, validation = run.objective(), run.objective("validation")
    axes.plot(train.steps, train.values, color=colour, alpha=0.45, linewidth=1.1, label="train")
    if validation.steps:
        axes.plot(validation.steps, validation.values, "o-", color=colour, markersize=3.5, label="validation")
    shown = train.values + validation.values
    if level is not None:
        label, value = level
        axes.axhline(value, **LEVEL_LINE, label=f"{label}, {value:.2f}")
        shown = [*shown, value]
    # The first steps of a run tower over the rest; the axis follows the second-highest twentieth instead.
    low, high = min(shown), float(np.quantile(shown, 0.95))
    if high > low:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.4 * (high - low))
    axes.set(title=title, xlabel="step", ylabel="loss, nats")
    axes.legend(loc="best")


def draw_action_usage(axes: Axes, run: RunMetrics, *, title: str) -> None:
    """Heat map of each action's share of tokens over steps, the finally most used on top."""
    steps, fractions_TA = run.action_fractions()
    num_actions = fractions_TA.shape[1]
    final_A = fractions_TA[-max(1, len(steps) // 4) :].mean(0)
    order = np.argsort(-final_A)
    image = axes.imshow(
        fractions_TA.T[order],
        aspect="auto",
        interpolation="nearest",
        cmap=ACTION_MAP,
        vmin=0,
        vmax=DARKEST_SHARE / num_actions,
        extent=(steps[0], max(steps[-1], steps[0] + 1), num_actions, 0),
    )
    axes.grid(False)
    axes.set(title=title, xlabel="step", ylabel="actions, by final use")
    bar = axes.figure.colorbar(image, ax=axes, extend="max", pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def draw_alive_actions(axes: Axes, run: RunMetrics, *, title: str, num_actions: int) -> None:
    """Actions in use and the perplexity of their usage over steps."""
    for name, label, style in (("alive_actions", "in use", "-"), ("action_perplexity", "perplexity", "--")):
        series = run.series(name)
        axes.plot(series.steps, series.values, style, color=IDM, label=label)
    axes.axhline(num_actions, color=FAINT, linewidth=1, linestyle=(0, (1, 2)))
    axes.set(title=title, xlabel="step", ylabel="actions", ylim=(0, num_actions * 1.08))
    axes.legend(loc="lower right")


def draw_policy_accuracy(axes: Axes, run: RunMetrics, *, title: str, levels: Mapping[str, float]) -> None:
    """Share of positions where the policy's likeliest action is the IDM's, against levels of guessing."""
    for split, alpha in (("train", 0.45), ("validation", 1.0)):
        series = run.series("action_accuracy", "train" if split == "train" else "validation")
        style = "-" if split == "train" else "o-"
        if series.steps:
            axes.plot(
                series.steps, series.values, style, color=POLICY, alpha=alpha, markersize=3.5, label=split
            )
    for label, value in levels.items():
        axes.axhline(value, **LEVEL_LINE, label=f"{label}, {value:.1%}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set(title=title, xlabel="step", ylabel="accuracy")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")


def draw_throughput(axes: Axes, tokens_per_second: Mapping[str, float], *, title: str) -> None:
    """Median training throughput of each stage."""
    stages = list(tokens_per_second)
    bars = axes.barh(
        stages[::-1],
        [tokens_per_second[stage] for stage in stages[::-1]],
        color=[STAGE_COLOURS[stage] for stage in stages[::-1]],
        height=0.55,
    )
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)
    axes.set(title=title, xlabel="tokens per second")


def draw_source_losses(axes: Axes, figures: HeldOutFigures, *, title: str) -> None:
    """Base, mixture and IDM-action loss of every source."""
    sources = list(figures.per_source)
    kinds = (("base", BASE), ("mixture", POLICY), ("idm", IDM))
    width = 0.26
    for index, (kind, colour) in enumerate(kinds):
        values = [getattr(figures.per_source[source], f"{kind}_loss") for source in sources]
        places = np.arange(len(sources)) + (index - 1) * width
        label = {"base": "base", "mixture": "policy mixture", "idm": "IDM actions"}[kind]
        bars = axes.bar(places, values, width=width * 0.92, color=colour, label=label)
        axes.bar_label(bars, fmt="{:.1f}", fontsize=8, padding=1)
    axes.set_xticks(range(len(sources)), [source.replace("_", " ") for source in sources])
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.22)
    axes.set(title=title, ylabel="loss, nats")
    axes.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1)


def draw_held_out_bars(axes: Axes, figures: HeldOutFigures, *, title: str) -> None:
    """The four losses of the headline table."""
    rows = (
        ("base", figures.base_loss, BASE),
        ("IDM\nactions", figures.idm_loss, IDM),
        ("policy\nmixture", figures.mixture_loss, POLICY),
        ("random\nactions", figures.random_loss, RANDOM),
    )
    bars = axes.bar(
        [row[0] for row in rows], [row[1] for row in rows], color=[row[2] for row in rows], width=0.62
    )
    axes.bar_label(bars, fmt="{:.2f}", padding=2)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    axes.set(title=title, ylabel="loss, nats")


def draw_runs(
    axes: Axes, runs: Mapping[str, Series], *, title: str, ylabel: str, level: tuple[str, float] | None = None
) -> None:
    """One line a run, for comparisons."""
    for (name, series), colour in zip(
        runs.items(), RUN_COLOURS * (1 + len(runs) // len(RUN_COLOURS)), strict=False
    ):
        axes.plot(series.steps, series.values, color=colour, label=name)
    if level is not None:
        axes.axhline(level[1], **LEVEL_LINE, label=f"{level[0]}, {level[1]:.2f}")
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=8)
