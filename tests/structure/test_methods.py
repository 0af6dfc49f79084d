"""Structured methods: the same heads and channels go from all layers of a half, and the right ones."""

import dataclasses
from fractions import Fraction

import pytest
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.models.layers import check_fit, prunable_layers
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import DENSE, Level, Pattern, Width
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plugins.manager import Plugins
from msp_plugin.pruning.flap import FLAP
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.pruning.masks import groups_of, recount
from msp_plugin.pruning.obs import OBS
from msp_plugin.pruning.plain_groups import L2
from msp_plugin.pruning.saap import SAAP
from msp_plugin.pruning.structured import HalfInputs, HalfLayer, InputMoments, StructuredPruner, WidthPruner
from msp_plugin.structure.groups import with_groups

QUANTUM = 4
MENU = parse_menu("dense,2:4,7/8 wide,3/4 wide,1/2 wide,1/4 wide,1/2 wide 2:4,dropped")
METHODS = sorted(
    name
    for name, component in Plugins(entry_points=False).components["pruners"].items()
    if issubclass(component.cls, WidthPruner)
)


def text(model, samples=3, length=16):
    ids = torch.randint(
        0, model.config.vocab_size, (samples, length), generator=torch.Generator().manual_seed(5)
    )
    return CalibrationSet(tuple(ids), "test")


@pytest.fixture
def build(tiny, tmp_path):
    """Return a tiny model, its half-blocks, and a method's level database of them."""

    def build(pruner, name="llama", menu=MENU):
        model = tiny(name)
        table = with_groups(model, prunable_layers(model, granularity="half"), QUANTUM)
        database = LevelDatabase(tmp_path / f"{pruner.name} {name}", {"test": pruner.name}, menu)
        build_database(database, model, table, pruner, text(model))
        return model, table, database

    return build


