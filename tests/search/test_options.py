from fractions import Fraction

import pytest
import yaml

from msp_plugin.errors import OutputError, RecipeError
from msp_plugin.plan.allocation import Allocation, make_allocation
from msp_plugin.plan.menus import DEFAULT_LEVELS
from msp_plugin.plugins.manager import Plugins
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve


@pytest.fixture(scope="module")
def plugins():
    return Plugins(entry_points=False)


@pytest.fixture
def allocation_file(tmp_path, make_problem):
    problem = make_problem([(4, 8), (4, 16)], ["dense", "4:8", "2:8"], 0.5)
    path = tmp_path / "allocation.json"
    path.write_text(make_allocation(problem, problem.uniform()).to_json())
    return str(path)


def plan_of(plugins, text):
    return resolve(Options(**yaml.safe_load(text)), plugins)


def test_a_sparsity_is_all_that_a_recipe_must_say(plugins):
    plan = plan_of(plugins, "sparsity: 0.7")
    assert plan.sparsity == Fraction(7, 10)
    assert (plan.pruner.name, plan.allocator.name, list(plan.estimators)) == (
        "sparsegpt",
        "search",
        ["fisher"],
    )
    assert [level.name for level in plan.menu] == list(DEFAULT_LEVELS)
    assert (plan.targets, plan.ignore, plan.seed, plan.given, plan.cache) == (("Linear",), (), 0, None, None)


def test_everything_a_recipe_says_reaches_the_plan(plugins):
    plan = plan_of(
        plugins,
        """
        sparsity: 5/8
        method: {name: sparsegpt, block_size: 64}
        levels: ["1:8", dense, "4:8"]
        targets: [q_proj, down_proj]
        ignore: ["re:.*layers.0"]
        allocator: {name: msp, generations: 3}
        estimators: {fisher: {samples: 7}}
        seed: 5
        cache: /somewhere
        """,
    )
    assert (
        plan.sparsity == Fraction(5, 8) and plan.pruner.block_size == 64 and plan.allocator.generations == 3
    )
    assert [level.name for level in plan.menu] == ["dense", "4:8", "1:8"]
    assert plan.targets == ("q_proj", "down_proj") and plan.ignore == ("re:.*layers.0",)
    assert plan.estimators["fisher"].samples == 7 and plan.seed == 5 and plan.cache == "/somewhere"


def test_lists_may_be_written_with_commas(plugins):
    plan = plan_of(plugins, 'sparsity: 0.5\ntargets: q_proj, down_proj\nignore: o_proj\nlevels: "dense, 2:4"')
    assert plan.targets == ("q_proj", "down_proj") and plan.ignore == ("o_proj",)
    assert [level.name for level in plan.menu] == ["dense", "2:4"]


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(RecipeError, match="unknown key 'sparcity'") as error:
        Options(sparcity=0.5)
    assert "did you mean 'sparsity'?" in error.value.hint


@pytest.mark.parametrize("text, found, hint", [
    ("{}", "sparsity is missing", "0.75"),
    ("sparsity: 75", r"sparsity 75.0 is outside \[0, 1\)", "write 0.75"),
    ("sparsity: 1", "sparsity 1.0 is outside", "share of zeros"),
    ("sparsity: -0.5", "sparsity -0.5 is outside", "share of zeros"),
    ("sparsity: much", "sparsity 'much' is not a number", "0.75"),
    ("{sparsity: 0.5, method: sparsgpt}", "no pruner called 'sparsgpt'", "did you mean 'sparsegpt'"),
    ("{sparsity: 0.5, method: {name: sparsegpt, dampening: 1}}", "no option 'dampening'", "'dampening_frac'"),
    ("{sparsity: 0.5, allocator: unifrom}", "no allocator called 'unifrom'", "did you mean 'uniform'"),
    ("{sparsity: 0.5, estimators: {fischer: {}}}", "no estimator called 'fischer'", "did you mean 'fisher'"),
    ("{sparsity: 0.5, estimators: {fisher: {sample: 3}}}", "'fisher' has no option 'sample'", "'samples'"),
    ("{sparsity: 0.5, levels: [2:4]}", "level 124 is a number", '"2:4"'),
    ("{sparsity: 0.5, levels: ['2:4', '2:4']}", "levels named twice: 2:4", "once"),
    ("{sparsity: 0.5, levels: []}", "list of levels is empty", "at least one"),
    ("{sparsity: 0.5, levels: [half]}", "'half' is not a level", "N:M"),
])  # fmt: skip
def test_a_wrong_recipe_says_what_was_found_and_what_to_do(plugins, text, found, hint):
    with pytest.raises(RecipeError, match=found) as error:
        plan_of(plugins, text)
    assert hint in error.value.hint


