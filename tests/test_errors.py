import ast
import re
from pathlib import Path

import pytest

import msp_plugin
from msp_plugin import errors
from msp_plugin.errors import MSPError, nearest


def test_a_hint_stands_on_a_line_of_its_own():
    error = MSPError("found 3, expected 4", hint="give one more")
    assert str(error) == "found 3, expected 4\n  -> give one more"
    assert (error.message, error.hint) == ("found 3, expected 4", "give one more")


def test_an_error_without_a_hint_is_its_message():
    assert str(MSPError("found 3")) == "found 3" and MSPError("found 3").hint is None


@pytest.mark.parametrize(
    "name, code",
    [
        ("RecipeError", 2), ("PluginError", 2), ("DataError", 2), ("ModelError", 2), ("BudgetError", 2),
        ("OutputError", 2), ("HostError", 1), ("NumericsError", 1), ("VerificationError", 1), ("FormatError", 1),
        ("ServingError", 1),
    ],
)  # fmt: skip
def test_what_the_caller_wrote_wrong_exits_with_two_and_what_a_run_met_with_one(name, code):
    cls = getattr(errors, name)
    assert issubclass(cls, MSPError) and cls.exit_code == code


def test_every_error_class_has_its_exit_code_above():
    classes = {c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MSPError)}
    assert len(classes - {"MSPError"}) == 11


@pytest.mark.parametrize(
    "typo, meant", [("sparsgpt", "sparsegpt"), ("wand", "wanda"), ("magnitud", "magnitude")]
)
def test_the_nearest_word_is_offered_beside_all_known_ones(typo, meant):
    hint = nearest(typo, ["wanda", "sparsegpt", "magnitude"])
    assert hint == f"did you mean {meant!r}? Known: magnitude, sparsegpt, wanda"


def test_without_a_near_word_all_are_listed():
    assert nearest("zzzz", ["wanda", "sparsegpt"]) == "known: sparsegpt, wanda"
    assert nearest("zzzz", iter(())) == "known: (none)"


def raised_texts(tree):
    """The strings of every statement that raises or logs, and of every hint."""
    for node in ast.walk(tree):
        logs = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")
        if isinstance(node, ast.Raise) or logs or (isinstance(node, ast.keyword) and node.arg == "hint"):
            yield from (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))


def test_errors_outside_the_command_line_spell_no_option_of_it():
    """They are raised in Python and in oneshot as well; a whole command, `msp export --to dense`, fits anywhere."""
    package, odd = Path(msp_plugin.__file__).parent, []
    for file in package.rglob("*.py"):
        if file.is_relative_to(package / "cli"):
            continue
        for text in raised_texts(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(text, str) and re.search(r"(?<![\w-])--[a-z]", text) and "msp " not in text:
                odd.append(f"{file.relative_to(package)}: {text}")
    assert not odd
