"""Every allocator that measures candidates stops at its budget in forward tokens."""

import pytest

from msp_plugin.allocators.atp import ATP
from msp_plugin.allocators.evopress import EvoPress
from msp_plugin.allocators.msp import MSP
from msp_plugin.allocators.search import Search
from tests.allocators.quadratic import SHAPES, inputs_of, problem_of


@pytest.mark.parametrize("allocator", [
    MSP(generations=50, max_tokens=120), EvoPress(generations=50, offspring=4, survivors=(2, 1),
    tokens_per_selection=(3, 6), tokens=6, max_tokens=120), ATP(max_tokens=24), Search(patience=99, least_gain=0, max_tokens=120),
], ids=lambda allocator: allocator.name)  # fmt: skip
def test_an_allocator_stops_at_its_budget_in_tokens(allocator):
    problem = problem_of(SHAPES)
    inputs = inputs_of(problem)
    found = allocator.allocate(inputs)
    spent = inputs.loss.forward_tokens + inputs.holdout.forward_tokens
    free = sum(inputs.loss.lengths) * 2  # uniform, and EvoPress' last measurement of the result
    assert spent <= allocator.max_tokens + free and problem.total_kept(found.choice) == problem.budget.kept
    assert found.loss <= found.uniform_loss
