"""Scores of heads and channels against loops over single weights, and against the loss itself."""

import pytest
import torch

from msp_plugin.errors import RecipeError
from msp_plugin.structure.halves import find_halves
from msp_plugin.structure.scores import TAYLOR, l2_scores, random_scores, taylor_scores


@pytest.fixture(scope="module")
def tensors(tiny):
    """Halves of a tiny Llama, its weights, and its gradients and their mean squares over three samples."""
    model = tiny("llama")
    ids = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    names = [name for half in find_halves(model) for name in (*half.inputs, half.output)]
    gradients = dict.fromkeys(names, 0.0)
    squares = dict.fromkeys(names, 0.0)
    for row in ids:
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name in names:
            gradient = model.get_submodule(name).weight.grad.double()
            gradients[name] = gradients[name] + gradient / 3
            squares[name] = squares[name] + gradient.square() / 3
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    return model, ids, weights, gradients, squares


def by_hand(half, group, weights, gradients, squares, variant):
    """Sum a group's channels one by one."""
    total = 0.0
    for layer in (*half.inputs, half.output):
        w, g, f = (t[layer].double() for t in (weights, gradients, squares))
        if layer == half.output:
            w, g, f = w.T, g.T, f.T
        size = half.columns if layer == half.output else half.inputs[layer]
        for row in range(group * size, (group + 1) * size):
            first, second = w[row] * g[row], w[row] ** 2 * f[row]
            total += float(
                {
                    "vector": first.sum().abs(),
                    "element1": first.abs().sum(),
                    "element2": second.abs().sum(),
                    "mix": (first - 0.5 * second).abs().sum(),
                }[variant]
            )
    return total


@pytest.mark.parametrize("variant", TAYLOR)
def test_scores_are_those_of_single_channels_added_up(variant, tensors):
    model, _, *of = tensors
    for half in find_halves(model)[:2]:
        found = taylor_scores(half, *of, variant)
        expected = [by_hand(half, group, *of, variant) for group in range(half.groups)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_kv_head_is_scored_with_its_own_query_heads(tensors):
    model, _, weights, gradients, squares = tensors
    half = find_halves(model)[0]
    alone = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    query = "model.layers.0.self_attn.q_proj"
    alone[query][16:32] = weights[query][16:32]  # query heads 2 and 3, which read KV head 1
    scores = taylor_scores(half, alone, gradients, squares, "element1")
    assert torch.nonzero(scores).flatten().tolist() == [1]


def test_to_first_order_the_vector_score_bounds_the_change_of_the_loss(tensors):
    model, ids, weights, gradients, squares = tensors
    half, step = find_halves(model)[1], 1e-3
    scores = taylor_scores(half, weights, gradients, squares, "vector")
    down = model.get_submodule(half.output).weight

    def loss():
        with torch.no_grad():
            return sum(float(model(row[None], labels=row[None]).loss.double()) for row in ids) / len(ids)

    before, channel = loss(), int(scores.argmax())
    change = weights[half.output][:, channel].clone() * step
    with torch.no_grad():
        down[:, channel] -= change
        after = loss()
        down[:, channel] += change
    slope = float((weights[half.output].double() * gradients[half.output].double())[:, channel].sum())
    assert after - before == pytest.approx(-slope * step, rel=0.05)
    assert abs(slope) <= float(scores[channel])


def test_l2_is_the_sum_of_squares_of_a_group(tensors):
    model, _, weights, *_ = tensors
    for half in find_halves(model)[:2]:
        scores = l2_scores(half, weights)
        total = sum(float(weights[name].double().square().sum()) for name in (*half.inputs, half.output))
        assert float(scores.sum()) == pytest.approx(total)


def test_random_scores_repeat_with_their_seed(tensors):
    half = find_halves(tensors[0])[1]
    first, again = (random_scores(half, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again) and len(set(first.tolist())) == half.groups


def test_an_unknown_variant_is_refused(tensors):
    model, _, *of = tensors
    with pytest.raises(RecipeError, match="variant 'element3' is unknown"):
        taylor_scores(find_halves(model)[0], *of, "element3")
