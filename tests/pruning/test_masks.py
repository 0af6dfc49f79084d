import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.levels import DENSE, Level
from msp_plugin.pruning.masks import nm_mask, recount

LEVELS = [Level(n, m) for m in (2, 3, 4, 8, 16) for n in range(1, m)]


def naive_mask(score, level):
    mask = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        for start in range(0, score.shape[1], level.m):
            group = range(start, start + level.m)
            for column in sorted(group, key=lambda c: (-float(score[row, c]), c))[: level.n]:
                mask[row, column] = True
    return mask


@given(st.sampled_from(LEVELS), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_the_best_n_of_every_group_stay_and_ties_go_to_the_left(level, rows, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 4, (rows, groups * level.m), generator=generator).float()
    assert torch.equal(nm_mask(score, level), naive_mask(score, level))


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exactly_n_of_m_stay_even_if_all_scores_are_equal(level, dtype):
    score = torch.ones(5, 4 * level.m, dtype=dtype)
    groups = nm_mask(score, level).reshape(5, 4, level.m)
    assert torch.equal(groups, torch.arange(level.m).expand_as(groups) < level.n)


def test_dense_keeps_everything():
    assert nm_mask(torch.zeros(3, 7), DENSE).all()


def test_negative_scores_and_negative_zero_are_ordered_as_numbers():
    assert nm_mask(torch.tensor([[-1.0, -3.0, -2.0, -4.0]]), Level(2, 4)).tolist() == [
        [True, False, True, False]
    ]
    assert nm_mask(torch.tensor([[-0.0, 0.0, -1.0, -1.0]]), Level(1, 4)).tolist() == [
        [True, False, False, False]
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_counted(value):
    score = torch.ones(2, 8)
    score[1, 3] = score[0, 0] = value
    with pytest.raises(NumericsError, match="2 scores are not finite"):
        nm_mask(score, Level(2, 4))


def test_a_width_that_m_does_not_divide_is_refused():
    with pytest.raises(RecipeError, match="does not divide in_features = 6"):
        nm_mask(torch.ones(2, 6), Level(2, 4))


@given(st.sampled_from([*LEVELS, DENSE]), st.integers(0, 2**31), st.floats(0, 1))
def test_the_recount_agrees_with_a_loop(level, seed, share):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 48, generator=generator) * (torch.rand(3, 48, generator=generator) < share)
    if 48 % level.m:
        return
    found = recount(weight, level)
    rows = weight.tolist()
    groups = [row[i : i + level.m] for row in rows for i in range(0, 48, level.m)]
    assert found.zeros == sum(value == 0 for row in rows for value in row)
    assert found.most_in_group == max(sum(v != 0 for v in group) for group in groups)
    assert found.finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_recount_sees_what_is_not_finite(value):
    weight = torch.zeros(2, 8)
    weight[0, 0] = value
    found = recount(weight, Level(2, 4))
    assert (found.zeros, found.most_in_group, found.finite) == (15, 1, False)


def test_negative_zero_is_a_zero():
    assert recount(torch.tensor([[-0.0, 0.0, 1.0, 2.0]]), Level(2, 4)).zeros == 2