def test_a_block_size_that_m_does_not_divide_is_refused_before_anything_is_loaded(plugins):
    with pytest.raises(RecipeError, match="block_size 12 is no multiple of the M of level 7:8") as error:
        plan_of(plugins, "{sparsity: 0.5, method: {name: sparsegpt, block_size: 12}}")
    assert "change block_size" in error.value.hint
    assert plan_of(
        plugins, "{sparsity: 0.5, levels: [dense, '3:6'], method: {name: sparsegpt, block_size: 12}}"
    )


def test_a_finished_allocation_gives_sparsity_and_levels(plugins, allocation_file):
    plan = resolve(Options(allocation=allocation_file), plugins)
    assert plan.sparsity == Fraction(1, 2) and [level.name for level in plan.menu] == ["4:8"]
    assert plan.given.table.names == ("layers.0.proj", "layers.1.proj")
    assert resolve(Options(allocation=allocation_file, sparsity="1/2"), plugins).given == plan.given


def test_an_allocation_in_the_home_directory_is_found(plugins, allocation_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = resolve(Options(allocation="~/allocation.json"), plugins)
    assert plan.given == Allocation.read("~/allocation.json") and plan.spelled.allocation == allocation_file
    with pytest.raises(RecipeError, match="no allocation file at .*~nobody-of-this-name/a.json"):
        resolve(Options(allocation="~nobody-of-this-name/a.json"), plugins)


def test_a_sparsity_that_contradicts_the_allocation_is_refused(plugins, allocation_file):
    with pytest.raises(
        RecipeError, match="sparsity 0.6 contradicts .*allocation.json, made for 1/2"
    ) as error:
        resolve(Options(allocation=allocation_file, sparsity=0.6), plugins)
    assert "leave sparsity out" in error.value.hint


def test_a_missing_allocation_file_is_named(plugins, tmp_path):
    with pytest.raises(RecipeError, match="no allocation file at .*none.json"):
        resolve(Options(allocation=str(tmp_path / "none.json")), plugins)


def test_a_method_that_cannot_make_the_allocations_levels_is_refused(plugins, allocation_file):
    with pytest.raises(RecipeError, match="level 4:8"):
        resolve(Options(allocation=allocation_file, method={"name": "sparsegpt", "block_size": 4}), plugins)


@pytest.mark.parametrize("method, allocator, needed", [
    ("magnitude", "uniform", False), ("magnitude", "msp", True), ("wanda", "uniform", True),
    ("sparsegpt", "uniform", True),
])  # fmt: skip
def test_text_is_needed_for_statistics_or_for_a_search(plugins, method, allocator, needed):
    assert resolve(Options(sparsity=0.5, method=method, allocator=allocator), plugins).needs_data is needed


def test_a_finished_allocation_needs_no_text_beyond_the_methods(plugins, allocation_file):
    assert not resolve(Options(allocation=allocation_file, method="magnitude"), plugins).needs_data
    assert resolve(Options(allocation=allocation_file, method="wanda"), plugins).needs_data


def test_the_options_of_an_estimator_that_the_allocator_does_not_use_are_checked_too(plugins):
    with pytest.raises(RecipeError, match="'fisher' has no option 'sample'"):
        plan_of(plugins, "{sparsity: 0.5, allocator: uniform, estimators: {fisher: {sample: 3}}}")


def test_granularity_bounds_and_protection_reach_the_plan(plugins):
    plan = plan_of(
        plugins,
        """
        sparsity: 0.5
        granularity: layer
        bounds: {"*down_proj": [0.25, 5/8]}
        protect: "re:.*layers.0, o_proj"
        """,
    )
    assert plan.granularity == "layer"
    assert plan.bounds.shares == {"*down_proj": (Fraction(1, 4), Fraction(5, 8))}
    assert plan.bounds.protect == ("re:.*layers.0", "o_proj") and not plan.bounds.dense_for_protected


def test_protection_adds_dense_to_the_menu(plugins):
    plan = plan_of(plugins, "{sparsity: 0.5, levels: ['2:4', '2:8'], protect: [o_proj]}")
    assert [level.name for level in plan.menu] == ["dense", "2:4", "2:8"]
    assert plan.bounds.dense_for_protected


@pytest.mark.parametrize("text, found, hint", [
    ("{sparsity: 0.5, granularity: blok}", "granularity 'blok' is unknown", "did you mean 'block'"),
    ("{sparsity: 0.5, bounds: {q_proj: 0.5}}", "bounds of 'q_proj' are 0.5", "[0.25, 0.5]"),
    ("{sparsity: 0.5, bounds: {q_proj: [0.5, 0.2]}}", r"bounds of 'q_proj' are \[0.5, 0.2\]", "least <= most"),
])  # fmt: skip
def test_wrong_bounds_are_refused_before_anything_is_loaded(plugins, text, found, hint):
    with pytest.raises(RecipeError, match=found) as error:
        plan_of(plugins, text)
    assert hint in error.value.hint


@pytest.mark.parametrize("text, names", [
    ("servable", ["dense", "2:4", "3:8 in 2:4", "2:8", "1:8", "1:16"]),
    ("[servable, '1:4']", ["dense", "2:4", "3:8 in 2:4", "2:8", "1:4", "1:8", "1:16"]),
    ("default", list(DEFAULT_LEVELS)),
    ("0.7", ["7/10"]),
    ("[dense, 0.7, 1/2]", ["dense", "1/2", "7/10"]),
    ("dense, 3:8 in 2:4, 0.9", ["dense", "3:8 in 2:4", "9/10"]),
])  # fmt: skip
def test_levels_of_all_kinds_and_named_menus_are_read(plugins, text, names):
    plan = plan_of(plugins, f"sparsity: 0.7\nlevels: {text}")
    assert [level.name for level in plan.menu] == names


def test_an_unquoted_level_alone_is_explained():
    with pytest.raises(RecipeError, match="level 124 is a number"):
        Options(sparsity=0.5, levels=124)


def test_a_comma_inside_a_regular_expression_is_its_own(plugins):
    plan = plan_of(
        plugins,
        "{sparsity: 0.5, targets: 're:.*(q|k)_proj{1,2}, re:.*[v,w]_proj, re:.*(o,?(x)?), down_proj'}",
    )
    assert plan.targets == ("re:.*(q|k)_proj{1,2}", "re:.*[v,w]_proj", "re:.*(o,?(x)?)", "down_proj")


@pytest.mark.parametrize("text, found", [
    ("{sparsity: 0.5, allocator: {name: search, tokens: true}}", "tokens = True, expected a number"),
    ("{sparsity: 0.5, allocation: ''}", "allocation is empty"),
    ("{sparsity: 0.5, estimators: {fisher: {name: outliers}}}", "fisher name outliers"),
])  # fmt: skip
def test_options_that_would_be_taken_for_others_are_refused(plugins, text, found):
    with pytest.raises(RecipeError, match=found):
        plan_of(plugins, text)


def test_a_cache_that_is_a_file_is_refused_before_anything_is_loaded(plugins, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OutputError, match="cache is a file"):
        resolve(Options(sparsity=0.5, cache=str(tmp_path / "cache")), plugins)


@pytest.mark.parametrize("form, levels, granularity", [
    ("sparse24", ["dense", "2:4", "3:8 in 2:4", "2:8", "1:8", "1:16"], "unit"),
    ("bitmask", list(DEFAULT_LEVELS), "layer"),
    ("small", ["dense", *(f"{n}/{d} wide" for n, d in [(7, 8), (3, 4), (5, 8), (1, 2), (3, 8), (1, 4), (1, 8)]), "dropped"], "half"),
    ("uniform", ["dense", "dropped"], "block"),
])  # fmt: skip
def test_a_form_chooses_levels_and_granularity_and_the_recipe_of_the_run_names_them(
    plugins, form, levels, granularity
):
    method = "l2" if form == "small" else "sparsegpt"
    plan = plan_of(plugins, f"{{sparsity: 0.5, method: {method}, form: {form}}}")
    assert ([level.name for level in plan.menu], plan.granularity) == (levels, granularity)
    again = resolve(plan.spelled, plugins)
    assert (again.menu, again.granularity, again.form) == (plan.menu, plan.granularity, plan.form)


@pytest.mark.parametrize("text", [
    "form: sparse24, levels: '2:4, 1:8'",
    "method: l2, form: small, levels: 'width, 2:4, 1/2 wide 2:4'",
    "form: uniform, levels: 'depth, 2:4'",
    "method: l2, form: uniform, levels: 3/4 wide, granularity: half",
])  # fmt: skip
def test_levels_that_a_form_holds_may_be_chosen_beside_it(plugins, text):
    assert plan_of(plugins, f"{{sparsity: 0.5, {text}}}").form.name in text


@pytest.mark.parametrize("text, found", [
    ("form: sparse24, levels: default", "would leave layers at 7:8, 6:8, 5:8, 4:8, 3:8 dense"),
    ("form: sparse24, granularity: layer", "may leave one dense"),
    ("form: small, levels: '2:4, dense'", "no level takes any"),
    ("method: l2, form: uniform, levels: 'dense, 1/2 wide', granularity: half", "levels 1/2 wide make blocks differ"),
    ("form: uniform, granularity: half", "dropped halves make blocks differ"),
    (
        "method: l2, form: uniform, levels: 1/2 wide, granularity: half, protect: [model.layers.0.*]",
        "levels 1/2 wide make blocks differ",
    ),
    ("form: smal", "smal"),
])  # fmt: skip
def test_options_that_a_form_may_not_hold_are_refused_before_anything_is_loaded(plugins, text, found):
    with pytest.raises(RecipeError, match=found):
        plan_of(plugins, f"{{sparsity: 0.5, {text}}}")


def test_a_form_beside_a_finished_allocation_is_refused(plugins, allocation_file):
    with pytest.raises(RecipeError, match="form would have no effect"):
        resolve(Options(allocation=allocation_file, form="bitmask"), plugins)
