import types
from dataclasses import dataclass

import pytest

from msp_plugin.errors import PluginError, RecipeError
from msp_plugin.plugins.hookspecs import hookimpl
from msp_plugin.plugins.manager import KINDS, Plugins, spec_of
from msp_plugin.pruning.flap import FLAP
from msp_plugin.pruning.magnitude import Magnitude


def plugin(**functions):
    module = types.ModuleType("plugin")
    for name, function in functions.items():
        setattr(module, name, hookimpl(function))
    return module


def load(**extra):
    return Plugins(extra=extra, entry_points=False)


def install(directory, monkeypatch, name, entry, code, version="1.0"):
    """Put a distribution with an entry point where Python finds it."""
    (directory / f"{name}.py").write_text(code)
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[msp_plugin]\n{entry} = {name}\n")
    monkeypatch.syspath_prepend(directory)


PRUNER = """
from dataclasses import dataclass
from msp_plugin import LayerwisePruner, hookimpl

@dataclass(frozen=True)
class P(LayerwisePruner):
    name = {name!r}

    def score(self, weight, input_norm):
        return weight.abs()

@hookimpl
def msp_register_pruners():
    return [P]
"""


def test_the_builtin_components_are_there():
    found = Plugins(entry_points=False).components
    assert {kind: sorted(found[kind]) for kind in KINDS} == {
        "estimators": [
            "block_influence", "fisher", "heavy_tail", "hessian_trace", "leave_one_out", "median", "outliers", "shapley",
            "virtual_removal",
        ],
        "allocators": [
            "alphapruning", "atp", "depth", "dlp", "evopress", "knapsack", "lsa", "mrp", "msp", "one_shot", "owl",
            "policy_gradient", "search", "uniform",
        ],
        "pruners": ["flap", "l2", "llm_pruner", "magnitude", "obs", "random", "saap", "sparsegpt", "wanda"],
        "recoveries": ["blockwise", "full", "lora", "masked_lora", "mean_update", "sparse_delta", "spp", "weight_update"],
        "formats": ["sparse-24-bitmask", "sparse-bitmask", "sparse-bitmask-int8"],
        "exporters": ["bitmask", "dense", "recipe", "small", "sparse24", "uniform"],
        "checks": ["logits", "quality", "round_trip", "served", "structure"],
    }  # fmt: skip
    assert {c.owner for kind in KINDS for c in found[kind].values()} == {"msp_plugin.plugins.builtin"}


def test_every_component_has_a_summary_and_shows_its_options():
    for components in Plugins(entry_points=False).components.values():
        for component in components.values():
            assert component.summary.endswith(".") or ":" in component.summary or component.summary
    sparsegpt = Plugins(entry_points=False).components["pruners"]["sparsegpt"]
    assert sparsegpt.options == {"block_size": "128", "dampening_frac": "0.01"}
    assert (
        sparsegpt.summary == "SparseGPT (arXiv 2301.00774): the weights that stay make up for those that go."
    )


def test_an_option_without_a_default_is_required():
    @dataclass(frozen=True)
    class Needy:
        name = "needy"
        depth: int

    plugins = load(needy=plugin(msp_register_pruners=lambda: [Needy]))
    assert plugins.components["pruners"]["needy"].options == {"depth": "required"}
    assert plugins.build("pruners", {"name": "needy", "depth": 2}) == Needy(2)
    with pytest.raises(RecipeError, match="option depth"):
        plugins.build("pruners", "needy")


def test_a_name_or_a_mapping_builds_a_component():
    plugins = load()
    assert plugins.build("pruners", "magnitude") == Magnitude()
    sparsegpt = plugins.build("pruners", {"name": "sparsegpt", "block_size": 64})
    assert (sparsegpt.block_size, sparsegpt.dampening_frac) == (64, 0.01)


def test_the_recipe_form_of_a_component_builds_it_again():
    plugins = load()
    for kind, spec in (("pruners", {"name": "sparsegpt", "dampening_frac": 0.5}), ("allocators", "msp")):
        component = plugins.build(kind, spec)
        assert plugins.build(kind, spec_of(component)) == component
    assert spec_of(plugins.build("allocators", "uniform")) == {"name": "uniform"}


def test_an_unknown_component_names_the_nearest():
    with pytest.raises(RecipeError, match="no pruner called 'sparsgpt'") as error:
        load().build("pruners", "sparsgpt")
    assert "did you mean 'sparsegpt'?" in error.value.hint and "wanda" in error.value.hint


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(RecipeError, match="pruner 'sparsegpt' has no option 'blocksize'") as error:
        load().build("pruners", {"name": "sparsegpt", "blocksize": 64})
    assert "did you mean 'block_size'?" in error.value.hint


