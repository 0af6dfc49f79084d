"""What a comparison is over, as the command line names it."""

import pytest

from msp_plugin.errors import RecipeError
from msp_plugin.runs.grid import parse_allocators, parse_sparsities


def test_allocators_are_read_from_a_comma_list():
    assert parse_allocators("uniform, owl ,knapsack[surrogate=kl; tokens=512],") == {
        "uniform": "uniform", "owl": "owl",
        "knapsack[surrogate=kl; tokens=512]": {"name": "knapsack", "surrogate": "kl", "tokens": 512},
    }  # fmt: skip
    assert parse_allocators("a[x=0.5],a[x=true],a[x=null],a[x=b=c],a[]") == {
        "a[x=0.5]": {"name": "a", "x": 0.5}, "a[x=true]": {"name": "a", "x": True},
        "a[x=null]": {"name": "a", "x": None}, "a[x=b=c]": {"name": "a", "x": "b=c"}, "a[]": {"name": "a"},
    }  # fmt: skip
    assert parse_allocators(" , ") == {}


@pytest.mark.parametrize("text, words", [
    ("owl,knapsack[surrogate=kl", "brackets"), ("knapsack]surrogate=kl[", "brackets"),
    ("a[b=1]c", "brackets"),
    ("a[b=[1]]", "brackets"), ("[x=1]", "brackets"), ("a[x]", "'x' is no option"),
    ("a[=1]", "'=1' is no option"),
    ("owl[name=dlp]", "'name=dlp' is no option"), ("owl,owl", "'owl' is given twice"),
])  # fmt: skip
def test_a_list_of_allocators_that_cannot_be_read_is_explained(text, words):
    with pytest.raises(RecipeError, match=words):
        parse_allocators(text)


def test_sparsities_are_read_exactly():
    assert parse_sparsities("0.75, 5/8,0.1,") == ["3/4", "5/8", "1/10"]
    for text in ("0.5,75", "half", "1"):
        with pytest.raises(RecipeError):
            parse_sparsities(text)
