import copy
import math

import numpy as np
import pytest
import torch
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from loguru import logger

from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.hosts.llm_compressor.methods import host_method
from msp_plugin.plan.levels import DENSE, Pattern
from msp_plugin.plan.units import Layer
from msp_plugin.pruning.sparsegpt import SparseGPT
from msp_plugin.pruning.wanda import Wanda

LEVELS = [Pattern(7, 8), Pattern(3, 8), Pattern(2, 4), Pattern(1, 8)]
METHODS = {"sparsegpt": SparseGPT(block_size=16), "wanda": Wanda()}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def linear(out=12, width=32, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(width, out).to(dtype)


def batches(width=32, count=3, tokens=40, seed=1):
    """Correlated inputs [B, T, in], in batches of one, two, ... samples."""
    torch.manual_seed(seed)
    mix = torch.randn(width, width) / width**0.5 + torch.eye(width)
    return [torch.randn(1 + b, tokens, width) @ mix for b in range(count)]


def observed(pruner, module, xs):
    statistic = pruner.new_statistic(module)
    for x in xs:
        statistic = pruner.observe(module, x, statistic)
    return statistic


def moment(xs):
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double()
    return (x.T @ x).numpy() / len(x)


@pytest.fixture
def host_warnings():
    seen = []
    sink = logger.add(lambda message: seen.append(str(message)), level="WARNING")
    yield seen
    logger.remove(sink)


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method, modifier", [("sparsegpt", SparseGPTModifier), ("wanda", WandaPruningModifier)]
)
def test_the_driver_gives_what_the_hosts_own_modifier_gives(method, modifier, level, dtype):
    pruner, xs = METHODS[method], [x.to(dtype) for x in batches()]
    module, theirs = linear(dtype=dtype), linear(dtype=dtype)
    (found,) = pruner.prune_levels(module, observed(pruner, module, xs), [level], "layer")
    host = modifier(**host_method(pruner).modifier_arguments(level))
    host._module_names[theirs], host._module_sparsities[theirs] = "layer", float(level.sparsity)
    for x in xs:
        host.calibrate_module(theirs, (x,), None)
    host.compress_modules()
    assert torch.equal(found, theirs.weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_group_keeps_n_and_dtype_shape_and_module_stay(method, dtype):
    pruner, module = METHODS[method], linear(dtype=dtype)
    before = module.weight.detach().clone()
    statistic = observed(pruner, module, [x.to(dtype) for x in batches()])
    for level, pruned in zip(LEVELS, pruner.prune_levels(module, statistic, LEVELS, "layer"), strict=True):
        assert (pruned.dtype, pruned.shape) == (dtype, before.shape)
        assert ((pruned != 0).reshape(12, -1, level.m).sum(-1) == level.n).all()
        assert torch.equal(module.weight, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_level_does_not_depend_on_those_before_it(method):
    pruner, module = METHODS[method], linear()
    statistic = observed(pruner, module, batches())
    together = list(pruner.prune_levels(module, statistic, LEVELS, "layer"))
    for level, pruned in zip(LEVELS, together, strict=True):
        (alone,) = pruner.prune_levels(module, observed(pruner, module, batches()), [level], "layer")
        assert torch.equal(alone, pruned)


@pytest.mark.parametrize("method", METHODS)
def test_dense_changes_nothing(method):
    pruner, module = METHODS[method], linear()
    (pruned,) = pruner.prune_levels(module, observed(pruner, module, batches()), [DENSE], "layer")
    assert torch.equal(pruned, module.weight)


@pytest.mark.parametrize("method", METHODS)
def test_equal_weights_and_inputs_are_pruned_to_the_exact_count(method):
    pruner, module = METHODS[method], linear()
    module.weight.fill_(0.5)
    statistic = observed(pruner, module, [torch.eye(32)[None]])
    for level, pruned in zip(LEVELS, pruner.prune_levels(module, statistic, LEVELS, "layer"), strict=True):
        assert ((pruned != 0).reshape(12, -1, level.m).sum(-1) == level.n).all()


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_wanda_scores_by_weight_times_input_norm(level):
    module, xs = linear(), batches()
    (found,) = Wanda().prune_levels(module, observed(Wanda(), module, xs), [level], "layer")
    tokens = torch.cat([x.reshape(-1, 32) for x in xs]).double().tolist()
    norm = [math.sqrt(sum(t[j] ** 2 for t in tokens)) for j in range(32)]
    expected = module.weight.detach().clone()
    for i, row in enumerate(module.weight.double().tolist()):
        for start in range(0, 32, level.m):
            ranked = sorted(range(start, start + level.m), key=lambda j: abs(row[j]) * norm[j])
            expected[i, ranked[: level.m - level.n]] = 0
    assert torch.equal(found, expected)


def naive_sparsegpt(weight, hessian, level):
    """SparseGPT column by column from its definition, with fresh solves in float64 and no factorisation.

    At column i the columns before it are settled; the others are where the error is least given those.
    A group's mask is chosen at its first column: the weights with the least w^2 / [H_rest^-1]_jj.
    """
    dense, result = weight.astype(np.float64), weight.astype(np.float64).copy()
    out, width = dense.shape
    pruned = np.zeros((out, width), dtype=bool)
    for i in range(width):
        settled, rest = slice(0, i), slice(i, width)
        change = (result - dense)[:, settled]
        result[:, rest] = (
            dense[:, rest] - np.linalg.solve(hessian[rest, rest], hessian[rest, settled] @ change.T).T
        )
        if i % level.m == 0:
            columns = range(i, i + level.m)
            price = [np.linalg.inv(hessian[j:, j:])[0, 0] for j in columns]
            score = result[:, i : i + level.m] ** 2 / np.array(price)
            worst = np.argsort(score, axis=1)[:, : level.m - level.n]
            np.put_along_axis(pruned[:, i : i + level.m], worst, True, axis=1)
        result[pruned[:, i], i] = 0
    return result


def damped(xs, fraction):
    hessian = 2 * moment(xs)
    return hessian + fraction * np.diag(hessian).mean() * np.eye(len(hessian))


@pytest.mark.parametrize("level", [Pattern(2, 4), Pattern(3, 8), Pattern(1, 8), Pattern(7, 8)], ids=str)
@pytest.mark.parametrize("width, block_size", [(8, 128), (32, 128), (32, 8), (24, 16)])
@pytest.mark.parametrize("dampening", [0.01, 0.3])
def test_sparsegpt_is_the_column_wise_least_squares_of_the_paper(level, width, block_size, dampening):
    module, xs = linear(out=6, width=width), batches(width)
    pruner = SparseGPT(block_size=block_size, dampening_frac=dampening)
    (found,) = pruner.prune_levels(module, observed(pruner, module, xs), [level], "layer")
    expected = naive_sparsegpt(module.weight.detach().numpy(), damped(xs, dampening), level)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-5)


def test_sparsegpt_solves_for_the_survivors_when_the_pruned_columns_come_first():
    module, xs = linear(out=5, width=8), batches(8)
    module.weight[:, :4] *= 1e-3
    pruner = SparseGPT(block_size=8, dampening_frac=0.0)
    (found,) = pruner.prune_levels(module, observed(pruner, module, xs), [Pattern(4, 8)], "layer")
    x = torch.cat([x.reshape(-1, 8) for x in xs]).double().numpy()
    wanted = x @ module.weight.detach().double().numpy().T
    survivors = np.linalg.lstsq(x[:, 4:], wanted, rcond=None)[0].T
    assert (found[:, :4] == 0).all()
    np.testing.assert_allclose(found[:, 4:].numpy(), survivors, rtol=1e-4, atol=1e-6)


def test_the_hessian_is_twice_the_sum_over_tokens_per_sample():
    module, xs = linear(), batches()
    found = observed(SparseGPT(), module, xs)
    assert (found.samples, found.tokens) == (6, 240)
    np.testing.assert_allclose(found.hessian.numpy(), 2 * moment(xs) * 240 / 6, rtol=1e-4, atol=1e-4)


def test_layers_of_one_input_share_the_factor_and_come_out_as_alone():
    xs, pruner = batches(), SparseGPT(block_size=16)
    modules = [linear(seed=3), linear(out=5, seed=4)]
    shared = observed(pruner, modules[0], xs)
    factors = []
    for module in modules:
        together = list(pruner.prune_levels(module, shared, LEVELS, "layer"))
        alone = pruner.prune_levels(module, observed(pruner, module, xs), LEVELS, "layer")
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
        factors.append(shared.factor)
    assert factors[0] is factors[1]
    assert pruner.observe(modules[0], xs[0], shared).factor is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [Pattern(3, 4), Pattern(1, 16), Pattern(3, 8)], ids=str)
