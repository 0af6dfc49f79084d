"""What a comparison is over, as the command line names it."""

import pytest

from msp_plugin.errors import RecipeError
from msp_plugin.runs.grid import parse_allocators, parse_sparsities


def test_allocators_are_read_from_a_comma_list():
    labels = {"uniform": "uniform", "owl": "owl", "knapsack@kl": "knapsack"}
    assert parse_allocators("uniform, owl ,knapsack@kl,") == labels
    assert parse_allocators(" , ") == {}


def test_a_label_that_is_given_twice_is_refused():
    with pytest.raises(RecipeError, match="'owl' is given twice"):
        parse_allocators("owl,owl")


def test_sparsities_are_read_exactly():
    assert parse_sparsities("0.75, 5/8,0.1,") == ["3/4", "5/8", "1/10"]
    for text in ("0.5,75", "half", "1"):
        with pytest.raises(RecipeError):
            parse_sparsities(text)
