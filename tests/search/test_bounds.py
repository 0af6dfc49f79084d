"""Granularity, bounds and protection from the recipe to the allocation."""

import json
from fractions import Fraction
from functools import partial

import pytest

from msp_plugin.errors import BudgetError, RecipeError
from msp_plugin.plan.allocation import Allocation
from msp_plugin.search.allocate import check_model
from tests.helpers.allocating import MSP, allocate


@pytest.fixture
def plan(plan):
    return partial(plan, allocator=MSP)


def sparsities(allocation):
    return {name: level.sparsity for name, level in allocation.by_layer.items()}


@pytest.mark.parametrize(
    "granularity, units, method",
    [("unit", 8, "sparsegpt"), ("layer", 14, "magnitude"), ("block", 2, "sparsegpt")],
)
def test_a_search_at_every_granularity_meets_the_budget(llama, data, plan, granularity, units, method):
    found = allocate(llama, data, plan(granularity=granularity, method=method)).allocation
    assert len(found.table) == units and found.budget.sparsity == Fraction(1, 2)
    assert found.provenance["granularity"] == granularity
    assert Allocation.from_dict(json.loads(found.to_json())) == found


@pytest.mark.slow
def test_the_level_database_does_not_depend_on_the_granularity(llama, data, plan, tmp_path):
    written = {}
    for granularity in ("unit", "layer", "half", "block"):
        cache = tmp_path / granularity
        allocate(
            llama,
            data,
            plan(granularity=granularity, method="sparsegpt", allocator="knapsack", cache=str(cache)),
        )
        written[granularity] = {f.name: f.read_bytes() for f in cache.rglob("*.safetensors")}
    assert (
        written["unit"] == written["layer"] == written["half"] == written["block"]
        and len(written["unit"]) == 14
    )


def test_protected_layers_stay_dense_and_the_others_make_up_for_them(llama, data, plan):
    found = allocate(llama, data, plan(protect=["down_proj"], levels=["6:8", "4:8", "2:8"])).allocation
    assert found.budget.sparsity == Fraction(1, 2) and len(found.by_layer) == 14
    for name, share in sparsities(found).items():
        assert (share == 0) == name.endswith("down_proj")
    assert found.provenance["protect"] == ["down_proj"] and found.provenance["bounds"] == {}


@pytest.mark.parametrize("allocator", ["uniform", MSP])
def test_no_layer_leaves_its_bounds(llama, data, plan, allocator):
    bounds = {"re:.*layers.0": [0.25, 0.5], "o_proj": [0.5, 1]}
    found = allocate(llama, data, plan(bounds=bounds, allocator=allocator)).allocation
    assert found.budget.exact
    for name, share in sparsities(found).items():
        if ".0." in name:
            assert Fraction(1, 4) <= share <= Fraction(1, 2)
        if name.endswith("o_proj"):
            assert share >= Fraction(1, 2)
    assert found.provenance["bounds"] == {"re:.*layers.0": ["1/4", "1/2"], "o_proj": ["1/2", "1"]}


def test_a_budget_that_bounds_put_out_of_reach_is_refused_before_any_work(llama, plan):
    with pytest.raises(BudgetError, match="within bounds and protect, reach 0 to 0.25"):
        check_model(llama, plan(bounds={"Linear": [0, 0.25]}))


def test_bounds_that_match_nothing_are_refused_before_any_work(llama, plan):
    with pytest.raises(RecipeError, match="protect 'qproj' matches no module"):
        check_model(llama, plan(protect=["qproj"]))
