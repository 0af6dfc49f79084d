"""Recipes and lm-eval's tasks: whatever YAML holds, it is read or refused by name."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.cli.arguments import component_options
from msp_plugin.errors import MSPError, RecipeError, nearest, shown
from msp_plugin.plan.bounds import parse_bounds
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.levels import Level
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plugins.manager import Plugins
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve
from tests.fuzz.mutations import byte_files, documents
from tests.fuzz.readers import READERS, RECIPE, TASK, check

#: Texts on which PyYAML's constructors fail with other types than YAMLError, and texts that it takes in odd ways.
YAML = [
    "!!bool maybe", "!!int ''", "!!float ''", "!!int x", "!!timestamp x", "2020-13-45", "!!binary x", "!!omap [1]",
    "&a [*a]", "&a {b: *a}", "{[a]: 1}", "{{a: b}: 1}", "{1: 2}", "{~: 2}", ".nan", "-.inf",
    "!!python/object:os.system x", "<<: 1", "{<<: {a: 1}}",
    "!x y", "*a", "\t", "%YAML 9.9\n---\na", "--- a\n--- b", "'\\ud800'", "\x00", "a: b: c", "[" * 400,
    "? " * 2000, "- " * 3000, "{a: 1, a: 2}", "!!set {a, b}", "!!pairs [a: b]", "&" + "a" * 300 + " 1", "=", "~", "1e999",
]  # fmt: skip


@st.composite
def yaml_files(draw, valid):
    action = draw(st.sampled_from(["document", "bytes", "value"]))
    if action == "bytes":
        return draw(byte_files(valid.encode()))
    if action == "value":
        lines = valid.splitlines()
        line = draw(st.integers(0, len(lines) - 1))
        key = lines[line].partition(":")[0]
        lines[line] = f"{key}: {draw(st.sampled_from(YAML))}"
        return "\n".join(lines).encode(errors="surrogatepass")
    loaded = yaml.safe_load(valid.replace("!function ", ""))
    try:
        return yaml.safe_dump(draw(documents(loaded))).encode(errors="surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return b"{"


def test_the_valid_files_are_read(tmp_path):
    assert check(READERS["recipe"], tmp_path, RECIPE.encode()) is None
    (tmp_path / "recipe.yaml").unlink()
    assert check(READERS["task"], tmp_path, TASK.encode()) is None


@given(yaml_files(RECIPE))
def test_any_recipe_is_read_or_refused(directory, content):
    check(READERS["recipe"], directory, content)


@given(yaml_files(TASK))
def test_any_task_is_read_or_refused(directory, content):
    (directory / "recipe.yaml").unlink(missing_ok=True)
    check(READERS["task"], directory, content)


@pytest.fixture(scope="module")
def plugins():
    return Plugins(entry_points=False)


LINE = yaml.safe_load(RECIPE)["sparsity_stage"]["sparsity_modifiers"]["MixedSparsityModifier"]


@given(documents(LINE))
def test_any_options_are_resolved_or_refused(plugins, options):
    try:
        plan = resolve(Options.parse(options), plugins)
    except MSPError as error:
        assert len(str(error)) < 3000
        return
    assert 0 <= plan.sparsity < 1 and 0 <= plan.seed < 2**63 and plan.menu
    assert all(isinstance(level.servable, bool) for level in plan.menu)


@pytest.mark.parametrize("text", YAML, ids=shown)
def test_odd_yaml_is_a_value_or_our_error_everywhere(text, tmp_path):
    for name in ("recipe", "task"):
        directory = tmp_path / name
        directory.mkdir()
        for content in (text, f"a_stage: {text}", f"a_stage: {{b_modifiers: {{C: {{d: {text}}}}}}}"):
            check(READERS[name], directory, content.encode(errors="surrogatepass"))
    try:
        component_options([f"method.x={text}"], method="m")
    except MSPError as error:
        assert len(str(error)) < 3000


def test_a_key_twice_names_the_file_and_the_line(tmp_path):
    error = check(READERS["recipe"], tmp_path, RECIPE.encode() + RECIPE.encode())
    assert "recipe.yaml names 'quantization_stage' twice in one group (line 18)" in str(error)


@pytest.mark.parametrize("value", [{"0.1": 1, "0.5": 2}, [[1]], None, b"x", float("nan"), 1j], ids=shown)
def test_values_that_are_no_numbers_are_refused(value):
    for read in (
        Level.parse, parse_sparsity, lambda v: parse_menu([v]), lambda v: parse_bounds({"a": [v, 1]}, [], ()),
        lambda v: parse_bounds({"a": v}, [], ()), lambda v: Options.parse({"sparsity": v, "seed": v}),
    ):  # fmt: skip
        with pytest.raises(RecipeError) as error:
            read(value)
        assert len(str(error.value)) < 1000


def test_whether_a_level_with_a_huge_m_is_servable_is_known_at_once():
    assert Level.parse("1:999999999999").servable and not Level.parse("3:999999999999").servable
    assert Level.parse("2:1000000000000").servable and not Level.parse("2:999999999999").servable


@pytest.mark.parametrize("key", [1, None, 2.5, True, ("a",)])
def test_a_key_that_is_no_word_is_unknown(key):
    with pytest.raises(RecipeError, match="unknown key"):
        Options.parse({key: 1})


def test_a_value_is_shown_short_and_a_hint_needs_no_word():
    assert shown("a" * 500).count("a") < 110
    assert shown([["x"] * 50] * 50).count("x") < 100 and shown(0.5) == "0.5" and shown("ab") == "'ab'"
    assert "known: a" in nearest(5, ["a"]) and nearest("b" * 10**6, ["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=shown)
def test_an_option_that_is_not_finite_is_refused(value, plugins):
    for kind, spec in (
        ("allocators", {"name": "owl", "amplitude": value}),
        ("pruners", {"name": "sparsegpt", "dampening_frac": value}),
    ):
        option = list(spec)[1]
        if option not in plugins.options(kind, spec["name"]):
            continue
        with pytest.raises(RecipeError, match=option):
            plugins.build(kind, spec)