def test_equal_scores_fall_as_in_the_host(method, level):
    """Half of the weights are of four values, so that most groups hold equals."""
    module = linear(out=40, dtype=torch.bfloat16)
    module.weight[::2] = torch.randint(1, 3, (20, 32)).bfloat16() * torch.tensor([-1.0, 1.0]).repeat(16)
    pruner, x = METHODS[method], torch.eye(32, dtype=torch.bfloat16)[None]
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    host, theirs = modifier(**host_method(pruner).modifier_arguments(level)), copy.deepcopy(module)
    (found,) = pruner.prune_levels(module, observed(pruner, module, [x]), [level], "layer")
    host._module_names[theirs], host._module_sparsities[theirs] = "layer", float(level.sparsity)
    host.calibrate_module(theirs, (x,), None)
    host.compress_modules()
    assert torch.equal(found, theirs.weight)


def test_sparsegpts_output_error_is_the_mean_squared_change_of_the_output():
    module, xs, pruner = linear(), batches(), SparseGPT()
    delta = torch.randn(12, 32)
    x = torch.cat([x.reshape(-1, 32) for x in xs]).double()
    expected = float((x @ delta.double().T).square().sum(dim=1).mean())
    before = delta.clone()
    assert pruner.output_error(delta, observed(pruner, module, xs)) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(delta, before)


