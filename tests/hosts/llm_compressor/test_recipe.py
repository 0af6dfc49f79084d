import pytest

from msp_plugin.errors import HostError, RecipeError
from msp_plugin.hosts.llm_compressor.recipe import Recipe, our_line, read_recipe
from msp_plugin.plugins.manager import Plugins


def build(text):
    recipe = Recipe.parse(text, Plugins())
    return recipe.build(recipe.options)


GOOD = "a_stage:\n  b_modifiers:\n    MixedSparsityModifier: {sparsity: 0.75}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MixedSparsityModifier: {sparsity: 0.75}\n", ["is not a stage", "ignore it in silence"]),
        ("a_stage:\n  MixedSparsityModifier: {sparsity: 0.75}\n", ["not a group of modifiers"]),
        ("a:\n  b_modifiers:\n    MixedSparsityModifier: {}\n", ["'a' is not a stage"]),
        ("a_stage:\n  b_modifiers: {MixedSparsityModifier: 3}\n", ["has 3 for arguments"]),
        ("\n", ["empty or no mapping"]),
        ("a_stage: [\n", ["not YAML"]),
        (
            "a_stage:\n  b_modifiers:\n    WandaPruningModifier: {sparsity: 0.5}\n"
            "    WandaPruningModifier: {sparsity: 0.6}\n",
            ["'WandaPruningModifier' twice", "line 4", "last one only"],
        ),
    ],
)  # fmt: skip
def test_a_recipe_that_llm_compressor_would_ignore_or_misread_is_refused(text, words):
    with pytest.raises(RecipeError) as caught:
        read_recipe(text)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_recipe_in_the_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(GOOD)
    assert our_line(read_recipe("~/recipe.yaml")) == {"sparsity": 0.75}


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no recipe at .*nothing.yaml"):
        read_recipe(tmp_path / "nothing.yaml")


def test_an_unknown_modifier_names_the_nearest_one():
    with pytest.raises(RecipeError, match="did you mean 'MixedSparsityModifier'"):
        build(GOOD.replace("Mixed", "Mxed"))


def test_a_refusal_by_the_host_is_passed_on():
    with pytest.raises(RecipeError, match="llm-compressor refuses"):
        build("a_stage:\n  b_modifiers:\n    WandaPruningModifier: {colour: red}\n")


def test_a_method_that_prunes_whole_units_is_refused_without_a_model():
    with pytest.raises(HostError, match="'l2' prunes whole units"):
        Recipe.parse(GOOD.replace("0.75", '0.25, method: l2, levels: [dense, "1/2 wide"]'), Plugins())


def test_unquoted_levels_in_yaml_are_explained():
    text = GOOD.replace("{sparsity: 0.75}", "{sparsity: 0.5, levels: [2:4, dense]}")
    with pytest.raises(RecipeError, match="reads an unquoted 2:4 in base 60"):
        build(text)


def test_our_line_is_found_in_any_stage_and_two_are_refused():
    other = "z_stage:\n  y_modifiers:\n    WandaPruningModifier: {sparsity: 0.5}\n"
    assert our_line(read_recipe(other)) is None
    assert our_line(read_recipe(other + GOOD)) == {"sparsity": 0.75}
    with pytest.raises(RecipeError, match="2 lines of MixedSparsityModifier"):
        our_line(read_recipe(GOOD + GOOD.replace("a_stage", "c_stage")))


def test_a_good_recipe_becomes_the_hosts_own_object():
    recipe, ours = build(GOOD)
    assert recipe.modifiers == [ours] and type(ours).__name__ == "MixedSparsityModifier"
    assert ours.sparsity == 0.75 and ours.method == "sparsegpt" and ours.requires_calibration_data
