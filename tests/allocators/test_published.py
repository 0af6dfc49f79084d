"""The published allocators through the public entry, on a small real model."""

import pytest

from msp_plugin.data.samples import TextSplit, split_text
from msp_plugin.plugins.manager import Plugins
from msp_plugin.search.allocate import allocate
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve

ALLOCATORS = {
    "alphapruning": {}, "atp": {"tokens": 48, "step": 0.05}, "dlp": {}, "lsa": {}, "mrp": {"start": 0.7},
    "one_shot": {}, "owl": {},
}  # fmt: skip
ESTIMATORS = {"one_shot": {"hessian_trace": {"samples": 1, "probes": 1}}}


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("granularity", ["unit", pytest.param("block", marks=pytest.mark.slow)])
def test_a_run_is_on_the_budget_repeats_and_leaves_the_model(
    llama, data, tmp_path, bits, count_hooks, name, granularity
):
    before, hooks = bits(llama), count_hooks(llama)
    options = Options(
        sparsity=0.75, method="magnitude", allocator={"name": name, **ALLOCATORS[name]},
        granularity=granularity, cache=str(tmp_path), estimators=ESTIMATORS.get(name, {}),
    )  # fmt: skip
    plan = resolve(options, Plugins(entry_points=False))
    text = split_text(data, plan.search_text)
    first, second = (allocate(llama, text, plan).allocation for _ in range(2))
    assert first.to_json() == second.to_json() and first.budget.zeros * 4 == first.budget.weights * 3
    assert bits(llama) == before and count_hooks(llama) == hooks


def test_alphapruning_runs_without_text(llama, tmp_path):
    plan = resolve(
        Options(sparsity=0.75, method="magnitude", allocator="alphapruning", cache=str(tmp_path)),
        Plugins(entry_points=False),
    )
    assert allocate(llama, TextSplit(), plan).allocation.budget.exact
