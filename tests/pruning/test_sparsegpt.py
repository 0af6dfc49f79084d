"""The column loop against its definition: fresh least-squares solves in float64, no factorisation."""

import numpy as np
import pytest
import torch

from msp_plugin.errors import NumericsError
from msp_plugin.plan.levels import Kind, Level
from msp_plugin.plan.units import Layer
from msp_plugin.pruning.masks import recount
from msp_plugin.pruning.sparsegpt import factor_inverse, quadratic_form, sparsegpt, sparsegpt_levels

LEVELS = [Level.parse(text) for text in ("2:4", "3:8", "1:8", "3:8 in 2:4", "5:16 in 2:4", "0.7", "1/3")]


def layer(out=6, width=32, tokens=400, seed=0):
    """A weight [out, width] and the Hessian 2/T sum x x^T of correlated inputs, with a damped diagonal."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mix
    return torch.randn(out, width, generator=generator), 2 / tokens * (x.T @ x)


def naive_sparsegpt(weight, hessian, level, block_size):
    """At column i the columns before it are settled; the others are where the error is least given those.

    A mask is chosen at the first column of its group, or, for a share of zeros, of its block, by the least
    w^2 / [H_rest^-1]_jj. Every block keeps its part of a row's count, rounded down over all blocks so far.
    """
    dense, result = weight.double().numpy(), weight.double().numpy().copy()
    H, (out, width) = hessian.double().numpy(), weight.shape
    pruned = np.zeros((out, width), dtype=bool)
    row = width * level.n // level.m
    for i in range(width):
        settled, rest = slice(0, i), slice(i, width)
        change = (result - dense)[:, settled]
        result[:, rest] = dense[:, rest] - np.linalg.solve(H[rest, rest], H[rest, settled] @ change.T).T
        group = min(block_size, width - i) if level.kind is Kind.SHARE else level.m
        if i % (block_size if level.kind is Kind.SHARE else level.m) == 0:
            price = np.array([np.linalg.inv(H[j:, j:])[0, 0] for j in range(i, i + group)])
            score = result[:, i : i + group] ** 2 / price
            keep = (i + group) * row // width - i * row // width if level.kind is Kind.SHARE else level.n
            for r in range(out):
                columns = list(range(group))
                if level.kind is Kind.NM_IN_24:
                    fours = [columns[c : c + 4] for c in range(0, group, 4)]
                    columns = [c for four in fours for c in sorted(four, key=lambda c: -score[r, c])[:2]]
                kept = sorted(columns, key=lambda c: -score[r, c])[:keep]
                pruned[r, [i + c for c in range(group) if c not in kept]] = True
        result[pruned[:, i], i] = 0
    return result


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("width, block_size", [(32, 128), (32, 16), (48, 32)])
@pytest.mark.parametrize("dampening", [0.01, 0.3])
def test_the_loop_is_the_column_wise_least_squares_of_the_paper(level, width, block_size, dampening):
    weight, hessian = layer(width=width)
    before = hessian.clone()
    found = sparsegpt(weight, factor_inverse(hessian, dampening, "layer"), level, block_size)
    assert torch.equal(hessian, before)
    damped = hessian + dampening * hessian.diag().mean() * torch.eye(width)
    expected = naive_sparsegpt(weight, damped, level, block_size)
    np.testing.assert_allclose(found.numpy(), expected, rtol=5e-3, atol=5e-5)


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width, block_size", [(96, 128), (96, 16), (96, 64)])
def test_counts_are_exact_in_every_row_and_dtype_shape_and_weight_stay(level, dtype, width, block_size):
    weight, hessian = layer(width=width)
    weight = weight.to(dtype)
    before = weight.clone()
    found = sparsegpt(weight, factor_inverse(hessian, 0.01, "layer"), level, block_size)
    assert (found.dtype, found.shape) == (dtype, weight.shape) and torch.equal(weight, before)
    assert ((found != 0).sum(1) == level.kept(Layer("layer", 1, width))).all()
    assert recount(found, level).broken is None


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_equal_weights_and_inputs_are_pruned_to_the_exact_count(level):
    found = sparsegpt(torch.full((5, 64), 0.5), factor_inverse(torch.eye(64), 0.01, "layer"), level, 32)
    assert (
        int((found != 0).sum()) == level.kept(Layer("layer", 5, 64)) and recount(found, level).broken is None
    )


@pytest.mark.parametrize("dead", [(5,), tuple(range(16, 32)), tuple(range(12))])
@pytest.mark.parametrize("block_size", [16, 128])
def test_dead_inputs_lose_their_weights_and_a_share_stays_exact_where_it_can(dead, block_size):
    weight, hessian = layer(width=48)
    hessian[list(dead)] = 0
    hessian[:, list(dead)] = 0
    for level in LEVELS:
        found = sparsegpt(weight, factor_inverse(hessian, 0.01, "layer"), level, block_size)
        assert (found[:, list(dead)] == 0).all()
        counted = recount(found, level)
        assert counted.broken is None
        if level.kind is Kind.SHARE:
            lost = max(0, level.group(48)[0] - (48 - len(dead)))
            assert ((found != 0).sum(1) == level.group(48)[0] - lost).all()
            assert counted.from_dead_inputs == 6 * lost


def test_a_share_beats_n_of_m_and_n_of_m_beats_it_inside_2_4():
    weight, hessian = layer(out=64, width=128, tokens=2000)
    error = {}
    for name in ("5/8", "3:8", "3:8 in 2:4"):
        factor = factor_inverse(hessian, 0.01, "layer")
        delta = sparsegpt(weight, factor, Level.parse(name), 64) - weight
        error[name] = float((delta @ hessian * delta).sum())
    assert error["5/8"] < error["3:8"] < error["3:8 in 2:4"]


def test_a_singular_hessian_is_refused_by_name():
    ones = torch.ones(8, 8)
    with pytest.raises(NumericsError, match="the Hessian of up_proj is singular with dampening 0") as error:
        factor_inverse(ones, 0.0, "up_proj")
    assert "more calibration samples" in error.value.hint
    ones[2, 3] = float("nan")
    with pytest.raises(NumericsError, match="the Hessian of up_proj is not finite"):
        factor_inverse(ones, 0.01, "up_proj")


def test_inputs_that_are_all_dead_leave_nothing():
    found = sparsegpt(torch.ones(3, 16), factor_inverse(torch.zeros(16, 16), 0.01, "x"), LEVELS[5], 8)
    assert (found == 0).all()


@pytest.mark.parametrize("out", [6, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_together_are_the_levels_alone(out, dtype):
    weight, hessian = layer(out=out, width=64)
    weight, factor = weight.to(dtype), factor_inverse(hessian, 0.01, "layer")
    before = weight.clone()
    together = sparsegpt_levels(weight, factor, LEVELS, 32)
    assert torch.equal(weight, before) and len(together) == len(LEVELS)
    for level, found in zip(LEVELS, together, strict=True):
        assert torch.equal(found, sparsegpt(weight, factor, level, 32)) and found.dtype == dtype
    assert sparsegpt_levels(weight, factor, [], 32) == []


@pytest.mark.parametrize("width", [32, 256, 300, 600])
def test_the_quadratic_form_is_the_whole_product(width):
    weight, hessian = layer(width=width)
    before = weight.clone()
    expected = ((weight.double() @ hessian.double()) * weight.double()).sum(dim=1)
    found = quadratic_form(weight, hessian)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.mean()))
    assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=1e-5)
    assert torch.equal(weight, before)