@dataclasses.dataclass(frozen=True)
class OneGroup(Level):
    """One head, or as many channels as a width counts in, and 2:4 of what stays. A level of a third party."""

    name = "one"
    sparsity = Fraction(9, 10)
    servable = False
    narrows = by_groups = True
    granularities = ("half",)

    def kept(self, unit):
        return sum(layer.weights // layer.groups.count * layer.groups.quantum // 2 for layer in unit.layers)

    def misfit(self, unit):
        return None if unit.groups else "needs an attention or an MLP"

    def width(self, unit):
        return None if self.misfit(unit) else (unit.groups.quantum, Pattern(2, 4))


def test_a_width_of_a_third_party_is_made_and_counted_like_our_own(build):
    model, table, database = build(L2(), menu=(DENSE, OneGroup()))
    problem = AllocationProblem(table, database.menu, Fraction(1, 2))
    for unit, (full, one) in zip(table, problem.kept, strict=True):
        assert full == unit.weights
        assert one == sum(int((database.weight(a.name, "one") != 0).sum()) for a in unit.layers)
        for layer in unit.layers:
            weight = database.weight(layer.name, "one")
            counted = recount(weight, OneGroup(), layer)
            assert counted.broken is None and int(kept(weight, layer).sum()) == unit.groups.quantum
            broken = recount(torch.ones_like(weight), OneGroup(), layer).broken
            assert broken.startswith(f"keeps {unit.groups.count} of {unit.groups.count} heads or channels")
    check_fit(table, database.menu)
    with pytest.raises(RecipeError, match="level one does not fit 28 of 28 units: it needs an attention"):
        check_fit(prunable_layers(model, granularity="layer"), database.menu)
    with pytest.raises(RecipeError, match="'magnitude' cannot make level one"):
        Magnitude().check_menu(database.menu)


@pytest.mark.parametrize("method", METHODS)
def test_the_statistics_memory_is_what_is_held(method, tiny):
    model, pruner = tiny("llama"), Plugins(entry_points=False).build("pruners", method)
    for layer in with_groups(model, prunable_layers(model, granularity="half"), QUANTUM).layers:
        held = vars(pruner.layer_statistic(layer, model.get_submodule(layer.name))).values()
        assert pruner.statistic_bytes(layer) == sum(part.nbytes for part in held if torch.is_tensor(part))


def kept(weight, layer):
    """Return bool[G], the groups of which a layer holds any weight."""
    return (groups_of(weight, layer) != 0).any((1, 2))


def test_the_structured_methods_are_those_of_the_readme():
    assert METHODS == ["flap", "l2", "llm_pruner", "obs", "random", "saap"]


@pytest.mark.parametrize("method", METHODS)
def test_each_level_holds_in_every_layer_and_its_zeros_are_counted(method, build):
    pruner = Plugins(entry_points=False).build("pruners", method)
    _, table, database = build(pruner)
    widths = [level for level in MENU if isinstance(level, Width)]
    for unit in table.units[:2]:
        before = torch.ones(unit.groups.count, dtype=torch.bool)
        for level in widths:
            if level.misfit(unit):
                continue
            weights = {layer: database.weight(layer.name, level.name) for layer in unit.layers}
            of = [kept(weight, layer) for layer, weight in weights.items()]
            assert all(torch.equal(of[0], other) for other in of) and int(of[0].sum()) == level.groups(unit)
            for layer, weight in weights.items():
                counted = recount(weight, level, layer)
                assert counted.broken is None and weight.numel() - counted.zeros == level.kept(layer)
            if level.inside.is_dense:
                assert (of[0] <= before).all()  # narrower ones keep some of what wider ones keep
                before = of[0]
        dropped, masked = (
            {a.name: database.weight(a.name, name) for a in unit.layers} for name in ("dropped", "2:4")
        )
        assert not any(weight.any() for weight in dropped.values())
        for layer in unit.layers:
            assert recount(masked[layer.name], Level.parse("2:4")).zeros * 2 == layer.weights


@pytest.mark.parametrize("method", [name for name in METHODS if name != "obs"])
def test_what_stays_is_not_changed(method, build):
    model, table, database = build(Plugins(entry_points=False).build("pruners", method), menu=MENU[:4])
    for layer in table[1].layers:
        weight, dense = database.weight(layer.name, "3/4 wide"), model.get_submodule(layer.name).weight
        assert torch.equal(weight[weight != 0], dense[weight != 0]) and (weight == 0).any()


def test_obs_changes_the_last_layer_alone_and_makes_its_output_better(build):
    plain, table, database = build(OBS())
    for unit in table.units[:2]:
        *inner, last = unit.layers
        for layer in inner:
            weight, dense = database.weight(layer.name, "1/2 wide"), plain.get_submodule(layer.name).weight
            assert torch.equal(weight[weight != 0], dense[weight != 0])
        _, refitted = database.errors(dataclasses.replace(table, units=(unit,)))
        weight, dense = database.weight(last.name, "1/2 wide"), plain.get_submodule(last.name).weight.detach()
        masked = torch.where(
            kept(weight, last).repeat_interleave(dense.shape[1] // last.groups.count), dense, 0
        )
        inputs = inputs_of(plain, last.name)
        assert change(inputs, weight, dense) < change(inputs, masked, dense)
        assert refitted[0, MENU.index(Level.parse("1/2 wide"))] == pytest.approx(
            change(inputs, weight, dense), rel=1e-3
        )


def inputs_of(model, layer):
    """Return the inputs [tokens, I] of a layer over the text."""
    found = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda m, args, out: found.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for row in text(model).samples:
            model(row[None])
    handle.remove()
    return torch.cat(found).double()


def change(inputs, weight, dense):
    """Return the mean over tokens of the squared change of a layer's output."""
    return float((inputs @ (weight - dense).double().T).square().sum(1).mean())


def test_the_error_of_a_width_is_that_of_what_its_half_adds(build):
    """The oracle runs the half with and without the heads and channels; inner rows that go have no error of their own."""
    menu = parse_menu("dense,1/2 wide,dropped")
    model, table, database = build(OBS(), menu=menu)
    _, errors = database.errors(table)
    for u, unit in enumerate(table.units[:2]):
        dense = {layer.name: model.get_submodule(layer.name).weight.detach().clone() for layer in unit.layers}
        module, outputs = model.get_submodule(unit.name), []
        handle = module.register_forward_hook(
            lambda m, args, out, outputs=outputs: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            for level in ("dense", "1/2 wide"):
                for name, weight in dense.items():
                    model.get_submodule(name).weight.copy_(
                        weight if level == "dense" else database.weight(name, level)
                    )
                for row in text(model).samples:
                    model(row[None])
            for name, weight in dense.items():
                model.get_submodule(name).weight.copy_(weight)
        handle.remove()
        half = len(outputs) // 2
        true = torch.cat(outputs[:half], 1) - torch.cat(outputs[half:], 1)
        assert errors[u, 1] == pytest.approx(float(true.double().square().sum(-1).mean()), rel=1e-3)


def test_flap_keeps_what_fluctuates_most(build):
    model, table, database = build(FLAP())
    for unit in table.units[:2]:
        last = unit.layers[-1]
        inputs = inputs_of(model, last.name)
        weight = model.get_submodule(last.name).weight.detach().double()
        fluctuation = inputs.var(0, unbiased=False) * weight.square().sum(0)
        size = len(fluctuation) // unit.groups.count
        scores = [
            float((fluctuation[g * size : (g + 1) * size] ** (2 if size > 1 else 1)).mean())
            for g in range(unit.groups.count)
        ]
        count = Level.parse("1/2 wide").groups(unit)
        best = sorted(range(len(scores)), key=lambda g: -scores[g])[:count]
        assert kept(database.weight(last.name, "1/2 wide"), last).nonzero().flatten().tolist() == sorted(best)


def test_l2_keeps_the_largest_and_of_equal_ones_the_first(tiny):
    model = tiny("llama")
    table = with_groups(model, prunable_layers(model, granularity="half"), QUANTUM)
    unit = table[0]
    with torch.no_grad():
        for layer in unit.layers:
            weight = model.get_submodule(layer.name).weight
            weight.fill_(0.1)
            if not layer.inner:
                weight[:, -1] = 1.0  # of the last KV head
    scores = L2().group_scores(half(model, unit))
    assert scores.argmax() == 3 and scores[0] == scores[1] == scores[2]
    cut = L2().cuts(half(model, unit), [2])[2]
    assert cut.kept.tolist() == [True, False, False, True]


def half(model, unit):
    parts = []
    for layer in unit.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        parts.append(HalfLayer(layer, weight, InputMoments(layer.in_features, weight.device), None))
    return HalfInputs(unit.name, unit.groups.count, tuple(parts))


def test_the_moments_are_those_of_the_inputs():
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    moments = InputMoments(5, x.device, gram=True)
    for part in x:
        moments.add(part[None])
    flat = x.flatten(0, 1).double()
    torch.testing.assert_close(moments.variance, flat.var(0, unbiased=False), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(moments.gram.double(), flat.T @ flat, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.rms.double(), flat.square().mean(0).sqrt(), rtol=1e-5, atol=1e-8)


def test_random_heads_and_channels_repeat_with_their_seed(build, tiny):
    model = tiny("llama")
    unit = with_groups(model, prunable_layers(model, granularity="half"), QUANTUM)[1]
    make = Plugins(entry_points=False).build
    first, again, other = (
        make("pruners", {"name": "random", "seed": seed}).group_scores(half(model, unit))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and len(set(first.tolist())) == 24


@dataclasses.dataclass(frozen=True)
class Broken(StructuredPruner):
    """Gives scores that are not finite."""

    name = "broken"

    def group_scores(self, half):
        return torch.full((half.groups,), float("nan"))


def test_scores_that_are_not_finite_are_an_error(build):
    with pytest.raises(
        NumericsError, match="'broken' gives scores that are not finite for model.layers.0.self_attn"
    ):
        build(Broken())


@pytest.mark.parametrize("elements", [-1.0, float("inf")])
def test_a_weight_of_a_score_is_a_finite_number_of_at_least_0(elements):
    with pytest.raises(RecipeError, match="saap: elements"):
        SAAP(elements=elements)
