import dataclasses
import json
import logging
from fractions import Fraction

import pytest
import torch

from msp_plugin.allocators.base import AllocationResult
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import TextSplit, split_text
from msp_plugin.errors import BudgetError, DataError, NumericsError, RecipeError, VerificationError
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import Level
from msp_plugin.plugins.manager import Plugins
from msp_plugin.records.parts import SearchRecord
from msp_plugin.runtime.digests import versions
from msp_plugin.search import level_database
from msp_plugin.search.allocate import allocate as allocate_split
from msp_plugin.search.allocate import check_model, make_problem, uniform_levels
from msp_plugin.search.level_database import open_database
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve

MSP = {"name": "msp", "population": 4, "generations": 2, "offspring": 3, "tokens": 48}


@pytest.fixture
def plan(tmp_path):
    def make(plugins=None, **options):
        options = {
            "sparsity": 0.5,
            "method": "magnitude",
            "allocator": MSP,
            "cache": str(tmp_path / "cache"),
            **options,
        }
        if "allocation" not in options:
            options = {"granularity": "unit", **options}
        return resolve(Options(**options), plugins or Plugins(entry_points=False))

    return make


def allocate(model, data, made, **options):
    text = TextSplit() if data is None else split_text(data, made.search_text)
    return allocate_split(model, text, made, **options)


def parts(data, made):
    text = split_text(data, made.search_text)
    return text.calibration, text.search, text.holdout


def key_of(model_id, data, made):
    return open_database(model_id, data, made.pruner, made.menu, made.cache).key


def database_of(model, data, made):
    table = check_model(model, made)
    levels = uniform_levels(make_problem(model, table, made))
    prefix = {layer.name: level for unit, level in zip(table, levels, strict=True) for layer in unit.layers}
    return open_database(fingerprint(model), data, made.pruner, made.menu, made.cache, prefix=prefix)


def cache_files(tmp_path):
    return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_allocation_is_on_the_budget_and_the_model_is_left_as_it_was(
    model, data, plan, tmp_path, bits, count_hooks, method
):
    before, hooks = bits(model), count_hooks(model)
    made = plan(method=method, sparsity=0.6)
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


def test_equal_runs_give_equal_bytes_and_the_second_builds_nothing(llama, data, plan, tmp_path):
    first = allocate(llama, data, plan(method="wanda")).allocation.to_json()
    files = cache_files(tmp_path)
    assert len(files) == 14
    assert allocate(llama, data, plan(method="wanda")).allocation.to_json() == first
    assert cache_files(tmp_path) == files
    elsewhere = plan(method="wanda", cache=str(tmp_path / "other"))
    assert allocate(llama, data, elsewhere).allocation.to_json() == first


