"""Charts as SVG inside the page, drawn by matplotlib, coloured by the page's CSS.

Colours are drawn as stand-ins and then become custom properties of the page, so that one drawing serves the
light and the dark theme. Text stays text. Equal charts give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from msp_plugin.errors import PluginError
from msp_plugin.report.palette import INK_MARK, MARKS, SERIES
from msp_plugin.report.statistics import finite_values
from msp_plugin.report.text import count, short, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Points beyond these are thinned evenly in a drawing, and beyond the second number in its table.
MOST_POINTS, MOST_NUMBERS = 1500, 200
#: Stand-ins of the page's colours, which occur nowhere else.
_INK, _MUTED, _RULE = "#010101", "#010102", "#010103"
_STAND_INS = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule"} | {
    f"#0102{i:02x}": f"--c{i}" for i in range(len(SERIES["light"]))
}
#: Left, bottom, width and height of the axes; the same in all charts, so that they line up.
_FRAME = (0.17, 0.15, 0.81, 0.8)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "msp_plugin",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
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
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Series:
    """One line or cloud of points.

    Args:
        label: its name in the legend.
        points: (x, y); those that are not finite are left out.
        slot: number of its colour and mark; -1 draws in ink.
        line: ``""`` for points alone, ``"line"``, or ``"steps"``, which hold until the next point.
        errors: half lengths of vertical bars, one per point.
        strong: larger marks; for means beside single values.
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
        return [(x, y) for x, y in self.points if len(finite_values((x, y))) == 2]  # type: ignore[misc]

    @property
    def numbers(self) -> list[tuple[float, float]]:
        """The finite points, thinned to what a table shows."""
        return thin(self.drawn, MOST_NUMBERS)

    @property
    def color(self) -> str:
        """The custom property of its colour."""
        return f"--c{self.slot % len(SERIES['light'])}" if self.slot >= 0 else "--ink"

    @property
    def mark(self) -> str:
        """Its mark as text."""
        return (MARKS[self.slot % len(MARKS)] if self.slot >= 0 else INK_MARK)[1]


@dataclass(frozen=True)
class Chart:
    """A chart: its axes and what is drawn on them.

    Args:
        name: unique in the page; letters, digits and dashes.
        title: what it shows, for readers who do not see it.
        lines: (y, label) of horizontal lines.
        log_x: tokens on a logarithmic axis, zero at its left end.
        log_y: a logarithmic y axis.
        diagonal: draw y = x, and both axes alike.
    """

    name: str
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
    def legend(self) -> list[Series]:
        """One series for each label, in the order of their colours, ink last."""
        found = {s.label: s for s in self.series if s.drawn and s.label}
        return sorted(found.values(), key=lambda s: (s.slot < 0, s.slot))


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most ``most`` of the points, evenly taken, the last one among them."""
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
                label, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", ha="right", va="bottom", fontsize=8.0,
            )  # fmt: skip
        axes.minorticks_off()
        _limits(axes, chart)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return replace(chart, svg=_inline(buffer.getvalue(), chart))


def missing(package: str) -> PluginError:
    """Return the error of a report without one of its packages."""
    return PluginError(
        f"a report needs {package}, which is not installed", hint="pip install 'msp_plugin[report]'"
    )


def _axes(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    values = [x for series in chart.series for x, _ in series.drawn if x > 0]
    if chart.log_x and not values:  # nothing was measured: one tick, and no numbers below it
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
    points = thin(series.drawn, MOST_POINTS)
    if not points:
        return
    x, y = zip(*points, strict=True)
    slot = series.slot % len(SERIES["light"])
    color = f"#0102{slot:02x}" if series.slot >= 0 else _INK
    mark = (MARKS[series.slot % len(MARKS)] if series.slot >= 0 else INK_MARK)[0]
    if series.line:
        style = "steps-post" if series.line == "steps" else "default"
        axes.plot(x, y, color=color, linewidth=1.3, drawstyle=style)
        x, y = ((x[-1],), (y[-1],)) if series.line == "steps" else (x, y)
    size = 7.0 if series.strong else 4.0
    axes.plot(
        x, y, linestyle="", marker=mark, markersize=size, color=color, markeredgewidth=0,
        alpha=1.0 if series.strong or series.line else 0.6,
    )  # fmt: skip
    if series.errors:
        bars = [e if e is not None else 0.0 for e in series.errors]
        axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=color, elinewidth=1.1, capsize=2.5)


def _limits(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    if not chart.diagonal:
        return
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


def _inline(svg: str, chart: Chart) -> str:
    """Return a drawing for the inside of an HTML page: no header, ids of its own, colours of the page."""
    root = ElementTree.fromstring(svg)  # noqa: S314 - matplotlib wrote it
    for parent in root.iter():
        for child in list(parent):
            if child.tag.rpartition("}")[2] == "metadata":
                parent.remove(child)
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {}
        for key, value in element.attrib.items():
            key = key.rpartition("}")[2]
            if key == "id":
                if value not in used:
                    continue
                value = f"{chart.name}-{value}"
            if key == "style":
                value = re.sub(r"font: ([0-9.]+)px .*?(;|$)", r"font-size: \1px\2", value)
                value = re.sub("#0[0-9a-f]{5}", lambda m: _variable(m[0]), value)
            value = value.replace("url(#", f"url(#{chart.name}-")
            attributes[key] = f"#{chart.name}-{value[1:]}" if key == "href" else value
        element.attrib.clear()
        element.attrib.update(attributes)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-labelledby": f"{chart.name}-title"})
    title = ElementTree.Element("title", {"id": f"{chart.name}-title"})
    title.text = chart.title
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _variable(color: str) -> str:
    return f"var({_STAND_INS[color]})" if color in _STAND_INS else color


def number_of(value: float) -> str:
    """Return a coordinate as a table of numbers says it."""
    return count(value) if abs(value) >= 1000 else short(value)
