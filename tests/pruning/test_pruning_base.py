import itertools

import pytest
import torch

from msp_plugin.errors import NumericsError
from msp_plugin.plan.levels import DENSE, Pattern
from msp_plugin.plan.units import Layer
from msp_plugin.pruning.base import InputNorm
from msp_plugin.pruning.magnitude import Magnitude

LEVELS = [Pattern(7, 8), Pattern(2, 4), Pattern(1, 8)]


def linear(out=12, width=32, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(width, out).to(dtype)


def inputs(width=32, seed=1):
    torch.manual_seed(seed)
    return torch.randn(3, 10, width) * torch.linspace(0.1, 3, width)


@pytest.fixture(scope="module")
def ria(sample_plugin):
    return sample_plugin("ria").RIA


def naive_ria(weight, x, power, level):
    """Zhang et al., ICLR 2024, equation by equation, in Python floats."""
    rows = weight.abs().double().tolist()
    tokens = x.reshape(-1, x.shape[-1]).double().tolist()
    norm = [(sum(t[j] ** 2 for t in tokens) / len(tokens)) ** 0.5 for j in range(len(rows[0]))]
    columns = [sum(row[j] for row in rows) for j in range(len(rows[0]))]
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        score = [(w / sum(row) + w / columns[j]) * norm[j] ** power for j, w in enumerate(row)]
        for start in range(0, len(row), level.m):
            for j in sorted(range(start, start + level.m), key=lambda j: (-score[j], j))[: level.n]:
                mask[i, j] = True
    return weight * mask


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_score_is_all_that_a_method_must_write(ria, level, power):
    module, x, pruner = linear(), inputs(), ria(power)
    statistic = pruner.observe(module, x[:1], pruner.new_statistic(module))
    statistic = pruner.observe(module, x[1:], statistic)
    (pruned,) = pruner.prune_levels(module, statistic, [level], "layer")
    assert torch.equal(pruned, naive_ria(module.weight.detach(), x, power, level))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_weights_keep_dtype_shape_pattern_and_surviving_values(ria, dtype):
    module = linear(dtype=dtype)
    before = module.weight.detach().clone()
    for pruner in (Magnitude(), ria()):
        statistic = pruner.observe(module, inputs().to(dtype), pruner.new_statistic(module))
        for level, pruned in zip(
            LEVELS, pruner.prune_levels(module, statistic, LEVELS, "layer"), strict=True
        ):
            assert (pruned.dtype, pruned.shape) == (dtype, before.shape)
            assert ((pruned != 0).reshape(12, -1, level.m).sum(-1) == level.n).all()
            assert torch.equal(pruned, torch.where(pruned != 0, before, 0))
        assert torch.equal(module.weight, before)


def test_dense_changes_nothing(ria):
    module = linear()
    for pruner in (Magnitude(), ria()):
        statistic = pruner.observe(module, inputs(), pruner.new_statistic(module))
        (pruned,) = pruner.prune_levels(module, statistic, [DENSE], "layer")
        assert torch.equal(pruned, module.weight)


def test_equal_weights_are_pruned_to_the_exact_count_from_the_right():
    module = linear()
    with torch.no_grad():
        module.weight.fill_(-2.0)
    (pruned,) = Magnitude().prune_levels(module, None, [Pattern(3, 8)], "layer")
    assert torch.equal(pruned, torch.tensor([-2.0] * 3 + [0.0] * 5).repeat(12, 4))


def test_magnitude_keeps_the_largest_and_needs_no_statistic():
    module = linear(out=1, width=4)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.5, -3.0, 2.0, -0.1]]))
    (pruned,) = Magnitude().prune_levels(module, None, [Pattern(2, 4)], "layer")
    assert pruned.tolist() == [[0.0, -3.0, 2.0, 0.0]] and not Magnitude.needs_statistics


def test_the_levels_of_a_score_are_nested(ria):
    module, pruner = linear(), ria()
    statistic = pruner.observe(module, inputs(), pruner.new_statistic(module))
    levels = [Pattern(n, 8) for n in range(7, 0, -1)]
    kept = [pruned != 0 for pruned in pruner.prune_levels(module, statistic, levels, "layer")]
    assert all((sparse <= dense).all() for dense, sparse in itertools.pairwise(kept))


def test_the_input_norm_is_the_root_mean_square_over_all_tokens():
    x = inputs()
    norm = InputNorm(32, torch.device("cpu"))
    norm.add(x[:1])
    norm.add(x[1:].reshape(-1, 32))
    assert norm.tokens == 30
    torch.testing.assert_close(norm.rms, x.reshape(-1, 32).double().square().mean(0).sqrt().float())


def test_the_output_error_takes_features_as_uncorrelated(ria):
    module, pruner, x = linear(), ria(), inputs()
    statistic = pruner.observe(module, x, pruner.new_statistic(module))
    delta = torch.randn(12, 32)
    expected = [
        sum(float(delta[i, j]) ** 2 * float(x[..., j].double().square().mean()) for j in range(32))
        for i in range(12)
    ]
    assert pruner.row_errors(delta, statistic).tolist() == pytest.approx(expected, rel=1e-5)
    assert pruner.output_error(delta, statistic) == pytest.approx(sum(expected), rel=1e-5)
    assert Magnitude().row_errors(delta, None) is None
    assert Magnitude().output_error(delta, None) == pytest.approx(
        float(delta.double().square().sum()), rel=1e-9
    )


def test_uncorrelated_is_exact_where_the_inputs_are(ria):
    module, pruner = linear(), ria()
    x = torch.diag(torch.linspace(1, 3, 32))[None]
    statistic = pruner.observe(module, x, pruner.new_statistic(module))
    delta = torch.randn(12, 32)
    exact = float((x[0] @ delta.T).double().square().sum(dim=1).mean())
    assert pruner.output_error(delta, statistic) == pytest.approx(exact, rel=1e-5)


def test_a_weight_that_is_not_finite_has_no_score():
    module = linear()
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="'magnitude' gives scores that are not finite for layer"):
        list(Magnitude().prune_levels(module, None, LEVELS, "layer"))


def test_the_statistics_memory_is_what_is_held(ria):
    module, pruner = linear(), ria()
    statistic = pruner.new_statistic(module)
    layer = Layer("layer", module.out_features, module.in_features)
    assert pruner.statistic_bytes(layer) == statistic.sum.numel() * statistic.sum.element_size()
