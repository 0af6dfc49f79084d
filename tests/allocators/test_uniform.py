import pytest

from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.allocators.uniform import Uniform
from msp_plugin.plan.menus import DEFAULT_LEVELS


def allocate(problem):
    return Uniform().allocate(AllocationInputs(problem, {}, {}, None, 0, lambda done, total: None))


def test_uniform_is_one_level_where_it_exists(make_problem):
    problem = make_problem([(4, 8), (3, 64), (5, 16)], DEFAULT_LEVELS, 0.75)
    assert {problem.menu[k].name for k in allocate(problem).choice} == {"2:8"}


@pytest.mark.parametrize("target", [0.7, "2/3", 0.01])
def test_uniform_is_a_mixture_of_neighbours_where_it_does_not(make_problem, target):
    problem = make_problem([(4, 64)] * 10, DEFAULT_LEVELS, target)
    result = allocate(problem)
    assert problem.total_kept(result.choice) == problem.budget.kept
    assert max(result.choice) - min(result.choice) == 1
    assert (result.loss, result.uniform_loss, result.evaluations, result.curve) == (None, None, 0, ())


def test_uniform_needs_neither_data_nor_estimators():
    assert not Uniform.needs_database and not Uniform.seeded and Uniform.sensitivities == Uniform.errors == ()
