"""An allocation, from resolved options and text."""

import dataclasses
import json
import logging
from fractions import Fraction

import pytest
import torch

from msp_plugin.errors import BudgetError, NumericsError, RecipeError, VerificationError
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import Level
from msp_plugin.records.parts import SearchRecord
from msp_plugin.runtime.digests import versions
from msp_plugin.search.allocate import check_model, make_problem
from tests.helpers.allocating import allocate, cache_files


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_allocation_is_on_the_budget_and_the_model_is_left_as_it_was(
    model, data, msp_plan, tmp_path, bits, count_hooks, method
):
    before, hooks = bits(model), count_hooks(model)
    made = msp_plan(method=method, sparsity=0.6)
    outcome = allocate(model, data, made)
    found = outcome.allocation
    assert bits(model) == before and count_hooks(model) == hooks
    assert found.table == prunable_layers(model) and found.target == Fraction(3, 5)
    assert found.budget == AllocationProblem(found.table, made.menu, found.target).budget
    assert float(found.budget.sparsity) == pytest.approx(0.6, abs=0.005)
    assert set(found.sensitivities) == {"fisher"} and min(found.sensitivities["fisher"]) > 0
    search = outcome.search.to_dict()
    assert search["loss"] <= search["uniform_loss"] and search["allocator"] == "msp"
    assert search["forward_tokens"] == search["evaluations"] * 48
    assert search["curve"][0] == [48, search["uniform_loss"]] and search["curve"][-1][1] == search["loss"]
    assert json.loads(json.dumps(search, allow_nan=False)) == search


def test_equal_runs_give_equal_bytes_and_the_second_builds_nothing(llama, data, msp_plan, tmp_path):
    first = allocate(llama, data, msp_plan(method="wanda")).allocation.to_json()
    files = cache_files(tmp_path)
    assert len(files) == 14
    assert allocate(llama, data, msp_plan(method="wanda")).allocation.to_json() == first
    assert cache_files(tmp_path) == files
    elsewhere = msp_plan(method="wanda", cache=str(tmp_path / "other"))
    assert allocate(llama, data, elsewhere).allocation.to_json() == first


def test_the_file_says_where_it_came_from_without_times_or_paths(llama, data, msp_plan, tmp_path):
    found = allocate(llama, data, msp_plan(seed=3, ignore=["o_proj"])).allocation
    told = found.provenance
    assert told["model"] == {"architecture": "LlamaForCausalLM", "fingerprint": fingerprint(llama)}
    assert told["allocator"]["population"] == 4 and told["method"]["name"] == "magnitude"
    assert told["estimators"] == {"fisher": {"name": "fisher", "samples": 16}}
    assert (told["seed"], told["ignore"], told["levels"][0]) == (3, ["o_proj"], "dense")
    assert told["calibration"]["samples"] == 6 and told["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in found.to_json()


def test_uniform_needs_no_text_and_touches_no_cache(llama, msp_plan, tmp_path):
    outcome = allocate(llama, None, msp_plan(allocator="uniform"))
    assert {level.name for level in outcome.allocation.levels} == {"4:8"}
    assert outcome.search == SearchRecord() and not (tmp_path / "cache").exists()
    assert outcome.allocation.provenance["calibration"] is None


def test_an_estimator_of_the_weights_alone_needs_no_text(llama, data, msp_plan, tmp_path, bits):
    made = msp_plan(allocator="alphapruning")
    assert not made.needs_data and not made.allocation_needs_data
    before = bits(llama)
    without, with_text = allocate(llama, None, made), allocate(llama, data, made)
    assert without.allocation.to_json() == with_text.allocation.to_json() and bits(llama) == before
    assert without.allocation.provenance["calibration"] is None
    assert (
        set(without.allocation.sensitivities) == {"heavy_tail"} and not (tmp_path / "cache/database").exists()
    )
    assert without.search.allocator == "alphapruning" and without.search.forward_tokens == 0
    wanda = msp_plan(
        allocator="alphapruning", method="wanda"
    )  # the method reads text, the allocation does not
    assert wanda.needs_data and not wanda.allocation_needs_data
    assert allocate(llama, None, wanda).allocation.levels == without.allocation.levels


@pytest.mark.parametrize(
    "allocator, needed", [("owl", True), ("msp", True), ("mrp", True), ("uniform", False)]
)
def test_an_estimator_of_activations_or_a_database_needs_text(llama, msp_plan, allocator, needed):
    made = msp_plan(allocator=allocator)
    assert made.needs_data is made.allocation_needs_data is needed
    if needed:
        with pytest.raises(RecipeError, match=f"allocator '{allocator}' needs calibration text"):
            allocate(llama, None, made)


def test_what_an_allocator_noted_is_in_the_record(llama, msp_plan, caplog):
    made = msp_plan(allocator="alphapruning")

    class Noting(type(made.allocator)):
        def allocate(self, inputs):
            return dataclasses.replace(super().allocate(inputs), notes=("all alike",))

    with caplog.at_level(logging.INFO, logger="msp_plugin"):
        outcome = allocate(llama, None, dataclasses.replace(made, allocator=Noting()))
    assert outcome.search.notes == ("all alike",) and "alphapruning: all alike" in caplog.text


def test_the_errors_that_an_allocator_reads_are_given_by_name(llama, data, msp_plan):
    made, seen = msp_plan(allocator={"name": "knapsack", "surrogate": "kl", "tokens": 48}), {}

    class Reading(type(made.allocator)):
        errors = ("weight", "output", "fisher", "kl")

        def allocate(self, inputs):
            seen.update(inputs.errors)
            return super().allocate(inputs)

    outcome = allocate(llama, data, dataclasses.replace(made, allocator=Reading("kl", 48)))
    assert set(seen) == {"weight", "output", "fisher", "kl"}
    problem = make_problem(llama, outcome.allocation.table, made)
    dense = made.menu.index(Level.parse("dense"))
    for error in seen.values():
        assert error.shape == problem.kept.shape and (error[:, dense] == 0).all() and error.max() > 0
    chosen = tuple(made.menu.index(level) for level in outcome.allocation.levels)
    assert chosen == problem.solve(seen["kl"]) and outcome.allocation.budget.exact


def test_steps_report_their_progress(llama, data, msp_plan):
    seen = {}
    allocate(
        llama,
        data,
        msp_plan(),
        progress=lambda step, done, total, note="": seen.setdefault(step, []).append((done, total)),
    )
    assert list(seen) == ["sensitivity, fisher", "level database", "search"]
    assert [at[-1] for at in seen.values()] == [(4, 4), (14, 14), (10, 10)]


def test_a_sparsity_out_of_reach_is_found_before_any_work(llama, data, msp_plan, tmp_path):
    with pytest.raises(BudgetError, match="dense, 4:8 reach 0 to 0.5"):
        allocate(llama, data, msp_plan(sparsity=0.6, levels=["dense", "4:8"]))
    assert not (tmp_path / "cache").exists()


def test_levels_that_do_not_divide_a_width_are_found_before_any_work(llama, data, msp_plan):
    with pytest.raises(
        RecipeError, match="level 3:7 does not fit 8 of 8 units: it does not divide in_features = 64"
    ):
        allocate(llama, data, msp_plan(levels=["dense", "3:7"]))


def test_weights_that_are_not_finite_are_found_before_any_work(llama, data, msp_plan, tmp_path):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="model.layers.1.mlp.up_proj"):
        allocate(llama, data, msp_plan())
    assert not (tmp_path / "cache").exists()


