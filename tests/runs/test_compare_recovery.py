"""Comparisons whose pruned models are recovered."""

import pytest

from msp_plugin import prune
from msp_plugin.errors import RecipeError
from msp_plugin.models.fingerprint import fingerprint

METHOD = {"name": "blockwise", "epochs": 1, "rates": [0.06]}


def by_name(*names):
    return {name: name for name in names}


def test_every_pruned_model_is_recovered_as_prune_with_recover_does(run, llama_dir, text, tmp_path):
    labels = ("uniform", "lsa", "knapsack")
    record = run(by_name(*labels), prune=True, recover=METHOD)
    whole = prune(
        llama_dir, text, tmp_path / "whole", sparsity="3/4", method="magnitude", allocator="uniform",
        granularity="unit", dtype="float32", recover=METHOD, cache=str(tmp_path / "cache"),
    ).record  # fmt: skip
    (row,) = (row for row in record["rows"] if row["allocator"] == "uniform")
    assert (row["perplexity"], row["recovered"]["perplexity"], row["recovered"]["kl"]) == (
        pytest.approx(whole.perplexity["mixed"]),
        pytest.approx(whole.perplexity["recovered"]),
        pytest.approx(whole.kl["recovered"]),
    )
    assert all(row["recovered"]["kl"] < row["kl"] for row in record["rows"])
    assert row["recovered"]["recovery"]["method"]["name"] == "blockwise"
    before, after = (
        [sorted(values).index(value) for value in values]
        for values in ([r["kl"] for r in record["rows"]], [r["recovered"]["kl"] for r in record["rows"]])
    )
    apart = sum((a - b) ** 2 for a, b in zip(before, after, strict=True))
    assert record["rank_correlation"] == {"magnitude 3/4": pytest.approx(1 - 6 * apart / (3 * 8))}


def test_a_comparison_hashes_the_dense_model_once_and_each_pruned_one_once(run, monkeypatch):
    """The state of a stopped recovery belongs to the weights that it began with."""
    hashed = []
    for module in ("models.fingerprint", "runs.compare", "recovery.step", "search.measurements"):
        name = f"msp_plugin.{module}.fingerprint"
        monkeypatch.setattr(name, lambda model: hashed.append(model) or fingerprint(model))
    counts = []
    for labels in (("uniform",), ("uniform", "lsa")):
        run(by_name(*labels), prune=True, recover=METHOD)
        counts.append(
            [sum(other is model for other in hashed) for model in {id(m): m for m in hashed}.values()]
        )
        hashed.clear()
    assert counts[1] == [*counts[0], 1] and counts[0][1:] == [1]


def test_rows_do_not_write_one_adapter_over_another(run):
    method = {"name": "masked_lora", "adapter": "adapter"}
    with pytest.raises(RecipeError, match="each row of a comparison would write"):
        run(by_name("uniform"), prune=True, recover=method)


def test_no_row_starts_from_sensitivities_that_its_allocator_does_not_read(run, no_model):
    method = {"name": "masked_lora", "layers": "ist", "ist_start": "sensitivity"}
    with pytest.raises(RecipeError, match="the run has measured none"):
        run(by_name("mrp", "uniform"), prune=True, recover=method)


def test_a_recovery_without_pruning_or_of_an_unknown_name_is_refused_before_the_model_is_loaded(
    run, no_model
):
    with pytest.raises(RecipeError, match="nothing to recover"):
        run(by_name("uniform"), recover="blockwise")
    with pytest.raises(RecipeError, match="no_such"):
        run(by_name("uniform"), prune=True, recover="no_such")


def test_a_recovery_that_fails_costs_no_figure_of_the_pruned_model(run):
    method = {"name": "masked_lora", "rank": 4, "tokens": 192, "step_tokens": 96, "learning_rate": 1e30}
    record = run(by_name("uniform", "lsa"), prune=True, recover=method)
    plain = run(by_name("uniform", "lsa"), prune=True)
    for row, same in zip(record["rows"], plain["rows"], strict=True):
        assert row["error"] is None and row.get("recovered") is None
        assert (row["perplexity"], row["kl"]) == (same["perplexity"], same["kl"])
        assert row["notes"][-1].startswith("the recovery failed: ")
