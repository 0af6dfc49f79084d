"""An allocation as a recipe that llm-compressor runs alone."""

import json
from fractions import Fraction

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.hosts.llm_compressor.export import PlainRecipe, plain_recipe
from msp_plugin.hosts.llm_compressor.recipe import Recipe, read_recipe
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level, Pattern

LEVELS = ("2:4", "3:8", "2:8", "1:8", "dense", "7:8", "2:8", "3:8")
METHODS = {
    "sparsegpt": {"name": "sparsegpt", "host": "llmcompressor", "version": "9", "block_size": 64, "dampening_frac": 0.02},
    "wanda": {"name": "wanda", "host": "llmcompressor", "version": "9"},
}  # fmt: skip
MODIFIERS = {"sparsegpt": "SparseGPTModifier", "wanda": "WandaPruningModifier"}


@pytest.fixture
def allocation(llama):
    def make(method=METHODS["sparsegpt"], levels=LEVELS):
        table = prunable_layers(llama)
        return Allocation(table, tuple(map(Level.parse, levels)), Fraction(1, 2), {}, {"method": method})

    return make


def modifiers(recipe):
    """The one modifier of each stage: its class and its arguments."""
    found = []
    for groups in recipe.values():
        (group,) = groups.values()
        found += list(group.items())
    return found


def test_there_is_a_stage_for_each_level_densest_first_and_none_for_dense(allocation):
    recipe = plain_recipe(allocation())
    assert list(recipe) == [f"keep_{n}_stage" for n in ("7_of_8", "2_of_4", "3_of_8", "2_of_8", "1_of_8")]
    assert [list(groups) for groups in recipe.values()] == [
        [f"keep_{n}_modifiers"] for n in ("7_of_8", "2_of_4", "3_of_8", "2_of_8", "1_of_8")
    ]
    assert {name for name, _ in modifiers(recipe)} == {"SparseGPTModifier"}


def test_the_mask_structure_counts_the_pruned_ones(allocation):
    found = [(a["mask_structure"], a["sparsity"]) for _, a in modifiers(plain_recipe(allocation()))]
    assert found == [("1:8", 0.125), ("2:4", 0.5), ("5:8", 0.625), ("6:8", 0.75), ("7:8", 0.875)]


def test_every_pruned_layer_is_named_exactly_once_in_the_stage_of_its_level(allocation):
    given = allocation()
    named = {}
    for _, arguments in modifiers(plain_recipe(given)):
        pruned, m = map(int, arguments["mask_structure"].split(":"))
        for layer in arguments["targets"]:
            assert layer not in named
            named[layer] = Pattern(m - pruned, m)
    assert named == {layer: level for layer, level in given.by_layer.items() if not level.is_dense}


def test_levels_of_equal_sparsity_have_stages_of_their_own(allocation):
    recipe = plain_recipe(allocation(levels=("2:4", "4:8") * 4))
    assert list(recipe) == ["keep_2_of_4_stage", "keep_4_of_8_stage"]
    assert [a["mask_structure"] for _, a in modifiers(recipe)] == ["2:4", "4:8"]


def test_the_methods_options_come_along(allocation):
    for _, arguments in modifiers(plain_recipe(allocation())):
        assert (arguments["block_size"], arguments["dampening_frac"]) == (64, 0.02)


@pytest.mark.parametrize("method", METHODS)
def test_the_written_recipe_is_one_that_llm_compressor_builds(method, run_dir, copied, edit_json, tmp_path):
    path = copied(run_dir)
    edit_json(path / "allocation.json", lambda data: data["provenance"].update(method=METHODS[method]))
    export_checkpoint(path, PlainRecipe(), tmp_path / "out")
    read = read_recipe(tmp_path / "out" / "recipe.yaml")
    given = Allocation.read(path / "allocation.json")
    assert read == plain_recipe(given)
    built = Recipe(read, None).build(None)[0].modifiers
    assert [type(m).__name__ for m in built] == [MODIFIERS[method]] * 4
    assert [list(m.targets) for m in built] == [a["targets"] for _, a in modifiers(read)]
    assert sum(len(m.targets) for m in built) == sum(not level.is_dense for level in given.by_layer.values())


