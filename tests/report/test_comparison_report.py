"""The report of a comparison. Its numbers are made up: see conftest.py."""

import json
import math

import pytest

from msp_plugin.errors import RecipeError
from msp_plugin.plan.units import Unit, UnitTable
from msp_plugin.plugins.manager import Plugins
from msp_plugin.records.comparison import CompareRecord
from msp_plugin.report import write_report
from msp_plugin.report.comparison import cells, labels

ONE_CELL = {"methods": ("sparsegpt",), "sparsities": ("3/4",)}


def rows_of(numbers, **more):
    """Rows of one cell from numbers by allocator, perplexity and KL alike."""
    return [
        {
            "method": "m",
            "sparsity": "3/4",
            "allocator": name,
            "seed": seed,
            "perplexity": value,
            "kl": value,
            **more,
        }
        for name, values in numbers.items()
        for seed, value in enumerate(values)
    ]


def comparison_of(rows):
    return CompareRecord.model_validate({"units": [], "rows": rows})


def test_an_allocation_that_several_seeds_found_is_ranked_once(comparison_dir, report, edit_json):
    path = comparison_dir(**ONE_CELL, seeds=3)

    def same(record):
        for row in record["rows"]:
            if row["allocator"] == "evolution":
                row |= {"kl": 0.5, "database": {"perplexity": 15.0, "kl": 0.6}}

    edit_json(path / "compare.json", same)
    rows = [r for r in json.loads((path / "compare.json").read_text())["rows"] if r["database"]]
    different = {(row["database"]["kl"], row["kl"]) for row in rows if row["kl"] is not None}
    assert len(rows) > len(different)
    assert f"Both on the test text, {len(different)} different allocations" in report(path).text


def test_mean_spread_best_and_ties_are_those_of_the_definition():
    (cell,) = cells(
        comparison_of(rows_of({"a": [10.0, 12.0], "b": [11.5, 12.5], "c": [13.0, 13.2], "u": [40.0]}))
    )
    assert [(e.label, e.perplexity) for e in cell.entries] == [
        ("a", 11.0),
        ("b", 12.0),
        ("c", 13.1),
        ("u", 40.0),
    ]
    assert cell.entries[0].spread == pytest.approx(math.sqrt(2)) and cell.entries[3].spread is None
    assert [(e.kl, e.kl_spread) for e in cell.entries] == [(e.perplexity, e.spread) for e in cell.entries]
    assert cell.best.label == "a" and [e.label for e in cell.ties] == ["b", "c"] and cell.has_spread
    (cell,) = cells(comparison_of(rows_of({"a": [10.0, 10.2], "b": [11.5, 12.5], "c": [10.3, 10.3]})))
    assert [e.label for e in cell.entries] == ["a", "c", "b"] and [e.label for e in cell.ties] == ["c"]
    (cell,) = cells(comparison_of(rows_of({"a": [10.0], "b": [10.1]})))
    assert cell.ties == [] and not cell.has_spread


def test_an_allocator_that_diverges_on_a_seed_has_no_mean_and_is_last():
    (cell,) = cells(comparison_of(rows_of({"a": [9.0, math.inf], "b": [11.0, 11.0], "c": [9.0, None]})))
    assert [e.label for e in cell.entries] == ["b", "a", "c"]
    assert cell.best.label == "b" and [(e.perplexity, e.kl) for e in cell.entries[1:]] == [(None, None)] * 2


def test_namesakes_are_told_apart_by_the_options_that_differ():
    rows = [
        *rows_of({"a": [1.0, 2.0]}, options={"x": 1, "loss": "kl"}),
        *rows_of({"a": [1.0]}, options={"x": 2, "loss": "kl"}),
        *rows_of({"b": [1.0]}, options={"x": 2}),
    ]
    assert list(labels(comparison_of(rows).rows).values()) == ["a (x 1)", "a (x 1)", "a (x 2)", "b"]


def test_tables_show_every_allocator_best_first_with_ties_marked(compared):
    found = compared
    heads = [row[0] for row in found.rows]
    assert heads.count("allocator") == 8  # a table of quality and one of bytes for each of four cells
    best = [row for row in found.rows if row[0].endswith("msp (generations 16)") and row[-1] == "3"]
    assert len(best) == 4 and any("≈" in row[3] for row in found.rows if len(row) == 8)
    assert found.row("sparsegpt, 75 %")[1] == "12.870"
    assert "one seed: no spread" not in found.text


def test_one_seed_has_no_spread(comparison_dir, report):
    assert "One seed: no spread" in report(comparison_dir(**ONE_CELL, seeds=1)).text


