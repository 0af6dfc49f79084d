from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.levels import DENSE, Kind, Level, Pattern
from msp_plugin.plan.units import Groups, Layer
from msp_plugin.pruning.masks import lowest, lowest_by_topk, nm_mask, nm_masks, recount

LEVELS = [Pattern(n, m) for m in (2, 3, 4, 8, 16) for n in range(1, m)]
INSIDE = [Pattern(n, m, Kind.NM_IN_24) for m in (4, 8, 12, 16) for n in range(1, m // 2 + 1)]
SHARES = [Level.parse(share) for share in ("1/2", "0.7", "1/3", "0.01", "8/9")]


def naive_mask(score, level):
    mask = torch.zeros_like(score, dtype=torch.bool)
    width = score.shape[1]
    n, m = (level.n, level.m) if level.kind is not Kind.SHARE else (width * level.n // level.m, width)
    for row in range(score.shape[0]):
        better = partial(_order, score[row].tolist())
        for start in range(0, width, m):
            group = list(range(start, start + m))
            if level.kind is Kind.NM_IN_24:
                fours = [group[i : i + 4] for i in range(0, m, 4)]
                group = [column for four in fours for column in sorted(four, key=better)[:2]]
            for column in sorted(group, key=better)[:n]:
                mask[row, column] = True
    return mask


def _order(scores, column):
    return -scores[column], column


@given(st.sampled_from(LEVELS), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_the_best_n_of_every_group_stay_and_ties_go_to_the_left(level, rows, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 4, (rows, groups * level.m), generator=generator).float()
    assert torch.equal(nm_mask(score, level), naive_mask(score, level))


@given(st.sampled_from([*INSIDE, *SHARES]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_inside_2_4_and_shares_take_the_best_and_ties_go_to_the_left(level, rows, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    width = groups * (level.m if level.kind is Kind.NM_IN_24 else 11)
    score = torch.randint(0, 6, (rows, width), generator=generator).float()
    mask = nm_mask(score, level)
    assert torch.equal(mask, naive_mask(score, level))
    assert int(mask.sum()) == level.kept(Layer("layer", rows, width))
    assert recount(torch.ones_like(score) * mask, level).broken is None
    if level.kind is Kind.NM_IN_24:
        assert (mask.reshape(rows, -1, 4).sum(-1) <= 2).all()


@given(st.lists(st.sampled_from([DENSE, *LEVELS, *INSIDE, *SHARES]), max_size=9), st.integers(0, 2**31))
def test_levels_made_together_are_those_made_alone(levels, seed):
    score = torch.randint(0, 9, (3, 48), generator=torch.Generator().manual_seed(seed)).float()
    for tie_breaker in (None, lowest_by_topk):
        alone = [nm_masks(score, [level], tie_breaker)[0] for level in levels]
        assert all(map(torch.equal, nm_masks(score, levels, tie_breaker), alone))


def test_a_level_inside_2_4_keeps_the_best_of_a_four_before_the_best_of_the_group():
    score = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]])
    kept = nm_mask(score, Level.parse("3:8 in 2:4")).int().tolist()
    assert kept == [[1, 1, 0, 0, 0, 0, 0, 1]]
    assert nm_mask(score, Pattern(3, 8)).int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]


def test_a_share_that_keeps_nothing_of_a_row_is_refused():
    with pytest.raises(RecipeError, match="level 9/10 keeps nothing of in_features = 8"):
        nm_mask(torch.ones(2, 8), Level.parse("0.9"))


@pytest.mark.parametrize("level, weight, found", [
    ("3:8 in 2:4", [1, 1, 1, 0, 0, 0, 0, 0], "keeps 3 of 4 in some aligned four"),
    ("3:8 in 2:4", [1, 1, 0, 0, 1, 1, 0, 0], "keeps 4 of 8 in some group"),
    ("3:8 in 2:4", [1, 1, 0, 0, 0, 0, 0, 1], None),
    ("3:8", [1, 1, 1, 0, 0, 0, 0, 0], None),
    ("0.7", [1, 1, 1, 0, 0, 0, 0, 0], "keeps 3 of 8 in some row"),
    ("0.7", [1, 0, 0, 0, 0, 0, 0, 1], None),
    ("2:4", [1, 1, 1, 0, 0, 0, 0, 0], "keeps 3 of 4 in some group"),
])  # fmt: skip
def test_the_recount_says_how_a_pattern_is_broken(level, weight, found):
    good = [1, 1, 0, 0, 0, 0, 0, 0]
    assert recount(torch.tensor([good, weight]).float(), Level.parse(level)).broken == found


@pytest.mark.parametrize("inner", [True, False])
def test_the_mask_inside_a_width_is_held_against_what_stays(inner):
    level, layer = Level.parse("1/2 wide 2:4"), Layer("x", 8, 8, Groups(8), inner)
    kept, weight = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0]).repeat(4), torch.zeros(8, 8)
    if inner:
        weight[1::2] = kept.view(4, 8)
    else:
        weight[:, 1::2] = kept.view(8, 4)
    assert recount(weight, level, layer).broken is None
    first = weight[1] if inner else weight[2, 1::2]
    first[1] = 1.0
    weight[(3, 0) if inner else (4, 1)] = 0.0  # as many weights as before
    assert recount(weight, level, layer).broken == "keeps 3 of 4 in some group"


@given(st.sampled_from([*LEVELS, *INSIDE, *SHARES]), st.integers(0, 2**31))
def test_zeros_of_dead_inputs_are_those_that_no_mask_can_avoid(level, seed):
    generator = torch.Generator().manual_seed(seed)
    width = 48
    dead = torch.rand(width, generator=generator) < 0.6
    if width % level.group(width)[1] or dead.all():
        return
    n, m = level.group(width)
    most = 0
    for start in range(0, width, m):
        alive = [c for c in range(start, start + m) if not dead[c]]
        if level.kind is Kind.NM_IN_24:
            fours = [[c for c in alive if c // 4 == four] for four in range(start // 4, (start + m) // 4)]
            alive = [column for four in fours for column in four[:2]]
        most += min(n, len(alive))
    weight = torch.ones(3, width) * ~dead
    assert recount(weight, level).from_dead_inputs == level.kept(Layer("layer", 3, width)) - 3 * most


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exactly_n_of_m_stay_even_if_all_scores_are_equal(level, dtype):
    score = torch.ones(5, 4 * level.m, dtype=dtype)
    groups = nm_mask(score, level).reshape(5, 4, level.m)
    assert torch.equal(groups, torch.arange(level.m).expand_as(groups) < level.n)


def test_dense_keeps_everything():
    assert nm_mask(torch.zeros(3, 7), DENSE).all()


def test_negative_scores_and_negative_zero_are_ordered_as_numbers():
    assert nm_mask(torch.tensor([[-1.0, -3.0, -2.0, -4.0]]), Pattern(2, 4)).tolist() == [
        [True, False, True, False]
    ]
    assert nm_mask(torch.tensor([[-0.0, 0.0, -1.0, -1.0]]), Pattern(1, 4)).tolist() == [
        [True, False, False, False]
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_counted(value):
    score = torch.ones(2, 8)
    score[1, 3] = score[0, 0] = value
    with pytest.raises(NumericsError, match="2 scores are not finite"):
        nm_mask(score, Pattern(2, 4))


def test_a_width_that_m_does_not_divide_is_refused():
    with pytest.raises(RecipeError, match="does not divide in_features = 6"):
        nm_mask(torch.ones(2, 6), Pattern(2, 4))


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
    most = max(sum(v != 0 for v in group) for group in groups)
    assert found.broken == (f"keeps {most} of {level.m} in some group" if most > level.n else None)
    assert found.finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_recount_sees_what_is_not_finite(value):
    weight = torch.zeros(2, 8)
    weight[0, 0] = value
    found = recount(weight, Pattern(2, 4))
    assert (found.zeros, found.broken, found.finite) == (15, None, False)


def test_negative_zero_is_a_zero():
    assert recount(torch.tensor([[-0.0, 0.0, 1.0, 2.0]]), Pattern(2, 4)).zeros == 2


@pytest.mark.parametrize("m", [4, 8, 16, 32])
@pytest.mark.parametrize("values", [2, 5, 1000])
def test_the_least_are_topks_whatever_is_equal(m, values):
    score = torch.randint(values, (m, 400), generator=torch.Generator().manual_seed(m)).float()
    for worst in range(m + 1):
        assert torch.equal(lowest(score, worst), lowest_by_topk(score, worst))
    assert torch.equal(lowest(-score.log(), 2), lowest_by_topk(-score.log(), 2))  # infinities


def test_more_equal_scores_than_a_byte_counts_are_settled():
    score = torch.zeros(512, 3)
    score[:257] = 1.0
    gone = lowest(score, 511)
    assert (~gone).sum(dim=0).tolist() == [1, 1, 1]
