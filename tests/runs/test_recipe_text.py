"""recipe.yaml, which a run leaves: the same run by llm-compressor, whatever the defaults of a later version are."""

import dataclasses

import pytest
import yaml

from msp_plugin.plugins.manager import Plugins, spec_of
from msp_plugin.runs.steps import recipe_text
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve


@pytest.mark.parametrize("given", [
    {"sparsity": 0.75}, {"sparsity": "5/8", "method": "wanda", "allocator": "msp", "ignore": ["re:.*k_proj"]},
    {"sparsity": 0.3, "method": {"name": "llm_pruner", "taylor": "second"}, "levels": "width", "allocator": "uniform"},
])  # fmt: skip
def test_a_recipe_names_every_option_and_gives_the_options_that_it_was_made_of(given):
    plugins = Plugins(entry_points=False)
    plan = resolve(Options(**given), plugins)
    line = yaml.safe_load(recipe_text(plan))["sparsity_stage"]["sparsity_modifiers"]["MixedSparsityModifier"]
    assert {*Options.model_fields} - {*line} == {"allocation", "cache", "form"}
    assert {*line["allocator"]} == {*spec_of(plan.allocator)} and {*line["method"]} == {*spec_of(plan.pruner)}
    again = resolve(Options(**line), plugins)
    assert dataclasses.replace(again, spelled=plan.spelled) == plan
