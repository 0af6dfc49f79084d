"""What integration/allocator_table.py makes of finished cells. All numbers here are made up."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "integration" / "allocator_table.py"


TEXTS = {"calibration": {"samples": 4, "tokens": 64}}


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("allocator_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(allocator, kl, seed=0, error=None, database=None):
    return {
        "allocator": allocator, "seed": seed, "error": error, "kl": kl, "perplexity": 10 * kl,
        "holdout_loss": kl,
        "forward_tokens": 1000 * (seed + 1), "sensitivity_tokens": 0, "seconds": 1.0,
        "database": {"kl": kl if database is None else database},
    }  # fmt: skip


def record(rows):
    return {"rows": rows, "machine": "made up", "versions": {}, "texts": TEXTS}


def made_up(table, search=(1.0, 1.2, 1.1), uniform=2.0, others=3.0):
    rows = [row("uniform", uniform), *(row("search", kl, seed) for seed, kl in enumerate(search))]
    rest = [name for name in table.ALLOCATORS if name not in ("uniform", "search")]
    rows += [row(name, others + i / 8) for i, name in enumerate(rest)]
    return record(rows)


def test_the_allocators_of_the_table_can_be_built(table):
    from msp_plugin.plugins.manager import Plugins

    plugins = Plugins(entry_points=False)
    built = [plugins.build("allocators", spec).name for spec in table.ALLOCATORS.values()]
    of_halves = {
        "depth",
        "policy_gradient",
    }  # they are for menus with dropped halves, which the table has none of
    assert set(built) == set(plugins.components["allocators"]) - of_halves


def test_a_summary_has_mean_and_sample_deviation_over_the_seeds_that_succeeded(table):
    rows = [
        row("search", 1.0),
        row("search", 2.0, 1),
        row("search", 9.0, 2, "broke"),
        row("uniform", 4.0, database=3.0),
    ]
    search, uniform = table.summary({("llama", "wanda", "0.75"): record(rows)})
    assert (search["kl"], search["seeds"], search["errors"]) == (1.5, 3, ["broke"])
    assert search["kl_spread"] == pytest.approx(0.5**0.5) and search["pairs"] == [[1.0, 1.0], [2.0, 2.0]]
    assert (uniform["kl"], uniform["kl_spread"], uniform["pairs"]) == (4.0, None, [[3.0, 4.0]])
    assert (search["model"], search["method"], search["sparsity"]) == ("llama", "wanda", 0.75)


@pytest.mark.parametrize(("search", "others", "behind_best", "behind_uniform"), [
    ((1.0, 1.2, 1.1), 3.0, 0, 0), ((1.0, 1.2, 1.1), 0.95, 0, 0), ((1.0, 1.2, 1.1), 0.5, 1, 0),
    ((2.0, 2.2, 2.1), 3.0, 0, 1), ((2.5, 2.5, 2.5), 0.5, 1, 1),
])  # fmt: skip
def test_verdicts_name_the_cells_where_search_is_behind(table, search, others, behind_best, behind_uniform):
    cells = {
        ("llama", "wanda", "0.75"): made_up(table, search, 2.0, others),
        ("qwen2", "wanda", "0.75"): made_up(table),
    }
    best, uniform = table.verdicts(table.summary(cells))
    assert (len(best), len(uniform)) == (behind_best, behind_uniform)
    assert all("llama" in line for line in (*best, *uniform))
    if best:
        assert "atp 0.5000" in best[0]


def test_the_table_has_the_best_in_bold_and_marks_what_is_within_noise(table):
    cells = {
        ("llama", "wanda", "0.75"): made_up(table, others=1.15),
        ("qwen2", "wanda", "0.75"): made_up(table),
    }
    tables = table.markdown(table.summary(cells)).split("\n\n")
    llama, qwen2 = (
        {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines()} for text in tables
    )
    assert llama["llama"] == [" wanda 75 % ", " forward tokens "]
    assert llama["search"] == [" **1.100 ±0.100 (11.00)** ", " 2,000 "]
    assert llama["uniform"][0] == " 2.000 (20.00) " and llama["atp"][0] == " 1.150 (11.50) = "
    assert list(llama)[2:] == list(table.ALLOCATORS) == list(qwen2)[2:]
    assert "**" not in "".join(llama["atp"] + llama["uniform"])


def test_an_allocator_without_a_result_is_said_to_have_failed(table):
    record = made_up(table)
    for row in record["rows"]:
        if row["allocator"] == "mrp":
            row["error"] = "out of reach"
    entries = table.summary({("llama", "wanda", "0.75"): record})
    assert "| mrp | failed |  |" in table.markdown(entries)
    assert table.verdicts(entries) == ([], [])


@pytest.mark.parametrize(("uniform", "code"), [(2.0, 0), (0.5, 1)])
def test_the_files_say_what_was_found(table, tmp_path, capsys, uniform, code):
    cells = {
        ("llama", "sparsegpt", "0.625"): made_up(table, uniform=uniform),
        ("llama", "wanda", "0.75"): made_up(table),
    }
    assert table.write(cells, tmp_path) == code
    text = (tmp_path / "allocators.md").read_text()
    assert ("behind uniform in: no cell" in text) == (code == 0)
    assert "| llama wanda 75 % | 17 | 1.000 |" in text and "| llama sparsegpt 62.5 % | 17 | 1.000 |" in text
    saved = json.loads((tmp_path / "allocators.json").read_text())
    assert len(saved["cells"]) == 2 * 15 and [c["allocations"] for c in saved["correlations"]] == [17, 17]


def test_rows_of_an_earlier_table_stand_beside_new_ones_of_the_same_texts(table, tmp_path):
    cell = ("llama", "wanda", "0.75")
    both = {cell: made_up(table), ("qwen2", *cell[1:]): made_up(table)}
    table.write(both, tmp_path)
    earlier = json.loads((tmp_path / "allocators.json").read_text())
    again = {cell: record([row("search", 0.5, seed) for seed in range(3)])}
    table.write(again, tmp_path, earlier)
    saved = json.loads((tmp_path / "allocators.json").read_text())["cells"]
    assert {e["allocator"]: e["kl"] for e in saved} == {
        e["allocator"]: 0.5 if e["allocator"] == "search" else e["kl"]
        for e in earlier["cells"] if e["model"] == "llama"
    }  # fmt: skip
    text = (tmp_path / "allocators.md").read_text()
    assert "The rows of uniform, atp," in text and "measured again" not in text
    again[cell]["rows"].append(row("uniform", 1.1 * made_up(table)["rows"][0]["kl"]))
    table.write(again, tmp_path, earlier)
    text = (tmp_path / "allocators.md").read_text()
    assert "The rows of atp," in text and "measured again changed by 10.0 % (median)" in text
    again[cell]["texts"] = {"test": "another"}
    with pytest.raises(ValueError, match="other texts"):
        table.write(again, tmp_path, earlier)