def test_a_budget_that_cannot_be_met_to_the_weight_is_logged(llama, msp_plan, caplog):
    with caplog.at_level(logging.INFO, logger="msp_plugin"):
        check_model(llama, msp_plan(sparsity=0.6))
        assert "sparsity 3/5 cannot be met exactly; the nearest is 44032 zeros of 73728" in caplog.text
        caplog.clear()
        check_model(llama, msp_plan(sparsity=0.5))
        assert not caplog.text


def test_the_versions_are_those_of_the_installed_packages():
    found = versions()
    assert found["torch"] == torch.__version__ and {"transformers", "numpy", "llmcompressor"} <= set(found)


def test_a_plugins_estimator_and_allocator_work_together(llama, data, msp_plan, plugins_with):
    made = msp_plan(plugins_with("squared_norm"), allocator="dense_where_large", method="wanda")
    outcome = allocate(llama, data, made)
    norms = outcome.allocation.sensitivities["squared_norm"]
    table = prunable_layers(llama)
    expected = [
        sum(float(llama.get_submodule(a.name).weight.detach().square().sum()) for a in u.layers)
        for u in table
    ]
    assert norms == pytest.approx(expected)
    assert outcome.allocation.budget.exact and outcome.search.forward_tokens == 0


def test_a_plugins_allocator_reads_the_level_database(llama, data, msp_plan, plugins_with):
    outcome = allocate(
        llama, data, msp_plan(plugins_with("least_error"), allocator="least_error", method="wanda")
    )
    assert outcome.allocation.budget.exact and outcome.search.allocator == "least_error"


def test_a_plugins_pruner_fills_the_level_database(llama, data, msp_plan, plugins_with):
    plugins = plugins_with("ria")
    first = allocate(llama, data, msp_plan(plugins, method="ria")).allocation
    other = allocate(llama, data, msp_plan(plugins, method={"name": "ria", "power": 0.0})).allocation
    assert first.provenance["method"]["power"] == 0.5 and first.provenance["method"]["host"] == "msp_plugin"
    assert first.provenance["loss"] != other.provenance["loss"]


def test_an_allocator_that_misses_the_budget_is_caught(llama, msp_plan):
    made = msp_plan(allocator="uniform")

    class Greedy(type(made.allocator)):
        def allocate(self, inputs):
            return dataclasses.replace(super().allocate(inputs), choice=(0,) * len(inputs.problem.table))

    with pytest.raises(VerificationError, match="the allocator returned"):
        allocate(llama, None, dataclasses.replace(made, allocator=Greedy()))
