"""``msp compare`` in one process, on a tiny model."""

import json
import os
import subprocess
import sys

import pytest

from msp_plugin.cli.compare import comparison_tables
from msp_plugin.records.comparison import CompareRecord

SMALL = (
    "-m", "magnitude", "--samples", "8", "--length", "20", "--test-samples", "3", "--dtype", "float32",
    "--no-prune",
)  # fmt: skip


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "\n".join(f"the {i}th cat sat on mat {i * i % 97} and the dog {i % 13} did not" for i in range(300))
    )
    return path


@pytest.fixture
def msp_compare(msp, llama_dir, text_file, tmp_path):
    def run(*arguments, out=tmp_path / "out", code=0, model=llama_dir, small=SMALL):
        return msp("compare", model, "--data", text_file, "--out", out, *small, *arguments, code=code)

    return run


@pytest.fixture
def no_model(monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("msp_plugin.checkpoint.source.load", fail)


def lines_of(printed, *labels):
    return [label for line in printed.splitlines() for label in labels if label in line]


def test_it_writes_the_record_and_the_report_and_shows_the_allocators_by_kl(msp_compare, tmp_path):
    pytest.importorskip("matplotlib", reason="the report is not drawn")
    pytest.importorskip("jinja2", reason="the report is not drawn")
    printed = msp_compare(
        "-s", "0.5,0.75", "--allocators", "uniform,knapsack@weight,msp", "--set", "knapsack@weight.surrogate=weight", "--seeds", "0,1",
        "--set", "msp.population=3", "--set", "msp.generations=1", "--set", "msp.offspring=2",
        "--set", "msp.tokens=40",
    )  # fmt: skip
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "report.html"]
    record = json.loads((out / "compare.json").read_text())
    assert len(record["rows"]) == 2 * 4 and record["schema"] == "msp_plugin/compare"
    assert {row["options"]["population"] for row in record["rows"] if row["allocator"] == "msp"} == {3}
    assert "knapsack@weight" in (out / "report.html").read_text()
    labels = ("uniform", "knapsack@weight", "msp")
    kl = {
        label: [r["kl"] for r in record["rows"] if r["allocator"] == label and r["sparsity"] == "3/4"]
        for label in labels
    }
    by_kl = sorted(labels, key=lambda label: sum(kl[label]) / len(kl[label]))
    second = printed.out[printed.out.index("0.75 zeros") :]
    starts = [label[:9] for label in by_kl]
    assert lines_of(second, *starts) == starts and f"{kl['uniform'][0]:.4f}" in second
    cut = [line.strip("│ ").split("│") for line in second.splitlines() if line.startswith("│")]
    column = [cells[0].strip() for cells in cut]
    assert "".join(column) == "".join(by_kl)  # a long label is folded, not cut
    assert "Results:" in printed.out and "magnitude, 0.5 zeros" in printed.out
    assert not [path for path in tmp_path.iterdir() if ".partial" in path.name]


def test_with_json_nothing_but_the_record_is_printed(msp_compare, tmp_path):
    printed = msp_compare("--allocators", "uniform", "--json", "-m", "wanda", "--prune")
    assert json.loads(printed.out) == json.loads((tmp_path / "out" / "compare.json").read_text())


def test_without_the_packages_of_the_report_it_says_how_to_get_them(msp_compare, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "jinja2" else real(name, *rest)
    )
    printed = msp_compare("--allocators", "uniform")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compare.json"]
    assert "pip install 'msp_plugin[report]'" in printed.out


def test_rows_that_all_failed_leave_a_record_and_the_exit_code_says_so(msp_compare, tmp_path, monkeypatch):
    from msp_plugin.allocators.uniform import Uniform
    from msp_plugin.errors import NumericsError

    def fail(self, inputs):
        raise NumericsError("nothing is finite")

    monkeypatch.setattr(Uniform, "allocate", fail)
    printed = msp_compare("--allocators", "uniform", code=1)
    assert "no row has a result; the first error: nothing is finite" in printed.err
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert row["error"] == "nothing is finite" and "nothing is finite" in printed.err


