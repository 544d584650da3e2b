"""The figure of data_prep/corpus_summary.py: four panels that compare tokenized sources.

`draw_summary` gives the bytes of a PNG. Labels are ASCII: matplotlib's own font has no Chinese.
"""

import io
from collections.abc import Mapping
from typing import Protocol

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import offset_copy

from data_prep.figure_style import FAINT, HOUSE_STYLE

COLOURS = ("#2b62a8", "#c4704f", "#1f8a7d", "#7a5ea8", "#b8952f", "#4d5b69", "#a8476f", "#5b9bd5")
# Other colours than those of the sources, which mean something else.
REASON_COLOURS = ("#3c4a57", "#e0a458", "#9aa7b4", "#b5485d", "#7fb7a8", "#d9c8a9", "#6b7fd7", "#c9a0dc")
LINE_STYLES = ("-", (0, (5, 2)), (0, (1, 1.2)))  # once the colours are used up
PNG_DPI = 130
WIDTH_INCHES, MIN_HEIGHT_INCHES, SOURCE_INCHES = 11.5, 7.0, 0.34
PAD_INCHES = 0.12
BAR_HEIGHT = 0.6
LEGEND_COLUMNS, LEGEND_OFFSET_POINTS = 4, 34
LABEL_ROOM = 1.4  # length of the axis, times the longest bar
STYLE = {**HOUSE_STYLE, "legend.frameon": False, "lines.linewidth": 1.8}


class SourceFigures(Protocol):
    """What the figure shows of one source."""

    documents: int
    tokens: int
    length_histogram: list[int]
    dropped: dict[str, int]

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text a token."""
        ...


Sources = Mapping[str, SourceFigures]


def draw_summary(sources: Sources) -> bytes:
    """Draw all panels. Returns a PNG."""
    height_inches = max(MIN_HEIGHT_INCHES, 2 * (1.6 + SOURCE_INCHES * len(sources)))
    with matplotlib.style.context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=PAD_INCHES, h_pad=PAD_INCHES)
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout=layout)
        panels = figure.subplots(2, 2)
        draw_lengths(panels[0, 0], sources)
        draw_tokens(panels[0, 1], sources)
        draw_bytes_per_token(panels[1, 0], sources)
        draw_dropped(panels[1, 1], sources)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=PNG_DPI)
    return buffer.getvalue()


def draw_lengths(axes: Axes, sources: Sources) -> None:
    """Share of each source's documents by length, on an axis of powers of two."""
    shown = {name: source for name, source in sources.items() if source.documents}
    used = [np.flatnonzero(source.length_histogram) for source in shown.values()]
    low, high = (min(b[0] for b in used), max(b[-1] for b in used)) if used else (0, 1)
    bins = np.arange(low, high + 1)
    for number, (name, source) in enumerate(shown.items()):
        share = np.array(source.length_histogram, dtype=float)[bins] / source.documents
        style = LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)]
        edges = np.append(bins, high + 1) - 1  # bin b begins at 2^(b-1) tokens
        axes.stairs(share, edges, color=_colour(number), linestyle=style, linewidth=1.8, label=name)
    ticks = np.arange(low - 1, high + 1)
    ticks = ticks[:: max(1, -(-len(ticks) // 12))]
    axes.set_xticks(ticks, [power_of_two(int(tick)) for tick in ticks])
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set(
        title="Length of documents",
        xlabel="tokens a document, end-of-text included",
        ylabel="share of the source's documents",
    )
    axes.set_ylim(bottom=0)
    if shown:
        _legend_below(axes)


def draw_tokens(axes: Axes, sources: Sources) -> None:
    """Tokens of each source."""
    total = max(sum(source.tokens for source in sources.values()), 1)
    values = [source.tokens for source in sources.values()]
    labels = [f"{with_unit(value)} ({value / total:.0%})" for value in values]
    _draw_bars(axes, list(sources), values, labels)
    axes.xaxis.set_major_formatter(lambda value, _: with_unit(value))
    axes.set(title="Tokens", xlabel="tokens, train and validation")


def draw_bytes_per_token(axes: Axes, sources: Sources) -> None:
    """Fertility of each source."""
    values = [source.bytes_per_token or 0.0 for source in sources.values()]
    _draw_bars(axes, list(sources), values, [f"{value:.2f}" if value else "no tokens" for value in values])
    axes.set(title="Bytes a token", xlabel="bytes of UTF-8 text a token")


def draw_dropped(axes: Axes, sources: Sources) -> None:
    """Dropped rows of each source by reason, as a share of its rows."""
    reasons = sorted({reason for source in sources.values() for reason in source.dropped})
    rows = [max(1, source.documents + sum(source.dropped.values())) for source in sources.values()]
    left = np.zeros(len(sources))
    bars = None
    for number, reason in enumerate(reasons):
        share = np.array([source.dropped.get(reason, 0) for source in sources.values()]) / rows
        bars = axes.barh(
            list(sources),
            share,
            left=left,
            height=BAR_HEIGHT,
            color=REASON_COLOURS[number % len(REASON_COLOURS)],
            label=reason,
        )
        left += share
    axes.set(title="Dropped rows", xlabel="share of the source's rows")
    if bars is None:
        axes.barh(list(sources), left)
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=FAINT)
        axes.set_xticks([])
    else:
        counts = [sum(source.dropped.values()) for source in sources.values()]
        labels = [
            f"{part:.2%} ({count:,})" if count else "none" for part, count in zip(left, counts, strict=True)
        ]
        axes.bar_label(bars, labels, padding=4, fontsize=9)
        axes.xaxis.set_major_formatter(
            lambda share, _: f"{share:.3g}" if not share else f"{100 * share:.3g}%"
        )
        _legend_below(axes)
    _tidy_bars(axes, max(left))


def _draw_bars(axes: Axes, names: list[str], values: list[int] | list[float], labels: list[str]) -> None:
    colours = [_colour(number) for number in range(len(names))]
    bars: BarContainer = axes.barh(names, values, height=BAR_HEIGHT, color=colours)
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    _tidy_bars(axes, max(values))


def _tidy_bars(axes: Axes, longest: float) -> None:
    axes.invert_yaxis()  # the first source on top
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, LABEL_ROOM * longest or 1)


def _legend_below(axes: Axes) -> None:
    """Below the axis, where it hides nothing; at the same distance whatever the height of the panel."""
    below = offset_copy(axes.transAxes, axes.get_figure(root=True), y=-LEGEND_OFFSET_POINTS, units="points")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=LEGEND_COLUMNS)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def with_unit(count: float) -> str:
    """Write a count in three digits: 950, 12.3 M, 627 G."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if round(count / factor, 3) >= 1:  # 999.9 M is 1 G
            return f"{count / factor:.3g}{unit}"
    return f"{count:.3g}"


def power_of_two(exponent: int) -> str:
    """Write 2^exponent as on a ruler: 1/2, 1, 512, 1k, 2M."""
    if exponent < 0:
        return "0"
    for shift, unit in ((20, "M"), (10, "k")):
        if exponent >= shift:
            return f"{2 ** (exponent - shift)}{unit}"
    return str(2**exponent)