def test_wandas_output_error_takes_features_as_uncorrelated():
    module, xs = linear(), batches()
    delta = torch.randn(12, 32)
    expected = float((delta.double().square() * torch.from_numpy(np.diag(moment(xs)).copy())).sum())
    assert Wanda().output_error(delta, observed(Wanda(), module, xs)) == pytest.approx(expected, rel=1e-4)
    eye = [3 * torch.eye(32)[None]]
    exact = float((eye[0][0].double() @ delta.double().T).square().sum(dim=1).mean())
    assert Wanda().output_error(delta, observed(Wanda(), module, eye)) == pytest.approx(exact, rel=1e-4)


def test_sparsegpt_beats_wanda_on_the_calibration_output():
    module, xs = linear(), batches()
    judge = observed(SparseGPT(), module, xs)
    error = {}
    for name, pruner in METHODS.items():
        (pruned,) = pruner.prune_levels(module, observed(pruner, module, xs), [Pattern(2, 4)], "layer")
        error[name] = SparseGPT().output_error(pruned - module.weight.detach(), judge)
    assert error["sparsegpt"] < 0.9 * error["wanda"]


@pytest.mark.parametrize("tokens", [4, 8, 16, 31])
def test_fewer_tokens_than_features_without_dampening_is_a_singular_hessian(tokens):
    module, pruner = linear(), SparseGPT(dampening_frac=0.0)
    statistic = observed(pruner, module, [torch.zeros(1, tokens, 32) + batches(tokens=tokens)[0][:, :, :1]])
    with pytest.raises(
        NumericsError, match="the Hessian of model.up_proj is singular with dampening 0"
    ) as error:
        list(pruner.prune_levels(module, statistic, LEVELS, "model.up_proj"))
    assert "more calibration samples" in error.value.hint and "dampening_frac" in error.value.hint
    assert list(SparseGPT().prune_levels(module, statistic, LEVELS, "model.up_proj"))