def test_the_file_says_where_it_came_from_without_times_or_paths(llama, data, plan, tmp_path):
    found = allocate(llama, data, plan(seed=3, ignore=["o_proj"])).allocation
    told = found.provenance
    assert told["model"] == {"architecture": "LlamaForCausalLM", "fingerprint": fingerprint(llama)}
    assert told["allocator"]["population"] == 4 and told["method"]["name"] == "magnitude"
    assert told["estimators"] == {"fisher": {"name": "fisher", "samples": 16}}
    assert (told["seed"], told["ignore"], told["levels"][0]) == (3, ["o_proj"], "dense")
    assert told["calibration"]["samples"] == 6 and told["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in found.to_json()


def test_uniform_needs_no_text_and_touches_no_cache(llama, plan, tmp_path):
    outcome = allocate(llama, None, plan(allocator="uniform"))
    assert {level.name for level in outcome.allocation.levels} == {"4:8"}
    assert outcome.search == SearchRecord() and not (tmp_path / "cache").exists()
    assert outcome.allocation.provenance["calibration"] is None


def test_an_estimator_of_the_weights_alone_needs_no_text(llama, data, plan, tmp_path, bits):
    made = plan(allocator="alphapruning")
    assert not made.needs_data and not made.allocation_needs_data
    before = bits(llama)
    without, with_text = allocate(llama, None, made), allocate(llama, data, made)
    assert without.allocation.to_json() == with_text.allocation.to_json() and bits(llama) == before
    assert without.allocation.provenance["calibration"] is None
    assert (
        set(without.allocation.sensitivities) == {"heavy_tail"} and not (tmp_path / "cache/database").exists()
    )
    assert without.search.allocator == "alphapruning" and without.search.forward_tokens == 0
    wanda = plan(allocator="alphapruning", method="wanda")  # the method reads text, the allocation does not
    assert wanda.needs_data and not wanda.allocation_needs_data
    assert allocate(llama, None, wanda).allocation.levels == without.allocation.levels


@pytest.mark.parametrize(
    "allocator, needed", [("owl", True), ("msp", True), ("mrp", True), ("uniform", False)]
)
def test_an_estimator_of_activations_or_a_database_needs_text(llama, plan, allocator, needed):
    made = plan(allocator=allocator)
    assert made.needs_data is made.allocation_needs_data is needed
    if needed:
        with pytest.raises(RecipeError, match=f"allocator '{allocator}' needs calibration text"):
            allocate(llama, None, made)


def test_what_an_allocator_noted_is_in_the_record(llama, plan, caplog):
    made = plan(allocator="alphapruning")

    class Noting(type(made.allocator)):
        def allocate(self, inputs):
            return dataclasses.replace(super().allocate(inputs), notes=("all alike",))

    with caplog.at_level(logging.INFO, logger="msp_plugin"):
        outcome = allocate(llama, None, dataclasses.replace(made, allocator=Noting()))
    assert outcome.search.notes == ("all alike",) and "alphapruning: all alike" in caplog.text


def test_the_errors_that_an_allocator_reads_are_given_by_name(llama, data, plan):
    made, seen = plan(allocator={"name": "knapsack", "surrogate": "kl", "tokens": 48}), {}

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


def test_a_search_without_text_is_refused(llama, plan):
    with pytest.raises(RecipeError, match="allocator 'msp' needs calibration text") as error:
        allocate(llama, None, plan())
    assert "dataset" in error.value.hint


def test_too_little_text_for_the_search_is_refused(llama, data, plan):
    with pytest.raises(DataError, match="asks for 100 held-out tokens, but 6 .* 144 tokens leave at most 72"):
        allocate(llama, data, plan(allocator={**MSP, "tokens": 100}))


def test_the_held_out_samples_do_not_calibrate(llama, data, plan, tmp_path):
    made = plan(method="wanda")
    head, tail = data.split(48)
    allocate(llama, data, made)
    database = database_of(llama, head, made)
    assert database.path.is_dir() and len(tail) == 2
    assert not database_of(llama, data, made).path.exists()


@pytest.mark.parametrize("lengths, tokens, holdout, expected", [
    ([24] * 6, 48, 24, ([24] * 3, [24] * 2, [24])),
    ([24] * 8, 40, 30, ([24] * 4, [24] * 2, [24] * 2)),  # a hold-out of whole samples takes none of the search's
    ([24] * 6, 10, 10, ([24] * 4, [24], [24])),
    ([10, 50, 7, 40, 9, 20], 35, 25, ([10, 50, 7], [40], [9, 20])),
    ([10, 50, 60, 5, 6, 30, 9, 20], 31, 25, ([10, 50, 60, 5], [6, 30], [9, 20])),
    ([24] * 6, 48, 0, ([24] * 4, [24] * 2, [])),
])  # fmt: skip
def test_the_search_gets_as_much_text_as_it_asks_for_and_so_does_the_hold_out(
    plan, lengths, tokens, holdout, expected
):
    made = plan()

    class Stopping(type(made.allocator)):
        stopping_tokens = holdout

    made = dataclasses.replace(made, allocator=Stopping(tokens=tokens))
    samples = tuple(torch.full((length,), i) for i, length in enumerate(lengths))
    found = parts(CalibrationSet(samples, "some"), made)
    assert tuple([len(sample) for sample in part.samples] for part in found) == expected
    joined = [sample for part in found for sample in part.samples]
    assert all(torch.equal(a, b) for a, b in zip(joined, samples, strict=True))


def test_the_three_parts_are_used_for_what_they_are_for(llama, make_samples, plan, monkeypatch):
    data, seen = make_samples(10), {}
    made = plan(method="wanda")

    class Stopping(type(made.allocator)):
        stopping_tokens = 48

        def allocate(self, inputs):
            seen["search"], seen["holdout"] = inputs.loss.data.samples, inputs.holdout.data.samples
            return AllocationResult(inputs.problem.uniform())

    original = level_database.build_database

    def build(database, model, table, pruner, samples, **options):
        seen["statistics"] = samples.samples
        return original(database, model, table, pruner, samples, **options)

    monkeypatch.setattr(level_database, "build_database", build)
    allocate(llama, data, dataclasses.replace(made, allocator=Stopping(tokens=48)))
    assert {name: [len(part), [torch.equal(a, b) for a in part for b in data.samples].index(True)]
            for name, part in seen.items()} == {"statistics": [6, 0], "search": [2, 6], "holdout": [2, 8]}  # fmt: skip


def test_steps_report_their_progress(llama, data, plan):
    seen = {}
    allocate(
        llama,
        data,
        plan(),
        progress=lambda step, done, total, note="": seen.setdefault(step, []).append((done, total)),
    )
    assert list(seen) == ["sensitivity, fisher", "level database", "search"]
    assert [at[-1] for at in seen.values()] == [(4, 4), (14, 14), (10, 10)]


def test_every_input_of_the_weights_changes_the_databases_key(llama, qwen2, data, make_samples, plan):
    def key(model=llama, samples=data, **options):
        return key_of(fingerprint(model), samples, plan(**options))

    sparsegpt = {"method": "sparsegpt"}
    keys = [
        key(**sparsegpt), key(qwen2, **sparsegpt), key(samples=make_samples(seed=1), **sparsegpt),
        key(method={"name": "sparsegpt", "dampening_frac": 0.02}), key(method="wanda"),
        key(levels=["dense", "4:8"], **sparsegpt),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(seed=5, sparsity=0.25, allocator="uniform", **sparsegpt) == keys[0]


def test_a_method_without_statistics_has_one_database_for_all_samples(llama, data, make_samples, plan):
    made = plan(method="magnitude")
    assert key_of("m", data, made) == key_of("m", make_samples(seed=1), made)


def test_a_finished_allocation_is_taken_as_it_is(llama, data, plan, tmp_path):
    path = tmp_path / "allocation.json"
    path.write_text(allocate(llama, data, plan()).allocation.to_json())
    outcome = allocate(llama, None, plan(sparsity=None, allocation=str(path), allocator="search"))
    assert outcome.allocation.to_json() == path.read_text() and outcome.search == SearchRecord()


def test_a_finished_allocation_brings_its_own_targets(llama, plan, tmp_path):
    path = tmp_path / "allocation.json"
    made = allocate(llama, None, plan(allocator="uniform", ignore=["o_proj"])).allocation
    path.write_text(made.to_json())
    assert check_model(llama, plan(sparsity=None, allocation=str(path), allocator="search")) == made.table


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("protect", ["down_proj"]), ("bounds", {"q_proj": [0, 0.5]}), ("granularity", "block"), ("levels", ["2:4"]),
        ("allocator", "owl"), ("allocator", {"name": "search", "rounds": 2}), ("ignore", ["o_proj"]),
        ("targets", ["down_proj"]), ("estimators", {"fisher": {"samples": 2}}),
    ],
)  # fmt: skip
def test_what_a_finished_allocation_has_decided_cannot_be_said_again(llama, plan, tmp_path, option, value):
    path = tmp_path / "allocation.json"
    path.write_text(allocate(llama, None, plan(allocator="uniform")).allocation.to_json())
    given = {"sparsity": None, "allocation": str(path), "allocator": "search", option: value}
    with pytest.raises(RecipeError, match=f"^{option} would have no effect: .*allocation.json has decided"):
        plan(**given)


