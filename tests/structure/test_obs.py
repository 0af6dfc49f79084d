"""Removal of columns: least squares against torch's own solver, greedy choices against trying every one."""

from itertools import combinations

import pytest
import torch

from msp_plugin.errors import NumericsError
from msp_plugin.structure.obs import remove_groups


def problem(seed, rows=5, groups=6, size=2, samples=40):
    generator = torch.Generator().manual_seed(seed)
    width = groups * size
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, width, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), inputs, groups, size


def least_squares(weight, inputs, kept, size):
    """Return (weight, error) of the best fit on the columns of some groups, by torch.linalg.lstsq."""
    columns = [group * size + i for group in kept for i in range(size)]
    fitted = torch.zeros_like(weight)
    if columns:
        fitted[:, columns] = torch.linalg.lstsq(inputs[:, columns], inputs @ weight.T).solution.T
    return fitted, float(((inputs @ (weight - fitted).T) ** 2).sum())


def error_of(removal, weight, inputs):
    """Return the squared change of the output, summed over the inputs."""
    return float((inputs @ (weight - removal.weight).T).square().sum())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_stays_is_the_least_squares_fit_and_its_error(size):
    weight, inputs, groups, _ = problem(0, size=size)
    for count, removal in remove_groups(weight, inputs.T @ inputs, groups, range(groups + 1)).items():
        assert len(removal.kept) == count
        fitted, error = least_squares(weight, inputs, removal.kept, size)
        torch.testing.assert_close(removal.weight, fitted, rtol=1e-6, atol=1e-8)
        assert error_of(removal, weight, inputs) == pytest.approx(error, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_each_step_removes_the_group_that_costs_least(seed):
    weight, inputs, groups, size = problem(seed)
    found = remove_groups(weight, inputs.T @ inputs, groups, range(groups + 1))
    for count in range(groups, 0, -1):
        options = {tuple(g for g in found[count].kept if g != gone): None for gone in found[count].kept}
        errors = {kept: least_squares(weight, inputs, kept, size)[1] for kept in options}
        assert found[count - 1].kept == min(errors, key=errors.get)


def test_greedy_removal_is_near_the_best_choice():
    for seed in range(5):
        weight, inputs, groups, size = problem(seed)
        best = min(least_squares(weight, inputs, kept, size)[1] for kept in combinations(range(groups), 3))
        found = error_of(remove_groups(weight, inputs.T @ inputs, groups, [3])[3], weight, inputs)
        assert best <= found * (1 + 1e-9) and found <= 2 * best


def test_nothing_removed_changes_nothing_and_everything_removed_is_zero():
    weight, inputs, groups, _ = problem(1)
    found = remove_groups(weight, inputs.T @ inputs, groups, [0, groups])
    assert torch.equal(found[groups].weight, weight)
    assert not found[0].weight.any() and found[0].kept == ()


def test_columns_that_copy_others_are_removed_at_no_cost():
    weight, inputs, groups, size = problem(2)
    inputs[:, :size] = inputs[:, 2 * size : 3 * size]
    gram = inputs.T @ inputs
    gram += 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    removal = remove_groups(weight, gram, groups, [groups - 1])[groups - 1]
    assert set(range(groups)) - set(removal.kept) <= {0, 2}
    assert error_of(removal, weight, inputs) < 1e-6 * float((inputs @ weight.T).square().sum())


def test_a_gram_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(NumericsError, match="not positive definite"):
        remove_groups(torch.ones(2, 4), torch.zeros(4, 4), 4, [2])


def test_several_groups_at_once_are_the_least_costly_ones_and_their_fit_is_exact():
    weight, inputs, groups, size = problem(3)
    gram = inputs.T @ inputs
    found = remove_groups(weight, gram, groups, [1, 4], at_once=2)
    alone = {
        g: least_squares(weight, inputs, tuple(k for k in range(groups) if k != g), size)[1]
        for g in range(groups)
    }
    assert set(range(groups)) - set(found[4].kept) == set(sorted(alone, key=alone.get)[:2])
    for removal in found.values():
        fitted, error = least_squares(weight, inputs, removal.kept, size)
        torch.testing.assert_close(removal.weight, fitted, rtol=1e-6, atol=1e-8)
        assert error_of(removal, weight, inputs) == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_what_stays_at_a_width_does_not_depend_on_the_other_widths_asked_for(at_once):
    weight, inputs, groups, _ = problem(5, groups=9)
    gram = inputs.T @ inputs
    together = remove_groups(weight, gram, groups, range(groups + 1), at_once)
    for count, removal in together.items():
        assert remove_groups(weight, gram, groups, [count], at_once)[count].kept == removal.kept
        assert count == 0 or set(together[count - 1].kept) < set(removal.kept)