def test_each_cell_has_its_curves_its_cost_and_its_ranking(compared):
    found = compared
    titles = [
        image["alt"]
        for image in found.of("img")
        if image["alt"].startswith(("Search curves,", "Test perplexity against", "KL after"))
    ]
    assert len(titles) == 12 and len(found.of("img")) == 12
    assert found.text.count("Spearman's rho 0.") + found.text.count("Spearman's rho 1.") == 4
    ids = {a.get("id") for a in found.of("h2")}
    assert {
        "summary",
        "cell0",
        "cell3",
        "curves",
        "cost",
        "ranking",
        "maps",
        "bytes",
        "speed",
        "failed",
    } <= ids


def test_maps_hold_the_levels_of_the_lowest_seed(compared, make_comparison):
    row = next(r for r in make_comparison()["rows"] if r["allocator"] == "evolution")
    found = compared
    assert ["#", "qkv", "o", "gate_up", "down"] in found.rows
    for block in range(4):
        assert [str(block), *row["levels"][4 * block : 4 * block + 4]] in found.rows
    assert found.text.count(", seed 0 #") == 24 and "Sensitivity, hutchinson" in found.text


def test_failed_rows_and_notes_are_listed_and_leave_the_means(compared):
    found = compared
    failed = next(row for row in found.rows if row[-1].startswith("out of memory"))
    assert failed == ["wanda", "75 %", "msp (generations 40)", "2", "out of memory: 12 GiB asked for"]
    assert any(row[-1] == "seeded with uniform" for row in found.rows)
    assert [row[-1] for row in found.rows if "msp (generations 40)" in row[0] and len(row) == 8] == [
        "3",
        "3",
        "3",
        "2",
    ]


def test_text_from_outside_stays_text(comparison_dir, report):
    bad = '<script>x</script>" onload="y'

    def change(data):
        data["rows"][0].update(allocator=bad, method=bad, notes=[bad], curve=[[1, 0.5], [9, 0.4]])
        data["rows"][1].update(error=bad)
        data.update(
            machine=bad,
            granularity=bad,
            versions={bad: bad},
            sensitivities={bad: data["sensitivities"]["fisher"]},
        )

    found = report(comparison_dir(change, **ONE_CELL))
    assert not found.of("script") and not [a for _, a in found.tags if "onload" in a]
    assert found.row("Machine") == ["Machine", bad] and found.row(bad) and f"Sensitivity, {bad}" in found.text


def test_optional_keys_may_be_missing_and_unknown_ones_are_ignored(comparison_dir, report):
    def change(data):
        keys = ("method", "sparsity", "allocator", "unknown")
        rows = [{**{k: r[k] for k in keys if k in r}, "unknown": {"x": 1}} for r in data["rows"]]
        rows += [
            {**rows[0], "perplexity": float("inf"), "kl": float("nan"), "levels": data["rows"][0]["levels"]}
        ]
        return {"schema": data["schema"], "version": 1, "units": data["units"], "rows": rows, "new": []}

    found = report(comparison_dir(change, **ONE_CELL))
    for text in (
        "No allocator measured candidates", "No row has both divergences", "No perplexity was measured", "No row failed",
        "bfloat16, assumed because",
    ):  # fmt: skip
        assert text in found.text, text


def test_a_comparison_without_rows_has_a_report(comparison_dir, report):
    assert "No row has levels." in report(comparison_dir(change=lambda data: data.update(rows=[]))).text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(version=2), "version 2, this package reads 1"),
        (lambda d: d.pop("rows"), "damaged: rows"),
        (lambda d: d["rows"][3].update(perplexity="much"), r"damaged: rows\.3\.perplexity"),
        (lambda d: d["rows"][3].update(sparsity="75"), r"damaged: rows\.3\.sparsity: .*outside"),
        (lambda d: d["rows"][3]["levels"].pop(), "15 levels for 16 units"),
        (lambda d: d["rows"][3]["levels"].__setitem__(0, "9:8"), "keeps 9 of 8"),
        (lambda d: d["rows"][3]["levels"].__setitem__(0, "1:7"), "does not divide"),
        (lambda d: d["units"][0].update(layers=[]), "has no weights"),
        (lambda d: d["sensitivities"].update(fisher=[1.0]), "has 1 numbers for 16 units"),
    ],
)
def test_damaged_comparisons_say_where(change, text, comparison_dir, report):
    def drop(data):
        change(data)

    with pytest.raises(RecipeError, match=text):
        report(comparison_dir(drop, **ONE_CELL))


@pytest.mark.slow
def test_a_model_of_eighty_blocks_stays_below_three_megabytes(comparison_dir, tmp_path, table):
    layers = [(unit.block, layer) for unit in table(80) for layer in unit.layers]
    units = UnitTable(tuple(Unit(layer.name, block, (layer,)) for block, layer in layers))
    assert len(units) == 560
    out = tmp_path / "big.html"
    write_report(
        comparison_dir(units=units, methods=["m"], seeds=1), out, plugins=Plugins(entry_points=False)
    )
    assert (
        out.stat().st_size < 520_000
    )  # two of the dozen cells that three megabytes may hold, with what is there once