def test_the_directory_holds_recipe_allocation_card_and_manifest_and_no_weights(run_dir, tmp_path):
    manifest = export_checkpoint(run_dir, PlainRecipe(), tmp_path / "out")
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"recipe.yaml", "allocation.json", "README.md", "export.json"}
    assert (out / "allocation.json").read_bytes() == (run_dir / "allocation.json").read_bytes()
    assert Manifest.read(out).differences(out) == [] and set(manifest.files) == {
        "recipe.yaml",
        "allocation.json",
    }
    assert manifest.format == "recipe" and manifest.tensors == {}
    assert (
        "SparseGPTModifier" in (out / "README.md").read_text()
        and "msp_plugin" not in (out / "recipe.yaml").read_text()
    )


def test_a_packed_checkpoint_gives_the_same_recipe(run_dir, packed_dir, tmp_path):
    export_checkpoint(run_dir, PlainRecipe(), tmp_path / "a")
    export_checkpoint(packed_dir, PlainRecipe(), tmp_path / "b")
    assert (tmp_path / "a" / "recipe.yaml").read_bytes() == (tmp_path / "b" / "recipe.yaml").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_oneshot_with_nothing_but_the_recipe_gives_every_layer_its_level(
    method, allocation, llama_dir, data, tmp_path
):
    from llmcompressor import oneshot

    given, model = allocation(METHODS[method]), load_model(llama_dir, "float32")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain_recipe(given), sort_keys=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loader = DataLoader([{"input_ids": sample} for sample in data.samples], batch_size=3)
    recipe = str(tmp_path / "recipe.yaml")
    oneshot(model=model, recipe=recipe, dataset=loader, pipeline="sequential")
    for layer, level in given.by_layer.items():
        weight = model.get_submodule(layer).weight
        kept = (weight.reshape(weight.shape[0], -1, level.m) != 0).sum(-1)
        assert int(kept.min()) == int(kept.max()) == level.n, (layer, level)
        if level.is_dense:
            assert torch.equal(weight, before[f"{layer}.weight"]), layer
    pruned = {f"{layer}.weight" for layer in given.by_layer}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in pruned)


# what is refused


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "magnitude", "version": "1"}, "llm-compressor has no modifier for method 'magnitude'"),
        ({"name": "wandda"}, "no pruner called 'wandda'"),
        ({"name": "wanda", "colour": "red"}, "has no option 'colour'"),
        ({"block_size": 3}, "does not say which method"),
        ("sparsegpt", "does not say which method"),
        (None, "does not say which method"),
    ],
)
def test_an_allocation_whose_method_is_no_modifier_is_refused_and_nothing_is_left(
    method, words, run_dir, copied, edit_json, tmp_path
):
    path = copied(run_dir)
    edit_json(path / "allocation.json", lambda data: data["provenance"].update(method=method))
    with pytest.raises(RecipeError, match=words):
        export_checkpoint(path, PlainRecipe(), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_checkpoint_without_an_allocation_is_refused(llama_dir, tmp_path):
    with pytest.raises(RecipeError, match=r"has no allocation\.json"):
        export_checkpoint(llama_dir, PlainRecipe(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_checkpoint_is_refused(run_dir, tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "allocation.json").write_bytes((run_dir / "allocation.json").read_bytes())
    with pytest.raises(ModelError, match=r"has no config\.json"):
        export_checkpoint(tmp_path / "alone", PlainRecipe(), tmp_path / "out")


def test_an_allocation_without_a_pruned_layer_is_refused(allocation):
    with pytest.raises(RecipeError, match="every layer of the allocation is dense"):
        plain_recipe(allocation(levels=["dense"] * 8))


def test_a_level_that_the_methods_blocks_would_break_is_refused_as_a_run_would(
    run_dir, copied, edit_json, tmp_path
):
    path = copied(run_dir)
    edit_json(path / "allocation.json", lambda data: data["provenance"]["method"].update(block_size=20))
    assert json.loads((path / "allocation.json").read_text())["provenance"]["method"]["block_size"] == 20
    with pytest.raises(RecipeError, match="block_size 20 is no multiple of the M of level"):
        export_checkpoint(path, PlainRecipe(), tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", ["3:8 in 2:4", "7/10", "dropped"])
def test_levels_that_llm_compressor_alone_cannot_make_are_refused_by_name(allocation, method, level):
    with pytest.raises(RecipeError, match=f"{MODIFIERS[method]} of llm-compressor cannot make level {level}"):
        plain_recipe(allocation(METHODS[method], levels=("2:4", level) * 4))