@pytest.mark.parametrize(
    "width, tokens, dampening", [(8, 4, 1e-8), (16, 8, 1e-7), (64, 63, 0.0), (64, 63, 1e-9), (64, 128, 0.0)]
)
@pytest.mark.parametrize("seed", range(4))
def test_the_host_never_falls_back_to_the_identity_in_silence(host_warnings, width, tokens, dampening, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, width, generator=generator) * torch.logspace(0, -2 if seed % 2 else 0, width)
    module, pruner = linear(width=width), SparseGPT(block_size=8, dampening_frac=dampening)
    try:
        list(pruner.prune_levels(module, observed(pruner, module, [x]), [Pattern(2, 4)], "layer"))
    except NumericsError:
        return
    assert not [warning for warning in host_warnings if "Failed to invert hessian" in warning]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_named(value):
    module, pruner = linear(), SparseGPT()
    statistic = observed(pruner, module, batches())
    statistic.hessian[3, 4] = value
    with pytest.raises(NumericsError, match="the Hessian of layer is not finite"):
        list(pruner.prune_levels(module, statistic, LEVELS, "layer"))


def test_the_hosts_own_statistics_are_checked_by_name():
    module = linear()
    host = SparseGPTModifier(**host_method(SparseGPT()).modifier_arguments(Pattern(2, 4)))
    host.calibrate_module(module, (torch.ones(2, 2, 32),), None)
    host_method(SparseGPT()).check_statistics(host, {module: "model.up_proj"})
    with pytest.raises(NumericsError, match="Hessian of model.up_proj is singular"):
        host_method(SparseGPT(dampening_frac=0.0)).check_statistics(host, {module: "model.up_proj"})


def test_a_feature_that_is_always_zero_loses_its_weights():
    module, pruner = linear(), SparseGPT()
    xs = batches()
    for x in xs:
        x[..., 5] = 0
    (pruned,) = pruner.prune_levels(module, observed(pruner, module, xs), [Pattern(7, 8)], "layer")
    assert (pruned[:, 5] == 0).all()
    assert ((pruned != 0).reshape(12, -1, 8).sum(-1) <= 7).all()


@pytest.mark.parametrize("method, level, expected", [
    ("sparsegpt", Pattern(1, 8),
     {"sparsity": 0.875, "mask_structure": "7:8", "block_size": 16, "dampening_frac": 0.01}),
    ("wanda", Pattern(3, 8), {"sparsity": 0.625, "mask_structure": "5:8"}),
    ("wanda", Pattern(2, 4), {"sparsity": 0.5, "mask_structure": "2:4"}),
])  # fmt: skip
def test_the_hosts_structure_counts_the_pruned_ones(method, level, expected):
    assert host_method(METHODS[method]).modifier_arguments(level) == expected


def test_a_block_that_would_break_the_pattern_is_refused():
    with pytest.raises(RecipeError, match="block_size 12 is no multiple of the M of level 2:8") as error:
        SparseGPT(block_size=12).check_level(Pattern(2, 8))
    assert "block's edge" in error.value.hint
    SparseGPT(block_size=12).check_level(Pattern(2, 4))
    Wanda().check_level(Pattern(2, 8))


@pytest.mark.parametrize("method", METHODS)
def test_the_statistics_memory_is_what_is_held(method):
    module, pruner = linear(), METHODS[method]
    held = pruner.new_statistic(module)
    held = held.hessian if method == "sparsegpt" else held.mean
    layer = Layer("layer", module.out_features, module.in_features)
    assert pruner.statistic_bytes(layer) == held.numel() * held.element_size()
