"""LLM-Pruner's scores against loops over single weights, whole backward passes, and the loss itself."""

import pytest
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.gradients import gradient_scores
from msp_plugin.errors import RecipeError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.pruning.llm_pruner import LLMPruner
from msp_plugin.structure.groups import with_groups
from msp_plugin.structure.scores import TAYLOR, taylor_scores


@pytest.fixture(scope="module")
def measured(tiny):
    """A tiny Llama, its half-blocks, three samples, and the gradients of their losses by torch's own backward pass."""
    model = tiny("llama")
    table = with_groups(model, prunable_layers(model, granularity="half"), 1)
    ids = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    names = [layer.name for layer in table.layers]
    gradients, squares = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for row in ids:
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name in names:
            gradient = model.get_submodule(name).weight.grad.double()
            gradients[name] = gradients[name] + gradient / 3
            squares[name] = squares[name] + gradient.square() / 3
    model.zero_grad(set_to_none=True)
    return model, table, CalibrationSet(tuple(ids), "test"), gradients, squares


def by_hand(layer, weight, gradient, squares, score):
    """Add up a layer's channels one by one."""
    of = (weight.double(), gradient, squares)
    w, g, f = (matrix.T for matrix in of) if not layer.inner else of
    size, scores = len(w) // layer.groups.count, []
    for group in range(layer.groups.count):
        total = 0.0
        for row in range(group * size, (group + 1) * size):
            first, second = w[row] * g[row], w[row] ** 2 * f[row]
            total += float(
                {
                    "vector": first.sum().abs(),
                    "first": first.abs().sum(),
                    "second": second.abs().sum(),
                    "mixed": (first - 0.5 * second).abs().sum(),
                }[score]
            )
        scores.append(total)
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("score", TAYLOR)
def test_the_scores_of_a_model_are_those_of_single_channels_added_up(score, measured):
    model, table, data, gradients, squares = measured
    for limit in (1 << 40, 4000):  # all gradients in one pass, and few layers at a time
        found = gradient_scores(model, table.units[:2], LLMPruner(score), data, limit)
        for layer in (layer for unit in table.units[:2] for layer in unit.layers):
            weight = model.get_submodule(layer.name).weight.detach()
            expected = by_hand(layer, weight, gradients[layer.name], squares[layer.name], score)
            torch.testing.assert_close(found[layer.name], expected, rtol=1e-4, atol=1e-9)


def test_gradients_leave_the_model_as_it_was(measured, tiny):
    model, table, data, *_ = measured
    gradient_scores(model, table.units, LLMPruner(), data)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny("llama").parameters(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_kv_head_is_scored_with_its_own_query_heads(measured):
    _, table, *_ = measured
    query = table[0].layers[0]
    gradient = torch.zeros(query.out_features, query.in_features)
    gradient[16:32] = 1.0  # query heads 2 and 3 of 8, which read KV head 1 of 4
    weight = torch.ones_like(gradient)
    shaped = (matrix.view(query.groups.count, -1, 32) for matrix in (weight, gradient, gradient))
    assert taylor_scores(*shaped, "first").nonzero().flatten().tolist() == [1]


def test_to_first_order_the_vector_score_bounds_the_change_of_the_loss(measured):
    model, table, data, gradients, _ = measured
    last = table[1].layers[-1]
    scores = gradient_scores(model, table.units[1:2], LLMPruner("vector"), data)[last.name]
    down, channel, step = model.get_submodule(last.name).weight, int(scores.argmax()), 1e-3

    def loss():
        with torch.no_grad():
            losses = [float(model(row[None], labels=row[None]).loss.double()) for row in data.samples]
        return sum(losses) / len(losses)

    before, change = loss(), down[:, channel].detach().clone() * step
    with torch.no_grad():
        down[:, channel] -= change
        after = loss()
        down[:, channel] += change
    slope = float((down.detach().double() * gradients[last.name])[:, channel].sum())
    assert after - before == pytest.approx(-slope * step, rel=0.05)
    assert abs(slope) == pytest.approx(float(scores[channel]), rel=1e-4)


def test_an_unknown_score_is_refused():
    with pytest.raises(RecipeError, match="score 'element3' is unknown"):
        LLMPruner("element3")