def test_an_option_name_that_is_no_text_is_unknown_too():
    with pytest.raises(RecipeError, match="no option 1"):
        load().build("pruners", {"name": "sparsegpt", 1: 64})


@pytest.mark.parametrize("kind, name, option, value", [
    ("pruners", "sparsegpt", "block_size", "many"), ("allocators", "msp", "population", 16.5),
    ("allocators", "msp", "loss", 5), ("estimators", "fisher", "samples", None),
])  # fmt: skip
def test_an_option_of_the_wrong_type_names_option_and_value(kind, name, option, value):
    with pytest.raises(RecipeError) as error:
        load().build(kind, {"name": name, option: value})
    assert f"{kind[:-1]} {name!r}: option {option} = {value!r}: " in error.value.message


@pytest.mark.parametrize("spec", [5, None, {}, {"name": 5}, {"power": 1}, ["magnitude"]])
def test_a_component_without_a_name_is_refused(spec):
    with pytest.raises(RecipeError, match="pruner .* has no name") as error:
        load().build("pruners", spec)
    assert "magnitude" in error.value.hint


@pytest.mark.parametrize("kind, spec, found", [
    ("allocators", {"population": 1}, "population = 1 must be at least 2"),
    ("allocators", {"generations": -1}, "generations = -1"),
    ("allocators", {"offspring": 0}, "offspring = 0"),
    ("allocators", {"max_moves": 0}, "max_moves = 0"), ("allocators", {"tokens": 0}, "tokens = 0"),
    ("allocators", {"amplitude": 1.5}, "amplitude = 1.5 is outside"),
    ("allocators", {"crossover": float("nan")}, "crossover = nan is no finite"),
    ("allocators", {"loss": "mse"}, "loss 'mse' is unknown"),
    ("estimators", {"samples": 0}, "at least 1"),
    ("pruners", {"block_size": 0}, "block_size"), ("pruners", {"dampening_frac": -1.0}, "dampening_frac"),
    ("pruners", {"dampening_frac": float("nan")}, "dampening_frac"),
])  # fmt: skip
def test_an_option_out_of_range_is_refused(kind, spec, found):
    name = {"allocators": "msp", "estimators": "fisher", "pruners": "sparsegpt"}[kind]
    with pytest.raises(RecipeError, match=found.replace("(", r"\(")):
        load().build(kind, {"name": name, **spec})


def test_two_plugins_with_one_component_name_are_both_named():
    other = plugin(msp_register_pruners=lambda: [Magnitude])
    with pytest.raises(PluginError, match="two plugins register pruners called 'magnitude'") as error:
        load(mine=other)
    assert "msp_plugin.plugins.builtin and" in error.value.message or "mine and" in error.value.message
    assert "mine" in error.value.message and "MSP_BLOCK_PLUGINS" in error.value.hint


def test_two_plugins_with_one_name_are_refused():
    with pytest.raises(PluginError, match="two plugins are called 'msp_plugin.plugins.builtin'") as error:
        Plugins(extra={"msp_plugin.plugins.builtin": plugin()}, entry_points=False)
    assert "rename" in error.value.hint


def test_one_plugin_under_two_names_is_refused():
    one = plugin()
    with pytest.raises(PluginError, match="'second'"):
        load(first=one, second=one)


def test_load_order_means_nothing():
    def make(name):
        return plugin(msp_register_pruners=lambda: [dataclass(frozen=True)(type("P", (), {"name": name}))])

    a, b = make("a"), make("b")
    assert sorted(load(x=a, y=b).components["pruners"]) == sorted(load(y=b, x=a).components["pruners"])


def test_a_mistyped_hook_names_the_plugin_and_the_nearest_hook():
    with pytest.raises(PluginError, match="plugin mine implements a hook 'msp_run_startd'") as error:
        load(mine=plugin(msp_run_startd=lambda: None))
    assert "did you mean 'msp_run_started'?" in error.value.hint


def test_a_parameter_that_the_hook_lacks_is_refused():
    with pytest.raises(PluginError, match="plugin mine: .*msp_run_started") as error:
        load(mine=plugin(msp_run_started=lambda allocation, model: None))
    assert "model" in error.value.message


def test_a_default_of_a_hooks_parameter_is_refused_because_it_would_never_be_filled():
    def msp_run_started(allocation=None):
        return None

    with pytest.raises(
        PluginError, match=r"plugin mine: msp_run_started\(\) gives its parameter 'allocation'"
    ) as error:
        load(mine=plugin(msp_run_started=msp_run_started))
    assert "remove the default" in error.value.hint


