"""Colours that can be read, numbers that line up, and what the package may import."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import msp_plugin.report
from msp_plugin.plan.units import Layer, Unit, UnitTable
from msp_plugin.records.statistics import deviation, mean, rank_correlation, taken_back, within_noise
from msp_plugin.report.charts import Chart, Series, draw, thin
from msp_plugin.report.grid import lay_out
from msp_plugin.report.palette import (
    LEVEL_STEPS,
    LEVELS,
    PAGE,
    SENSITIVITIES,
    SENSITIVITY_STEPS,
    SERIES,
    contrast,
    ink_on,
    luminance,
    ramp,
)
from msp_plugin.report.text import (
    count,
    mebibytes,
    number,
    percent,
    scientific,
    seconds,
    short,
    signed,
    thousands,
)

ROOT = Path(msp_plugin.report.__file__).parent


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(theme):
    page = PAGE[theme]
    for ground in (page["page"], page["ground"]):
        assert contrast(page["ink"], ground) > 7 and contrast(page["muted"], ground) > 4.5
    for anchors, steps in ((LEVELS, LEVEL_STEPS), (SENSITIVITIES, SENSITIVITY_STEPS)):
        assert min(contrast(color, ink_on(color)) for color in ramp(anchors[theme], steps)) > 4.5
    assert min(contrast(color, page["page"]) for color in SERIES[theme]) > 3


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_ramps_are_told_apart_by_lightness_alone(theme):
    for anchors, steps in ((LEVELS, LEVEL_STEPS), (SENSITIVITIES, SENSITIVITY_STEPS)):
        light = [luminance(color) for color in ramp(anchors[theme], steps)]
        assert light == sorted(light, reverse=theme == "light") and len(set(light)) == steps + 1


def test_projections_have_the_shortest_names_that_tell_them_apart():
    def heads(*names):
        units = [Unit(name, i // 2, (Layer(name, 4, 4),)) for i, name in enumerate(names)]
        return lay_out(UnitTable(tuple(units))).columns

    assert heads("l.0.a.q", "l.0.m.up", "l.1.a.q", "l.1.m.up") == ("q", "up")
    assert heads("l.0.a.q", "l.0.cross.q", "l.1.a.q", "l.1.cross.q") == ("a.q", "cross.q")
    assert heads("l.0.e.0.up", "l.0.e.1.up") == ("e.0.up", "e.1.up")
    assert heads("proj_a", "proj_b") == ("proj_a", "proj_b")
    blocks = UnitTable(tuple(Unit(f"block {i}", i, (Layer(f"x{i}", 4, 4),)) for i in range(3)))
    assert lay_out(blocks).columns == ("block",)


def test_units_of_one_name_share_a_cell():
    units = UnitTable(tuple(Unit(f"{side}.0.q", 0, (Layer(f"{side}.0.q", 4, 4),)) for side in ("enc", "dec")))
    assert lay_out(units).rows == ((0, ((0, 1),)),)


def test_rank_correlation_is_pearsons_of_the_ranks():
    assert rank_correlation([(1, 10), (2, 100), (3, 1000)]) == pytest.approx(1)
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4
    expected = np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1]
    assert rank_correlation([(1, 1), (2, 3), (2, 2), (5, 9)]) == pytest.approx(expected)
    assert rank_correlation([(1, 1), (2, 2)]) is None and rank_correlation([(1, 1), (1, 2), (1, 3)]) is None


def test_means_and_deviations_are_of_what_is_finite():
    assert mean([1.0, None, 3.0, float("inf")]) == 2.0 and mean([None]) is None
    assert deviation([1.0, 3.0]) == pytest.approx(2**0.5) and deviation([1.0]) is None
    assert taken_back(1.0, 4.0, 2.0) == pytest.approx(0.5)
    assert taken_back(1.0, 1.0, 2.0) is None and taken_back(1.0, None, 2.0) is None


def test_noise_is_twice_the_larger_spread():
    assert within_noise(1.2, 0.05, 1.0, 0.1) and within_noise(1.2, 0.1, 1.0, None)
    assert not within_noise(1.21, 0.1, 1.0, 0.05)
    assert within_noise(1.0, None, 1.0, None) and not within_noise(1.001, None, 1.0, None)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=12))
def test_the_rank_correlation_is_scipys(pairs):
    stats = pytest.importorskip("scipy.stats", reason="the rank correlation is not compared with scipy's")
    if min(len({a for a, _ in pairs}), len({b for _, b in pairs})) > 1:
        expected = stats.spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic
        assert rank_correlation(pairs) == pytest.approx(expected, abs=1e-12)


def test_numbers_are_written_as_people_read_them():
    assert [number(v) for v in (None, float("nan"), float("inf"), -1.5, 12345.6)] == [
        "–",
        "–",
        "∞",
        "−1.500",
        "12,346",
    ]
    assert (signed(0.25), signed(-0.25), signed(None)) == ("+0.250", "−0.250", "–")
    assert (short(0.0), short(0.0123456), short(-2e-7), scientific(0.0)) == (
        "0",
        "0.01235",
        "−2.0e−7",
        "0.0e0",
    )
    assert (count(1234567), count(None), percent(0.625, 1), percent(None)) == (
        "1,234,567",
        "–",
        "62.5 %",
        "–",
    )
    assert (seconds(80.9), seconds(600), seconds(9000), seconds(None)) == ("80.9 s", "10.0 min", "2.5 h", "–")
    assert (mebibytes(5), mebibytes(2048), mebibytes(3 * 2**30)) == ("5 B", "2.00 KiB", "3.00 GiB")
    assert [thousands(v) for v in (0, 500, 20_000, 1_500_000)] == ["0", "500", "20k", "1.5M"]


def test_long_clouds_are_thinned_evenly_and_keep_their_ends():
    points = [(float(i), 0.0) for i in range(5000)]
    kept = thin(points, 100)
    assert len(kept) == 100 and kept[0] == points[0] and kept[-1] == points[-1]
    chart = draw(Chart("many", "x", "y", (Series("s", points),)))
    assert len(chart.svg) < 300_000


@pytest.mark.parametrize(
    "points",
    [[(0.0, 1.0)], [(0.0, 5.0), (4096.0, 5.0)], [(1e3, 1.0), (9e9, 1e6)], [(1.0, -2.0), (2.0, float("inf"))]],
)
def test_odd_points_are_drawn(points):
    for log_y in (False, True):
        chart = draw(Chart("t", "x", "y", (Series("_s$", points, line="steps"),), log_x=True, log_y=log_y))
        assert "<svg" in chart.svg and [s.label for s in chart.legend] == ["_s$"]
    assert draw(Chart("t", "x", "y", (Series("s", points),), diagonal=True)).svg


def test_nothing_finite_draws_nothing():
    assert draw(Chart("t", "x", "y", (Series("s", [(None, 1.0), (1.0, float("nan"))]),))) is None


def test_the_package_knows_no_host_no_command_and_no_run():
    above = (
        "msp_plugin.hosts",
        "msp_plugin.cli",
        "msp_plugin.serving",
        "msp_plugin.runs.prune",
        "transformers",
    )
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(above)], file


def test_an_axis_of_counts_that_are_all_zero_has_one_tick_and_no_negative_number():
    chart = draw(Chart("t", "tokens", "y", (Series("s", [(0.0, 1.0), (0.0, 2.0)]),), log_x=True))
    ticks = re.findall(r">\s*([-−\d.]+)\s*<", chart.svg)
    assert ticks[0] == "0" and not [tick for tick in ticks if tick[0] in "-−" or tick.startswith("0.0")]
