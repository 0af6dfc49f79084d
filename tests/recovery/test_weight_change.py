"""Changes of a weight against their formulas, computed densely with autograd's gradients."""

import pytest
import torch

from msp_plugin.errors import RecipeError
from msp_plugin.recovery.full import FullWeight
from msp_plugin.recovery.lora import LoRA
from msp_plugin.recovery.masked_lora import MaskedLowRank
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.sparse_delta import ChosenWeights
from msp_plugin.recovery.spp import Proportional
from msp_plugin.recovery.weight_change import ChangedLinear, changed_weight

OUT, WIDTH = 10, 12


@pytest.fixture
def weight():
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 0.6] = 0.0
    weight[0, 0] = -0.0
    return weight


def change_and_formula(name, weight):
    """A change, its tensors away from their start, and the changed weight by its formula."""
    generator = torch.Generator().manual_seed(1)
    if name == "masked_lora":
        change = MaskedLowRank(rank=3, alpha=6.0)

        def formula(w, t):
            return w + 2.0 * (t["b"] @ t["a"]) * (w != 0)
    elif name == "spp":
        change = Proportional(groups=4, scale=2.0)

        def formula(w, t):
            rows = [w[i] + 2.0 * t["b"][i] * t["a"][i * 4 // OUT] * w[i] for i in range(OUT)]
            return torch.stack(rows)
    elif name == "sparse_delta":
        index = (weight != 0).flatten().nonzero()[::3, 0]
        change = ChosenWeights({"layer": len(index)}, {"layer": index.int()})

        def formula(w, t):
            return w + torch.zeros(OUT * WIDTH).scatter_add(0, index, t["values"]).view(OUT, WIDTH)
    else:
        change = FullWeight()

        def formula(w, t):
            return t["weight"] * (w != 0)

    tensors = change.start("layer", weight, generator)
    moved = {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    return change, tensors, moved, formula


NAMES = ("masked_lora", "spp", "sparse_delta", "full")


@pytest.mark.parametrize("name", NAMES)
def test_the_start_changes_nothing(name, weight):
    change, start, _, _ = change_and_formula(name, weight)
    new = changed_weight(change, weight, start | change.fixed("layer"))
    assert torch.equal(new.view(torch.int32), weight.view(torch.int32))
    assert change.count("layer", (OUT, WIDTH)) == sum(t.numel() for t in start.values())


@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients_are_those_of_the_formula(name, weight):
    change, _, moved, formula = change_and_formula(name, weight)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2), requires_grad=True)
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(3), requires_grad=True)
    tensors = {n: t.clone().requires_grad_() for n, t in moved.items()}
    fixed = change.fixed("layer")
    given = {**tensors, **fixed}
    found = ChangedLinear.apply(x, weight, bias, change, tuple(given), *given.values())
    expected = torch.nn.functional.linear(x, formula(weight, tensors), bias)
    torch.testing.assert_close(found, expected)
    leaves = [x, bias, *tensors.values()]
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    for ours, autograd in zip(
        torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(ours, autograd)


def test_the_gradient_of_chosen_weights_is_the_dense_gradient_at_their_places(weight):
    change, _, moved, _ = change_and_formula("sparse_delta", weight)
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(2))
    values = moved["values"].requires_grad_()
    index = change.fixed("layer")["index"]
    ChangedLinear.apply(x, weight, None, change, ("values", "index"), values, index).square().sum().backward()
    dense = weight.clone().flatten().index_add(0, index, values.detach()).view_as(weight).requires_grad_()
    torch.nn.functional.linear(x, dense).square().sum().backward()
    torch.testing.assert_close(values.grad, dense.grad.flatten()[index.long()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_bit_for_bit_and_the_rest_is_rounded_once(name, weight, dtype):
    weight = weight.to(dtype)
    change, _, moved, formula = change_and_formula(name, weight)
    new = changed_weight(change, weight, moved | change.fixed("layer"))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert new.dtype == dtype
    assert torch.equal(new.view(bits)[weight == 0], weight.view(bits)[weight == 0])
    torch.testing.assert_close(new, formula(weight.float(), moved).to(dtype))
    assert not torch.equal(new, weight)


def test_what_is_not_finite_does_not_reach_the_zeros(weight):
    change = MaskedLowRank(rank=1, alpha=1.0)
    broken = {"a": torch.full((1, WIDTH), torch.nan), "b": torch.ones(OUT, 1)}
    assert not changed_weight(change, weight, broken)[weight == 0].any()


def test_a_share_of_the_change_lies_between(weight):
    change, _, moved, formula = change_and_formula("masked_lora", weight)
    quarter = changed_weight(change, weight, moved, share=0.25)
    torch.testing.assert_close(quarter, weight + 0.25 * (formula(weight, moved) - weight))


def test_zeros_by_rounding_are_no_reason_to_refuse_lora():
    """float16 rounds one weight in a million to zero; 600 of 10,000 zeros within rows and columns are a mask."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(100, 100, bias=False)})
    weight = model["a"].weight.data.fill_(1)
    weight[:, :20] = 0
    weight[50, 50] = 0
    masks = Masks.of(model, ["a"])
    assert masks.unstructured("a") == 1
    LoRA(rank=4).check_layers(masks)
    weight[:30, 60:80] = 0
    with pytest.raises(RecipeError, match="would fill 601 pruned weights in"):
        LoRA(rank=4).check_layers(Masks.of(model, ["a"]))
