"""Comparisons on a tiny model, most of them with the level database's weights alone."""

import json
import types
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import Text, load_split
from msp_plugin.errors import BudgetError, DataError, MSPError
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level
from msp_plugin.plugins.hookspecs import hookimpl
from msp_plugin.pruning.masks import nm_mask
from msp_plugin.records.comparison import ComparedRow, CompareRecord
from msp_plugin.runs import rows as compared_rows
from msp_plugin.runs.compare import cells, compare
from msp_plugin.runs.grid import Grid
from msp_plugin.search.dense_reference import PlainHeadReference
from msp_plugin.sensitivity.base import Estimator
from tests.helpers.comparing import MSP, SEARCH, Raises, allocators_plugin, by_name, row_of
from tests.helpers.losses import quality_by_hand


def test_there_is_a_row_for_every_cell_and_seed_and_unseeded_allocators_run_once(run, llama_dir):
    record = run({"uniform": "uniform", "small msp": MSP}, ("1/2", "3/4"), ("magnitude", "wanda"), (0, 3))
    found = [(row["method"], row["sparsity"], row["allocator"], row["seed"]) for row in record["rows"]]
    assert found == [
        (method, sparsity, *rest)
        for method in ("magnitude", "wanda")
        for sparsity in ("1/2", "3/4")
        for rest in (("uniform", 0), ("small msp", 0), ("small msp", 3))
    ]
    for row in record["rows"]:
        assert row["error"] is None and row["weights"] - row["kept"] == row["weights"] * Fraction(
            row["sparsity"]
        )
        assert row["seeded"] == (row["allocator"] != "uniform") and row["database"]["kl"] == row["kl"] > 0
        assert row["options"] == ({"name": "uniform"} if not row["seeded"] else {**row["options"], **MSP})
        tokens = 40 * row["evaluations"] if row["seeded"] else 0
        assert row["forward_tokens"] == tokens and len(row["levels"]) == len(record["units"]) == 8
    assert record["schema"] == "msp_plugin/compare" and record["dense"]["perplexity"] > 1
    assert record["model"]["fingerprint"] == fingerprint(load_model(llama_dir, "float32"))  # and so unharmed
    assert {name: part["samples"] for name, part in record["texts"].items()} == {
        "calibration": 6, "search": 2, "holdout": 0, "test": 3,
    }  # fmt: skip
    assert record["texts"]["test"]["tokens"] == 60 and list(record["sensitivities"]) == ["fisher"]


def test_the_dense_model_is_measured_once_for_all_rows(run, monkeypatch):
    measured, plain = [], PlainHeadReference.measure_dense
    monkeypatch.setattr(
        PlainHeadReference, "measure_dense", lambda self, group: measured.append(group) or plain(self, group)
    )
    counts = []
    for labels in (("uniform",), ("uniform", "lsa")):
        run(by_name(*labels))
        counts.append(len(measured))
        measured.clear()
    assert 0 < counts[0] == counts[1]


def test_kl_and_perplexity_are_those_of_the_pruned_weights_by_hand(run, text, llama_dir, tokenizer):
    record = run(
        {**by_name("uniform", "knapsack"), "search": SEARCH}, ("5/8",), levels=["dense", "2:4", "1:4"]
    )
    dense = load_model(llama_dir, "float32")
    test = load_split(tokenizer, text).test.samples
    assert record["dense"]["perplexity"] == pytest.approx(quality_by_hand(dense, dense, test)[1], rel=1e-5)
    for row in record["rows"]:
        pruned = load_model(llama_dir, "float32")
        with torch.no_grad():
            for unit, level in zip(prunable_layers(pruned), row["levels"], strict=True):
                for layer in unit.layers:
                    weight = pruned.get_submodule(layer.name).weight
                    weight.mul_(nm_mask(weight.abs(), Level.parse(level)))
        kl, perplexity = quality_by_hand(dense, pruned, test)
        assert (row["kl"], row["perplexity"]) == pytest.approx((kl, perplexity), rel=1e-4)
    assert row_of(record, "search")["holdout_loss"] == pytest.approx(
        min(at[1] for at in row["holdout"]), rel=1e-5
    )