def test_one_row_that_failed_is_counted_and_costs_no_exit_code(msp_compare, monkeypatch):
    from msp_plugin.allocators.uniform import Uniform
    from msp_plugin.errors import NumericsError

    def fail(self, inputs):
        raise NumericsError("nothing is finite")

    monkeypatch.setattr(Uniform, "allocate", fail)
    printed = msp_compare(
        "--allocators", "uniform,knapsack@weight", "--set", "knapsack@weight.surrogate=weight"
    )
    assert "1 of 2 rows failed" in printed.err and "knapsack" in printed.out


def test_granularity_bounds_and_protected_layers_hold_for_every_allocator(msp_compare, tmp_path):
    msp_compare(
        "--allocators", "uniform,knapsack@weight", "--set", "knapsack@weight.surrogate=weight", "-s", "0.5", "--granularity", "layer",
        "--bounds", "down_proj=0.5,0.75", "--protect", "o_proj",
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["granularity"] == "layer" and record["protect"] == ["o_proj"]
    names = [unit["name"] for unit in record["units"]]
    assert any(name.endswith("q_proj") for name in names)
    for row in record["rows"]:
        for name, level in zip(names, row["levels"], strict=True):
            if name.endswith("o_proj"):
                assert level == "dense"
            elif name.endswith("down_proj"):
                assert level in ("4:8", "3:8", "2:8")


def test_an_output_directory_with_something_in_it_is_refused_first(msp_compare, no_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert "is not empty" in msp_compare("--allocators", "uniform", code=2).err
    assert (tmp_path / "out" / "precious").read_text() == "x"


@pytest.mark.parametrize(("given", "words"), [
    (("--allocators", "uniform,mps"), "no allocator called 'mps'"),
    (("--allocators", "knapsack@kl", "--set", "knapsack@kl.surogate=kl"), "no option 'surogate'"),
    (("--allocators", "owl,owl"), "'owl' is given twice"),
    (("--allocators", ","), "no allocators to compare"),
    (("--allocators", "owl", "--set", "dlp.amplitude=0.1"), "no such role 'dlp'"),
    (("--allocators", "owl", "--set", "owl.amplitude=wide"), "option amplitude"),
    (("--allocators", "owl", "--set", "outliers.m=1"), "no option 'm'"),
    (("--seeds", "0,x"), "seeds '0,x' are not numbers"), (("--seeds", "0,-1"), "seed = -1"),
    (("--seeds", "2,2"), "seed 2 is given twice"), (("--seeds", ","), "no seeds to compare"),
    (("-s", "75"), "outside [0, 1)"), (("-s", "0.5,1/2"), "sparsity 1/2 is given twice"),
    (("-s", ","), "no sparsities"), (("-m", "wandda"), "no pruner called 'wandda'"),
    (("-m", "magnitude,wanda,magnitude"), "method magnitude is given twice"), (("--levels", "4:3"), "4:3"),
    (("--test-samples", "0"), "needs test text"), (("--samples", "0"), "samples = 0"),
    (("--allocators", "search", "--set", "search.tokens=5000"), "held-out tokens"),
])  # fmt: skip
def test_bad_input_is_explained_before_the_model_is_loaded(msp_compare, no_model, tmp_path, given, words):
    rest = () if "--allocators" in given else ("--allocators", "uniform")
    printed = msp_compare(*rest, *given, code=2)
    assert printed.err.startswith("error: ") and words in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "out").exists() and printed.out == ""


def test_a_model_that_is_not_there_is_explained(msp_compare, tmp_path):
    assert "no model directory at" in msp_compare(model=tmp_path / "nowhere", code=2).err


def made_up(allocator, kl, seed=0, **more):
    return {
        "method": "wanda", "sparsity": "3/4", "allocator": allocator, "seed": seed, "kl": kl, "error": None,
        "perplexity": None if kl is None else 2 * kl, "forward_tokens": 1000, "sensitivity_tokens": 500, "seconds": 0.25, **more,
    }  # fmt: skip


def test_a_table_is_ordered_by_mean_kl_and_a_seed_without_a_finite_loss_comes_last():
    rows = [  # made up
        made_up("broken", None), made_up("broken", 0.1, 1), made_up("good[x=1]", 1.0),
        made_up("good[x=1]", 2.0, 1), made_up("best", 1.25), made_up("failed", 0.0, error="no"),
    ]  # fmt: skip
    record = CompareRecord.model_validate({"units": [], "rows": rows})
    (table,) = comparison_tables(record, "a [b] model")
    from rich.console import Console

    console = Console(width=120, markup=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table)
    printed = console.export_text()
    assert lines_of(printed, "best", "good[x=1]", "broken", "failed") == ["best", "good[x=1]", "broken"]
    assert "a [b] model, wanda, 0.75 zeros" in printed
    good = next(line for line in printed.splitlines() if "good" in line)
    assert [cell.strip() for cell in good.strip("│ ").split("│")][1:] == [
        "3.00", "1.5000", "0.7071", "1,500", "0.2", "2",
    ]  # fmt: skip
    assert "inf" in next(line for line in printed.splitlines() if "broken" in line)


@pytest.mark.slow
def test_processes_of_torchrun_compare_as_one_does(msp_compare, llama_dir, text_file, tmp_path):
    pytest.importorskip("llmcompressor", reason="it prunes to each allocation")
    pruned = [argument for argument in SMALL if argument != "--no-prune"]
    what = ["--allocators", "uniform,search", "--set", "search.rounds=2", "--set", "search.tokens=40",
            "--set", "search.holdout=20"]  # fmt: skip
    msp_compare(*what, "--cache", tmp_path / "alone", small=pruned, out=tmp_path / "one")
    command = ["compare", llama_dir, "--data", text_file, "--out", tmp_path / "two", *pruned, *what]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "msp_plugin",
         *command, "--cache", tmp_path / "shared"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "compare.json").read_text()) for name in ("one", "two"))
    for record in (one, two):
        del record["machine"]
        for row in record["rows"]:
            del row["seconds"], row["total_seconds"]
    assert one == two and run.stdout.count("Results:") == 1
    assert not list(tmp_path.glob(".*.lock"))


