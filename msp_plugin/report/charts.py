"""Charts as SVG images inside the page, drawn by matplotlib in the colours of the light theme.

The page's style inverts their lightness in the dark theme. Text in them stays text, which can be searched. Equal charts
give equal bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from msp_plugin.errors import PluginError
from msp_plugin.records.statistics import finite_pairs
from msp_plugin.report.palette import INK_MARK, MARKS, PAGE, SERIES
from msp_plugin.report.text import count, short, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS, _SERIES = PAGE["light"], SERIES["light"]
_INK, _MUTED = _COLORS["ink"], _COLORS["muted"]
#: Most points of a series in a drawing and in its table; longer series are thinned evenly.
MOST_POINTS, MOST_NUMBERS = 1500, 200
#: Left, bottom, width and height of the axes; the same in all charts, so that they line up.
_FRAME = (0.17, 0.15, 0.81, 0.8)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "msp_plugin",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _COLORS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
#: Leaves out the parts of matplotlib's metadata that change between versions and runs.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Series:
    """One line or cloud of points.

    Args:
        label: its name in the legend.
        points: (x, y); points that are not finite are left out.
        slot: number of its colour and mark; -1 draws in the colour of text.
        line: ``""`` for points alone, ``"line"``, or ``"steps"``: each value holds until the next point.
        errors: half lengths of vertical bars, one per point.
        strong: True for larger marks, e.g. means beside single values.
    """

    label: str
    points: Sequence[tuple[float | None, float | None]]
    slot: int = 0
    line: str = ""
    errors: Sequence[float | None] = ()
    strong: bool = False

    @property
    def drawn(self) -> list[tuple[float, float]]:
        """The finite points."""
        return finite_pairs(self.points)

    @property
    def numbers(self) -> list[tuple[float, float]]:
        """The finite points, thinned to what a table shows."""
        return thin(self.drawn, MOST_NUMBERS)

    @property
    def color(self) -> str:
        """The CSS custom property of its colour."""
        return f"--c{self.slot % len(_SERIES)}" if self.slot >= 0 else "--ink"

    @property
    def mark(self) -> str:
        """Its mark as text."""
        return (MARKS[self.slot % len(MARKS)] if self.slot >= 0 else INK_MARK)[1]


@dataclass(frozen=True)
class Chart:
    """The axes of a chart, its series and lines, and its images.

    Args:
        title: the chart in words, for readers who cannot see it.
        lines: (y, label) of horizontal lines.
        log_x: logarithmic x axis, with zero at its left end.
        log_y: logarithmic y axis.
        diagonal: draw y = x, and give both axes the same limits.
        caption: text below the chart.
        svg: the drawing; empty before ``draw``.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    lines: tuple[tuple[float, str], ...] = ()
    log_x: bool = False
    log_y: bool = False
    diagonal: bool = False
    caption: str = ""
    svg: str = field(default="", repr=False)

    @property
    def image(self) -> str:
        """The drawing as a data URL."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"

    @property
    def legend(self) -> list[Series]:
        """One series for each label, in the order of colours, those in the colour of text last."""
        by_label = {s.label: s for s in self.series if s.drawn and s.label}
        return sorted(by_label.values(), key=lambda s: (s.slot < 0, s.slot))


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most ``most`` of the points, evenly spaced, including the last."""
    if len(points) <= most:
        return list(points)
    step = (len(points) - 1) / (most - 1)
    return [points[round(i * step)] for i in range(most)]


def draw(chart: Chart) -> Chart | None:
    """Return the chart with its drawing; None if it has no finite point.

    Raises:
        PluginError: matplotlib is not installed.
    """
    if not any(series.drawn for series in chart.series):
        return None
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib") from None
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE}):
        figure = Figure(figsize=(4.4, 3.0))
        axes = figure.add_axes(_FRAME)
        _axes(axes, chart)
        for series in chart.series:
            _series(axes, series)
        for value, label in sorted(set(chart.lines)):
            axes.axhline(value, color=_INK, linewidth=1.0, linestyle=(0, (5, 3)))
            axes.annotate(
                label,
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=8.0,
            )
        axes.minorticks_off()
        if chart.diagonal:
            _diagonal(axes, chart)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return replace(chart, svg=" ".join(buffer.getvalue().split()))  # drops the indentation


def missing(package: str) -> PluginError:
    """Return the error that a package which the report needs is not installed."""
    return PluginError(
        f"a report needs {package}, which is not installed", hint="pip install 'msp_plugin[report]'"
    )


def _axes(axes: Axes, chart: Chart) -> None:
    """Set the labels, the scales and the ticks of a chart."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    values = [x for series in chart.series for x, _ in series.drawn if x > 0]
    if chart.log_x and not values:  # all points are at zero: one tick is enough
        axes.set_xticks([0.0])
    elif chart.log_x:
        least, wide = min(values), max(values) / min(values) > 300
        if any(x <= 0 for series in chart.series for x, _ in series.drawn):
            axes.set_xscale("symlog", linthresh=least, linscale=0.4)
            ticks = [step * 10.0**k for k in range(15) for step in (1, 2, 5)]
            ticks = [x for x in ticks if least <= x <= max(values)]
            decades = [x for x in ticks if str(x)[0] == "1"]
            axes.set_xticks([0.0, *(ticks if len(ticks) < 6 else decades)])
        else:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    if not chart.diagonal:
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    if chart.log_y and all(y > 0 for series in chart.series for _, y in series.drawn):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _series(axes: Axes, series: Series) -> None:
    """Draw a series: its line, its marks and its bars."""
    points = thin(series.drawn, MOST_POINTS)
    if not points:
        return
    x, y = zip(*points, strict=True)
    color = _SERIES[series.slot % len(_SERIES)] if series.slot >= 0 else _INK
    mark = (MARKS[series.slot % len(MARKS)] if series.slot >= 0 else INK_MARK)[0]
    if series.line:
        style = "steps-post" if series.line == "steps" else "default"
        axes.plot(x, y, color=color, linewidth=1.3, drawstyle=style)
        x, y = ((x[-1],), (y[-1],)) if series.line == "steps" else (x, y)
    size = 7.0 if series.strong else 4.0
    alpha = 1.0 if series.strong or series.line else 0.6
    axes.plot(x, y, linestyle="", marker=mark, markersize=size, color=color, markeredgewidth=0, alpha=alpha)
    if series.errors:
        bars = [e if e is not None else 0.0 for e in series.errors]
        axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=color, elinewidth=1.1, capsize=2.5)


def _diagonal(axes: Axes, chart: Chart) -> None:
    """Draw y = x, and give both axes the same ticks and limits."""
    from matplotlib.ticker import MaxNLocator

    values = [value for series in chart.series for point in series.drawn for value in point]
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or abs(high) or 1.0
    ends = (low - margin, high + margin)
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    ticks = [tick for tick in ticks if ends[0] <= tick <= ends[1]]
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.plot(ends, ends, color=_MUTED, linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)
    axes.set_xlim(ends)
    axes.set_ylim(ends)


def number_of(value: float) -> str:
    """Return a coordinate as text for the table beside a chart."""
    return count(value) if abs(value) >= 1000 else short(value)