def test_a_pruned_row_is_what_a_run_with_that_allocation_gives(run, text, llama_dir, tokenizer, tmp_path):
    import msp_plugin

    record = run(by_name("uniform", "knapsack"), methods=("wanda",), prune=True)
    dense, test = load_model(llama_dir, "float32"), load_split(tokenizer, text).test.samples
    assert record["rank_correlation"] == {}
    row = row_of(record, "knapsack")
    levels = tuple(map(Level.parse, row["levels"]))
    allocation = Allocation(prunable_layers(dense), levels, Fraction(3, 4), {}, {})
    (tmp_path / "allocation.json").write_text(allocation.to_json())
    line = {"allocation": str(tmp_path / "allocation.json"), "method": "wanda"}
    done = msp_plugin.prune(llama_dir, text, tmp_path / "out", dtype="float32", baseline=False, **line)
    assert row["perplexity"] == pytest.approx(done.record.perplexity["mixed"], rel=1e-6)
    kl, perplexity = quality_by_hand(dense, load_model(done.path, "float32"), test)
    assert (row["kl"], row["perplexity"]) == pytest.approx((kl, perplexity), rel=1e-4)
    assert row["database"]["kl"] != row["kl"]  # errors propagate only in the final pruning
    assert record["dense"]["perplexity"] == pytest.approx(done.record.perplexity["dense"], rel=1e-6)


def test_an_allocator_that_fails_is_a_row_with_its_error_and_the_others_go_on(run, with_plugins, llama_dir):
    with_plugins(mine=allocators_plugin(Raises))
    record = run({
        "ours": "raises", "bug": {"name": "raises", "how": "bug"},
        "dense": {"name": "raises", "how": "dense"},
        "uniform": "uniform",
    }, seeds=(0, 1))  # fmt: skip
    errors = {row["allocator"]: row["error"] for row in record["rows"]}
    assert len(record["rows"]) == 7 and errors["uniform"] is None and row_of(record, "uniform")["kl"] > 0
    assert "no way to the budget" in errors["ours"] and "ZeroDivisionError" in errors["bug"]
    assert "kept weights, the budget is" in errors["dense"]
    assert all(row["kl"] is row["perplexity"] is None for row in record["rows"] if row["error"])
    whole = CompareRecord.from_dict(record, "the record")
    uniform = next(row for row in whole.rows if row.allocator == "uniform")
    assert list(cells(whole.rows).values()) == [{"uniform": [uniform]}]
    assert record["model"]["fingerprint"] == fingerprint(load_model(llama_dir, "float32"))
    json.dumps(record, allow_nan=False)


def test_a_budget_beyond_the_levels_is_found_before_any_allocation(run, monkeypatch):
    monkeypatch.setattr("msp_plugin.runs.compare.perplexity", lambda *a, **b: pytest.fail("work was done"))
    with pytest.raises(BudgetError, match="out of reach"):
        run(by_name("uniform"), ("1/2", "0.99"))


ALL_WRONG = [
    ({"allocators": {}}, "no allocators"), ({"sparsities": ()}, "no sparsities"),
    ({"methods": ()}, "no methods"),
    ({"seeds": ()}, "no seeds"), ({"seeds": (0, -1)}, "seed = -1"),
    ({"seeds": (1, 1)}, "seed 1 is given twice"),
    ({"sparsities": ("0.75", "3/4")}, "sparsity 3/4 is given twice"),
    ({"methods": ("magnitude", {"name": "magnitude"})}, "method magnitude is given twice"),
    ({"sparsities": ("1/2", "75")}, "outside"),
    ({"methods": ("magnitude", "wandda")}, "no pruner called 'wandda'"),
    ({"allocators": {"a": "uniform", "b": "mps"}}, "no allocator called 'mps'"),
    ({"allocators": {"a": {"name": "owl", "lamda": 1}}}, "no option 'lamda'"),
    ({"allocators": {"a": {**SEARCH, "screen": 2}}}, "screen = 2"), ({"levels": ["4:3"]}, "4:3"),
    ({"granularity": "row"}, "granularity 'row'"),
    ({"estimators": {"fish": {}}}, "no estimator called 'fish'"),
    ({"estimators": {"fisher": {"samples": 2}}}, "options of fisher, which no allocator of this comparison reads"),
    ({"nonsense": 1}, "unknown key 'nonsense'"), ({"seed": 3}, "has no option seed"),
    ({"allocation": "a.json"}, "has no option allocation"),
    ({"allocators": {"a": {**SEARCH, "tokens": 10_000}}}, "held-out tokens"),
]  # fmt: skip