def test_an_allocation_of_another_model_is_refused(llama, plan, tmp_path):
    path = tmp_path / "allocation.json"
    path.write_text(allocate(llama, None, plan(allocator="uniform")).allocation.to_json())
    llama.model.layers[1].mlp.down_proj = torch.nn.Linear(256, 64)
    with pytest.raises(VerificationError, match=r"1 of its 14 layers .*1.mlp.down_proj \[64, 128\]"):
        allocate(llama, None, plan(sparsity=None, allocation=str(path), allocator="search"))


def test_a_sparsity_out_of_reach_is_found_before_any_work(llama, data, plan, tmp_path):
    with pytest.raises(BudgetError, match="dense, 4:8 reach 0 to 0.5"):
        allocate(llama, data, plan(sparsity=0.6, levels=["dense", "4:8"]))
    assert not (tmp_path / "cache").exists()


def test_levels_that_do_not_divide_a_width_are_found_before_any_work(llama, data, plan):
    with pytest.raises(
        RecipeError, match="level 3:7 does not fit 8 of 8 units: it does not divide in_features = 64"
    ):
        allocate(llama, data, plan(levels=["dense", "3:7"]))


def test_weights_that_are_not_finite_are_found_before_any_work(llama, data, plan, tmp_path):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="model.layers.1.mlp.up_proj"):
        allocate(llama, data, plan())
    assert not (tmp_path / "cache").exists()


