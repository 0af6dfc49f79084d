"""What holds for every built-in allocator: the budget, the seed, the bounds."""

import numpy as np
import pytest

from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable
from msp_plugin.plugins.manager import Plugins

SMALL = {
    "search": {"rounds": 3}, "evopress": {"generations": 3, "offspring": 8, "tokens": 12},
    "policy_gradient": {"steps": 40, "rate": 0.05, "tokens": 12}, "msp": {"population": 4, "generations": 3, "offspring": 4}, "atp": {"step": 0.02}, "mrp": {"start": 0.5},
}  # fmt: skip
NAMES = sorted(Plugins(entry_points=False).components["allocators"])
SHAPES = [(4, 24), (8, 24), (4, 48), (16, 24), (2, 96), (8, 48)]


class MadeUpLoss:
    """A loss that adds up over units and levels."""

    def __init__(self, shape):
        rng = np.random.default_rng(5)
        self.values = np.sort(rng.exponential(1.0, shape), axis=1)
        self.draws, self.lengths, self.forward_tokens = rng.normal(0, 0.1, (4, *shape)), (3,) * 4, 0

    def __call__(self, choice, samples=None):
        self.forward_tokens += 12
        return float(self.values[np.arange(len(choice)), list(choice)].sum())

    def move_gradients(self, choice, samples, reach, seed):
        now = self.values[np.arange(len(choice)), list(choice)]
        return np.repeat((self.values - now[:, None])[None], len(samples), axis=0), self.draws[list(samples)]

    def set_incumbent(self, choice):
        pass


def allocate(name, seed, allowed=None):
    units = tuple(Unit(str(u), u // 2, (Layer(str(u), *shape),)) for u, shape in enumerate(SHAPES))
    problem = AllocationProblem(UnitTable(units), parse_menu(DEFAULT_LEVELS), parse_sparsity("0.6"), allowed)
    allocator = Plugins(entry_points=False).build("allocators", {"name": name, **SMALL.get(name, {})})
    shape = (len(SHAPES), len(problem.menu))
    rng = np.random.default_rng(1)
    scores = np.repeat(rng.exponential(1.0, 3), 2) * np.array([unit.weights for unit in units])
    errors = {key: np.sort(rng.random(shape), axis=1) for key in allocator.errors}
    measures = allocator.measures
    return problem, allocator, allocator.allocate(
        AllocationInputs(
            problem, dict.fromkeys(allocator.sensitivities, scores), errors,
            MadeUpLoss(shape) if measures else None, seed,
            lambda *at: None, MadeUpLoss(shape) if allocator.stopping_tokens else None,
            (lambda name, choice: scores + np.array(choice)) if allocator.remeasures else None,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_equal_inputs_give_equal_results_and_only_seeded_ones_read_the_seed(name):
    problem, allocator, first = allocate(name, 0)
    assert allocate(name, 0)[2] == first
    assert problem.total_kept(first.choice) == problem.budget.kept
    assert all(isinstance(k, int) for k in first.choice)
    others = [allocate(name, seed)[2] for seed in (1, 2, 3)]
    if allocator.seeded:
        assert any(other != first for other in others)
    else:
        assert others == [first] * 3


@pytest.mark.parametrize("name", NAMES)
def test_bounds_hold(name):
    allowed = np.ones((6, 8), dtype=bool)
    allowed[0, 1:] = allowed[3, :5] = allowed[4, [2, 5]] = False
    problem, _, found = allocate(name, 0, allowed)
    assert problem.total_kept(found.choice) == problem.budget.kept
    assert allowed[np.arange(6), list(found.choice)].all()