def test_a_report_that_cannot_be_drawn_does_not_cost_the_comparison(msp_compare, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the report is not drawn")
    pytest.importorskip("jinja2", reason="the report is not drawn")

    def broken(source, plugins=None):
        raise KeyError("a bug")

    monkeypatch.setattr("msp_plugin.report.page.render", broken)
    printed = msp_compare(
        "--allocators",
        "uniform,knapsack@weight",
        "--set",
        "knapsack@weight.surrogate=weight",
        out=tmp_path / "[1] out",
        code=1,
    )
    (left,) = (tmp_path / "[1] out").iterdir()
    assert len(json.loads(left.read_text())["rows"]) == 2 and "knapsack" in printed.out
    assert f"error: {left} is complete, but the report failed: 'a bug'" in printed.err
    assert f"msp report '{tmp_path}/[1] out'" in printed.err


def test_a_recovery_adds_a_table_and_a_chart_with_the_rank_correlation(msp_compare, tmp_path):
    pytest.importorskip("jinja2", reason="the report is not drawn")
    printed = msp_compare(
        "--allocators", "uniform,lsa,knapsack", "--prune", "--recover", "blockwise", "--set", "blockwise.epochs=1",
        "--set", "blockwise.rates=[0.06]",
    )  # fmt: skip
    record = CompareRecord.read(tmp_path / "out" / "compare.json")
    (rho,) = record.rank_correlation.values()
    assert f"rank correlation of the KL before and after it: {rho:.2f}" in " ".join(printed.out.split())
    after = printed.out[printed.out.index("After the recovery") :]
    assert all(f"{row.recovered.perplexity:.2f}" in after for row in record.rows)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Does the ranking survive the recovery?" in page and "recovered KL" in page