@pytest.mark.parametrize(
    "change, words", ALL_WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_wrong_in_the_options_is_found_before_the_model_is_loaded(run, no_model, change, words):
    with pytest.raises(MSPError, match=words) as error:
        run(**{"allocators": by_name("uniform"), **change})
    assert error.value.exit_code == 2


def test_without_test_text_there_is_nothing_to_compare(run, llama_dir, text, no_model):
    none = Text(text.data, samples=8, length=20, test_samples=0)
    with pytest.raises(DataError, match="needs test text"):
        compare(ModelSource(llama_dir), none, Grid(["3/4"], ["magnitude"], by_name("uniform"), prune=False))


def test_a_database_is_built_once_for_each_method_and_sparsity_and_serves_the_next_comparison(
    run, tmp_path, monkeypatch
):
    from msp_plugin.search import level_database

    built = []
    real = level_database.build_database
    monkeypatch.setattr(
        level_database, "build_database", lambda *a, **b: built.append(a[3].name) or real(*a, **b)
    )
    cell = {"knapsack": "knapsack", "msp": MSP}
    run(cell, ("1/2", "3/4"), ("magnitude", "wanda"))
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in files}
    assert sorted(set(built)) == ["magnitude", "wanda"] and files  # magnitude reads no inputs: one for both
    run(cell, ("1/2", "3/4"), ("magnitude", "wanda"), (2,))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == times


def test_the_same_comparison_twice_gives_the_same_record_but_for_the_seconds(run, tmp_path):
    def timeless(record):
        rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in record["rows"]]
        return json.dumps({**record, "rows": rows}, sort_keys=True, allow_nan=False)

    cell = {"owl": "owl", "msp": MSP, "search": SEARCH}
    assert timeless(run(cell, seeds=(1,))) == timeless(run(cell, seeds=(1,), cache=str(tmp_path / "fresh")))


def test_a_row_does_not_depend_on_the_allocators_beside_it(run):
    alone = row_of(run({"search": SEARCH}), "search")
    beside = row_of(
        run({"uniform": "uniform", "mrp": "mrp", "search": SEARCH, "knapsack": "knapsack"}), "search"
    )
    for row in (alone, beside):
        del row["seconds"], row["total_seconds"]
    assert alone == beside


def test_options_of_estimators_hold_whichever_allocator_is_first(run):
    found = [
        run(allocators, estimators={"fisher": {"samples": samples}})["sensitivities"]["fisher"]
        for allocators in ({"uniform": "uniform", "msp": MSP}, {"msp": MSP, "uniform": "uniform"})
        for samples in (1, 2)
    ]
    assert found[0] == found[2] != found[1] == found[3]


def test_an_estimator_that_no_allocator_asks_for_is_not_built(run, with_plugins):
    @dataclass(frozen=True)
    class Needy(Estimator):
        """Cannot be had without an option."""

        name = "needy"
        depth: int

        def layer_sensitivities(self, model, data, layers, progress=None):
            raise AssertionError

    module = types.ModuleType("plugin")
    module.msp_register_estimators = hookimpl(lambda: [Needy])
    module.msp_register_estimators.__name__ = "msp_register_estimators"
    with_plugins(mine=module)
    assert run(by_name("uniform"))["rows"][0]["error"] is None


def test_replace_one_measurements_are_paid_for(run):
    record = run({"uniform": "uniform", "kl": {"name": "knapsack", "surrogate": "kl", "tokens": 40}})
    assert row_of(record, "kl")["forward_tokens"] == 40 * (8 * 7 + 1)
    assert row_of(record, "uniform")["forward_tokens"] == 0
    assert row_of(record, "kl")["kl"] < row_of(record, "uniform")["kl"]


def test_cells_gather_the_rows_that_have_a_result():
    rows = [
        ComparedRow(method=m, sparsity=s, allocator=a, seed=seed, error=error)
        for m, s, a, seed, error in (
            ("x", "3/4", "a", 0, None), ("x", "0.75", "a", 1, None), ("x", "3/4", "b", 0, "no"),
            ("y", "3/4", "a", 0, None),
        )
    ]  # fmt: skip
    found = cells(rows)
    assert list(found) == [("x", Fraction(3, 4)), ("y", Fraction(3, 4))]
    assert found["x", Fraction(3, 4)] == {"a": rows[:2]} and found["y", Fraction(3, 4)] == {"a": rows[3:]}


def test_what_a_stopped_comparison_left_serves_the_same_layers_and_no_others(run, tmp_path, monkeypatch):
    finals, measured = tmp_path / "finals.jsonl", []
    real = compared_rows.CandidateWeights  # one for each quality that is measured
    monkeypatch.setattr(compared_rows, "CandidateWeights", lambda *a: measured.append(1) or real(*a))

    def kl(target, **options):
        return row_of(run(by_name("uniform"), targets=[target], **options), "uniform")["kl"]

    first = kl("q_proj", finals=finals)
    assert kl("q_proj", finals=finals) == first and len(measured) == 1
    other = kl("o_proj", finals=finals)
    assert len(measured) == 2 and other == kl("o_proj") != first