def test_a_budget_that_cannot_be_met_to_the_weight_is_logged(llama, plan, caplog):
    with caplog.at_level(logging.INFO, logger="msp_plugin"):
        check_model(llama, plan(sparsity=0.6))
        assert "sparsity 3/5 cannot be met to the weight: nearest is 44032 zeros of 73728" in caplog.text
        caplog.clear()
        check_model(llama, plan(sparsity=0.5))
        assert not caplog.text


def test_the_versions_are_those_of_the_installed_packages():
    found = versions()
    assert found["torch"] == torch.__version__ and {"transformers", "numpy", "llmcompressor"} <= set(found)


def test_a_plugins_estimator_and_allocator_work_together(llama, data, plan, plugins_with):
    made = plan(plugins_with("squared_norm"), allocator="dense_where_large", method="wanda")
    outcome = allocate(llama, data, made)
    norms = outcome.allocation.sensitivities["squared_norm"]
    table = prunable_layers(llama)
    expected = [
        sum(float(llama.get_submodule(a.name).weight.detach().square().sum()) for a in u.layers)
        for u in table
    ]
    assert norms == pytest.approx(expected)
    assert outcome.allocation.budget.exact and outcome.search.forward_tokens == 0


def test_a_plugins_allocator_reads_the_level_database(llama, data, plan, plugins_with):
    outcome = allocate(
        llama, data, plan(plugins_with("least_error"), allocator="least_error", method="wanda")
    )
    assert outcome.allocation.budget.exact and outcome.search.allocator == "least_error"


def test_a_plugins_pruner_fills_the_level_database(llama, data, plan, plugins_with):
    plugins = plugins_with("ria")
    first = allocate(llama, data, plan(plugins, method="ria")).allocation
    other = allocate(llama, data, plan(plugins, method={"name": "ria", "power": 0.0})).allocation
    assert first.provenance["method"]["power"] == 0.5 and first.provenance["method"]["host"] == "msp_plugin"
    assert first.provenance["loss"] != other.provenance["loss"]


def test_an_allocator_that_misses_the_budget_is_caught(llama, plan):
    made = plan(allocator="uniform")

    class Greedy(type(made.allocator)):
        def allocate(self, inputs):
            return dataclasses.replace(super().allocate(inputs), choice=(0,) * len(inputs.problem.table))

    with pytest.raises(VerificationError, match="the allocator returned"):
        allocate(llama, None, dataclasses.replace(made, allocator=Greedy()))


@pytest.mark.parametrize("count, expected", [(2, (1, 1, 0)), (6, (3, 2, 1)), (64, (32, 21, 11))])
def test_a_search_whose_defaults_ask_for_more_text_than_there_is_takes_half(
    plan, make_samples, caplog, count, expected
):
    made = plan(allocator="search")
    found = parts(make_samples(count), made)
    assert tuple(map(len, found)) == expected
    assert f"candidates are measured on {24 * expected[1]} tokens" in caplog.text


@pytest.mark.parametrize("option", [{"tokens": 8192}, {"holdout": 4096}])
def test_text_that_was_asked_for_by_name_is_not_made_less(plan, make_samples, option):
    with pytest.raises(DataError, match="held-out tokens"):
        parts(make_samples(6), plan(allocator={"name": "search", **option}))


def test_a_search_with_its_defaults_starts_on_a_few_short_samples(llama, plan, make_samples):
    made = plan(method="magnitude", allocator={"name": "search", "rounds": 1})
    assert allocate(llama, make_samples(4), made).allocation.budget.exact