def test_a_hook_may_leave_parameters_out():
    seen = []
    plugins = load(mine=plugin(msp_layer_pruned=lambda layer: seen.append(layer)))
    plugins.hook.msp_layer_pruned(layer="a", level=None, zeros=1, weights=2)
    assert seen == ["a"]


def test_a_hook_that_raises_names_the_plugin_and_the_cause():
    def msp_register_estimators():
        raise ZeroDivisionError("oh")

    with pytest.raises(
        PluginError, match=r"plugin mine: msp_register_estimators\(\) raised ZeroDivisionError: oh"
    ):
        load(mine=plugin(msp_register_estimators=msp_register_estimators))


def test_a_hook_that_returns_nothing_registers_nothing():
    found = load(mine=plugin(msp_register_pruners=lambda: None)).components["pruners"]
    assert found.keys() == load().components["pruners"].keys()


@pytest.mark.parametrize("thing", [Magnitude(), "magnitude", type("Plain", (), {"name": "plain"})])
def test_what_is_no_dataclass_cannot_be_registered(thing):
    with pytest.raises(PluginError, match="plugin mine registers .* among the pruners") as error:
        load(mine=plugin(msp_register_pruners=lambda: [thing]))
    assert "frozen dataclasses" in error.value.hint


def test_a_structured_pruner_has_to_make_widths():
    with pytest.raises(PluginError, match="registers Magnitude among the structured pruners") as error:
        load(mine=plugin(msp_register_structured_pruners=lambda: [Magnitude]))
    assert "msp_register_pruners" in error.value.hint


def test_one_name_under_both_hooks_of_pruners_is_refused():
    with pytest.raises(PluginError, match="two plugins register pruners called 'flap'"):
        load(mine=plugin(msp_register_pruners=lambda: [FLAP]))


def test_a_component_needs_a_name():
    cls = dataclass(frozen=True)(type("Nameless", (), {}))
    with pytest.raises(PluginError, match="plugin mine: Nameless has no name") as error:
        load(mine=plugin(msp_register_pruners=lambda: [cls]))
    assert "name = " in error.value.hint


def test_an_installed_plugin_is_found_with_its_distribution(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "mspt_found", "found", PRUNER.format(name="found"), version="2.5")
    component = Plugins().components["pruners"]["found"]
    assert component.owner == "found (mspt_found 2.5)"
    assert "found" not in Plugins(entry_points=False).components["pruners"]


def test_a_blocked_plugin_is_not_even_imported(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "mspt_blocked", "blocked", "raise RuntimeError('imported')")
    monkeypatch.setenv("MSP_BLOCK_PLUGINS", "other, blocked")
    assert "blocked" not in Plugins().components["pruners"]


def test_an_installed_plugin_that_cannot_be_imported_is_named_with_the_way_out(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "mspt_broken", "broken", "import no_such_module_anywhere")
    with pytest.raises(
        PluginError, match=r"broken \(mspt_broken 1.0\) cannot be imported: ModuleNotFound"
    ) as error:
        Plugins()
    assert "MSP_BLOCK_PLUGINS=broken" in error.value.hint


def test_two_distributions_with_one_plugin_name_are_refused(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "mspt_one", "same", PRUNER.format(name="one"))
    install(tmp_path, monkeypatch, "mspt_two", "same", PRUNER.format(name="two"))
    with pytest.raises(PluginError, match="two plugins are called 'same'"):
        Plugins()


def test_two_distributions_with_one_component_name_are_both_named(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "mspt_left", "left", PRUNER.format(name="shared"))
    install(tmp_path, monkeypatch, "mspt_right", "right", PRUNER.format(name="shared"), version="3.0")
    with pytest.raises(PluginError, match=r"left \(mspt_left 1.0\) and right \(mspt_right 3.0\)"):
        Plugins()


@pytest.mark.parametrize("value", ["nan", ".inf", float("inf"), "-inf"])
@pytest.mark.parametrize(("kind", "name", "option"), [
    ("recoveries", "masked_lora", "learning_rate"), ("recoveries", "blockwise", "rates"), ("pruners", "sparsegpt", "dampening_frac"),
])  # fmt: skip
def test_no_option_is_a_number_without_end(kind, name, option, value):
    with pytest.raises(RecipeError, match=option):
        Plugins(entry_points=False).build(kind, {"name": name, option: value})


def test_one_number_may_stand_for_a_list_of_one():
    assert Plugins(entry_points=False).build("recoveries", {"name": "blockwise", "rates": 0.1}).rates == (
        0.1,
    )
