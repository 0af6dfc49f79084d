"""The layer-wise update against least squares on the kept columns."""

import copy

import pytest
import torch

from msp_plugin.errors import RecipeError
from msp_plugin.passes.losses import mean_kl
from msp_plugin.recovery.weight_update import WeightUpdate, conjugate_gradients


@pytest.fixture
def problem():
    """Inputs of the pruned and of the dense model [N, I], the dense weight [O, I] and what is kept of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator, dtype=torch.float64) @ torch.randn(
        24, 24, generator=generator, dtype=torch.float64
    )
    dense_x = x + 0.3 * torch.randn(200, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(10, 24, generator=generator, dtype=torch.float64)
    kept = torch.rand(10, 24, generator=generator) < 0.4
    kept[0], kept[1] = False, True
    return x, dense_x, weight, kept


def test_each_row_is_the_least_squares_solution_on_its_kept_columns(problem):
    x, dense_x, weight, kept = problem
    found = conjugate_gradients(weight, kept, x.T @ x, weight @ (dense_x.T @ x), 200)
    for row in range(len(weight)):
        columns = kept[row]
        expected = torch.zeros(24, dtype=torch.float64)
        expected[columns] = torch.linalg.lstsq(
            x[:, columns], (dense_x @ weight[row])[:, None], driver="gelsd"
        ).solution[:, 0]
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-8)


def test_damping_is_a_pull_to_the_weight_before(problem):
    x, dense_x, weight, kept = problem
    damping = 50.0
    now = weight * kept * 1.5
    hessian = x.T @ x + damping * torch.eye(24, dtype=torch.float64)
    found = conjugate_gradients(now, kept, hessian, weight @ (dense_x.T @ x) + damping * now, 200)
    pull = damping**0.5 * torch.eye(24, dtype=torch.float64)
    for row in range(1, len(weight)):
        columns = kept[row]
        rows = torch.cat([x, pull])[:, columns]
        values = torch.cat([dense_x @ weight[row], pull @ now[row]])
        expected = torch.linalg.lstsq(rows, values[:, None], driver="gelsd").solution[:, 0]
        torch.testing.assert_close(found[row, columns], expected, rtol=1e-6, atol=1e-8)


def test_a_dense_layer_with_the_dense_inputs_gets_its_own_weight_back(problem):
    x, _, weight, _ = problem
    everything = torch.ones_like(weight, dtype=torch.bool)
    found = conjugate_gradients(torch.zeros_like(weight), everything, x.T @ x, weight @ (x.T @ x), 200)
    torch.testing.assert_close(found, weight)


def test_what_a_dropped_half_leaves_stays_as_it_is(llama, prune_half, make_inputs):
    original, attention = copy.deepcopy(llama), llama.model.layers[1].self_attn
    with torch.no_grad():
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            layer.weight.zero_()
    result = WeightUpdate().recover(make_inputs(llama, prune_half(llama), original))
    assert result.curve[1][1] < result.curve[0][1] and not attention.o_proj.weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_nearer_to_the_dense_model_and_keeps_every_zero(
    llama, dtype, prune_half, make_inputs, make_samples, bits
):
    original, sparse = copy.deepcopy(llama).to(dtype), llama.to(dtype)
    masks = prune_half(sparse)
    text, before = make_samples(6, 24, seed=2), bits(sparse)
    lost = mean_kl(original, sparse, text)
    result = WeightUpdate().recover(make_inputs(sparse, masks, original))
    assert mean_kl(original, sparse, text) < 0.9 * lost
    masks.check(sparse, "the test")
    assert {
        name.removesuffix(".weight") for name, value in bits(sparse).items() if value != before[name]
    } <= set(masks)
    assert result.curve[1][1] < result.curve[0][1]


@pytest.mark.parametrize("options", [{"iterations": 0}, {"damping": 0.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(RecipeError, match="weight_update"):
        WeightUpdate(**options)
