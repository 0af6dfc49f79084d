"""Dropped half-blocks, and levels that are no patterns, from the menu to the checkpoint."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch

import msp_plugin
from msp_plugin import Allocation, AllocationProblem, Level, Text, Unit, UnitTable
from msp_plugin.allocators.msp import mutate
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
from msp_plugin.checkpoint.recount import recount_model
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import BudgetError, RecipeError, VerificationError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model
from msp_plugin.passes.outputs import with_inner
from msp_plugin.plan.levels import DENSE, DROPPED
from msp_plugin.plan.menus import menu_names, parse_menu
from msp_plugin.plan.units import Layer, group_layers, pruned_together
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.pruning.wanda import Wanda
from msp_plugin.search.allocate import check_model
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from tests.helpers.allocating import allocate

HALVES = ("model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp")
SEARCH = {"name": "search", "tokens": 48, "holdout": 24, "rounds": 2, "max_tokens": 100_000}
#: Kept weights of an attention and of an MLP of the tiny Llama.
ATTENTION, MLP = 64 * 64 * 2 + 32 * 64 * 2, 3 * 64 * 128


def test_dropped_is_the_sparsest_level_and_keeps_nothing_of_any_unit():
    unit = Unit("mlp", 0, (Layer("up", 8, 6), Layer("down", 6, 8)))
    level = Level.parse(" Dropped ")
    assert level == DROPPED == Level.parse(level.name) and str(level) == "dropped"
    assert (level.kept(unit), level.misfit(unit), level.sparsity, level.is_dense) == (0, None, 1, False)
    assert menu_names(parse_menu("dropped,dense,1:16,2:4")) == ["dense", "2:4", "1:16", "dropped"]


def test_half_a_block_is_the_layers_of_one_of_its_children(llama):
    table = prunable_layers(llama, granularity="half")
    assert table.names == HALVES and [unit.weights for unit in table] == [ATTENTION, MLP] * 2
    own = [
        (3, Layer(f"decoder.layers.3.{name}", 8, 8))
        for name in ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")
    ]
    assert group_layers(own, "half").names == ("decoder.layers.3.self_attn", "decoder.layers.3")


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"granularity": "layer"},
            "not for granularity layer\n.*use granularity half or block, or leave dropped out",
        ),
        ({"granularity": "unit"}, "not for granularity unit"),
        ({"ignore": ["o_proj"]}, "leave out layers of 2 units that may be dropped: model.layers.0.self_attn"),
        ({"levels": ["dropped"]}, "the levels dropped reach 1 to 1"),
        ({"protect": ["q_proj"], "sparsity": 0.9}, "within bounds and protect, reach 0 to 2/3"),
    ],
)
def test_options_that_dropping_does_not_fit_are_refused(llama, plan, options, words):
    with pytest.raises((RecipeError, BudgetError), match=words):
        check_model(llama, plan(**{"levels": ["dense", "dropped"], **options}))


def test_a_menu_with_dropped_asks_for_half_blocks(plan):
    assert plan(levels=["dense", "2:4", "dropped"]).granularity == "half"
    assert plan(levels=["dense", "dropped"], granularity="block").granularity == "block"


@pytest.mark.parametrize(
    "allocator", ["uniform", {"name": "knapsack", "surrogate": "kl", "tokens": 48}, SEARCH]
)
def test_every_allocation_drops_exactly_the_weights_of_the_budget(llama, data, plan, bits, allocator):
    before = bits(llama)
    made = plan(
        levels=["dense", "2:4", "dropped"],
        allocator=allocator,
        method="wanda",
        sparsity=Fraction(3, 5).__str__(),
    )
    found = allocate(llama, data, made).allocation
    assert bits(llama) == before and found.budget.zeros == sum(
        {"dense": 0, "2:4": unit.weights // 2, "dropped": unit.weights}[level.name]
        for unit, level in zip(found.table, found.levels, strict=True)
    )
    assert abs(found.budget.sparsity - Fraction(3, 5)) <= Fraction(ATTENTION // 2, found.table.weights)
    assert Allocation.from_dict(found.to_dict()).levels == found.levels


def test_leave_one_out_finds_the_half_that_matters_least(llama, data, plan):
    """The oracle runs the model with each MLP taken out by a hook, and compares its logits."""
    with torch.no_grad():  # the second MLP gives next to nothing
        llama.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    made = plan(
        levels=["dense", "dropped"], sparsity=str(Fraction(MLP, 2 * (ATTENTION + MLP))),
        allocator={"name": "knapsack", "surrogate": "kl", "tokens": 48},
    )  # fmt: skip
    found = allocate(llama, data, made).allocation
    assert dict(zip(found.table.names, map(str, found.levels), strict=True)) == {
        **dict.fromkeys(HALVES, "dense"), HALVES[3]: "dropped"
    }  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "\n".join(f"the {i}th cat sat on mat {i * i % 97} and the dog did not" for i in range(200))
    )
    return Text(str(path), samples=6, length=20, test_samples=0, batch=2)


@pytest.fixture
def pruned(llama_dir, text, tmp_path):
    table = prunable_layers(load_model(llama_dir, "float32"), granularity="half")
    levels = tuple(map(Level.parse, ("dropped", "2:4", "dropped", "dropped")))
    zeros = 2 * ATTENTION + MLP // 2 + MLP
    given = tmp_path / "allocation.json"
    given.write_text(Allocation(table, levels, Fraction(zeros, table.weights)).to_json())
    return msp_plugin.prune(
        llama_dir,
        text,
        tmp_path / "run",
        dtype="float32",
        baseline=False,
        method="wanda",
        allocation=str(given),
    )


def test_dropped_halves_add_nothing_even_without_any_attention_and_exports_stay_that_way(
    pruned, llama_dir, tmp_path
):
    assert pruned.record.sparsity.zeros == 2 * ATTENTION + MLP // 2 + MLP
    model, bare = load_model(pruned.path, "float32"), load_model(pruned.path, "float32")
    for weight in (model.model.layers[0].self_attn.q_proj.weight, model.model.layers[1].mlp.up_proj.weight):
        assert not weight.any()
    for name, result in (
        *((f"layers.{i}.self_attn", lambda output: (0 * output[0], *output[1:])) for i in (0, 1)),
        ("layers.1.mlp", lambda output: 0 * output),
    ):
        bare.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, result=result: result(output)
        )
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bare(ids).logits)
        for format in (Dense(), Sparse24(), Bitmask()):
            path = tmp_path / format.name
            export_checkpoint(pruned.path, format, path)
            assert torch.equal(msp_plugin.load(path, dtype="float32")(ids).logits, model(ids).logits)


def test_the_recount_refuses_a_weight_in_a_dropped_half(pruned):
    model, allocation = load_model(pruned.path, "float32"), Allocation.read(pruned.path / "allocation.json")
    recount_model(model, allocation)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1.0
    with pytest.raises(VerificationError, match=r"1.mlp.up_proj keeps 1 weights instead of 0"):
        recount_model(model, allocation)


def test_the_reports_map_shows_dropped_halves(pruned):
    pytest.importorskip("jinja2")
    from msp_plugin.report.grid import level_grid

    grid = level_grid(Allocation.read(pruned.path / "allocation.json"))
    assert grid.columns == ("self_attn", "mlp")
    assert [[cell.text for (cell,) in row.cells] for row in grid.rows] == [
        ["dropped", "2:4"],
        ["dropped", "dropped"],
    ]


def scaled_loss(model, ids, dense, half, scale):
    """KL of the float64 model with a half's output scaled, at a choice that its weights have."""
    module = model.get_submodule(half)

    def scaled(module, args, output):
        return (scale * output[0], *output[1:]) if isinstance(output, tuple) else scale * output

    handle = module.register_forward_hook(scaled)
    with torch.no_grad():
        logp, logq = (m(ids[None]).logits[0].log_softmax(-1) for m in (dense, model))
    handle.remove()
    return float((logp.exp() * (logp - logq)).sum(-1).mean())


@pytest.mark.parametrize("now, then", [("dense", "dropped"), ("dropped", "dense")])
def test_the_gradient_of_dropping_is_that_of_scaling_what_the_half_adds(llama, data, tmp_path, now, then):
    """To and from ``dropped``; at zeros in all of its layers the gradient would be zero."""
    menu = parse_menu(["dense", "2:4", "dropped"])
    table = with_inner(llama, prunable_layers(llama, granularity="half"))
    problem = AllocationProblem(table, menu, Fraction(1, 2))
    database = LevelDatabase(tmp_path, {"test": "dropped"}, menu)
    build_database(database, llama, problem.table, Magnitude(), None)
    choice = (menu.index(Level.parse(now)), 1, 0, 0)
    with CandidateWeights(llama, database, problem) as weights:
        loss = CandidateLoss(weights, data, "kl").prepare()
        before = loss(choice)
        first_order, curvature = loss.move_gradients(choice, [0], 2, 0)
        assert loss(choice) == before
    dense, model = copy.deepcopy(llama).double(), copy.deepcopy(llama).double()
    with torch.no_grad():
        for layer in problem.table[1].layers:
            model.get_submodule(layer.name).weight.copy_(database.weight(layer.name, "2:4"))
    at, step = (1.0, -1.0) if now == "dense" else (0.0, 1.0)
    eps = 1e-4
    up, down = (scaled_loss(model, data.samples[0], dense, HALVES[0], at + sign * eps) for sign in (1, -1))
    k = menu.index(Level.parse(then))
    assert first_order[0, 0, k] == pytest.approx(step * (up - down) / (2 * eps), rel=1e-3) != 0
    assert np.isfinite(curvature[0, 0, k]) and curvature[0, 0, k] != 0


def test_the_layers_that_end_a_half_are_found_by_running_it(llama):
    ends = {layer.name for layer in with_inner(llama, prunable_layers(llama)).layers if not layer.inner}
    assert ends == {f"{half}.{end}" for half, end in zip(HALVES, ("o_proj", "down_proj") * 2, strict=True)}


class FirstOfTwo(torch.nn.Module):
    """Two experts, of which every token takes the first."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = torch.nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, x):
        return self.experts[0](x)


def test_layers_of_an_expert_that_no_token_reaches_all_count(llama):
    """Else what drops them would seem to cost nothing."""
    model = copy.deepcopy(llama)
    model.model.layers[0].mlp = FirstOfTwo(model.model.layers[0].mlp)
    table = with_inner(model, prunable_layers(model, granularity="half"))
    inner = {layer.name.partition("experts.")[2] for layer in table[1].layers if layer.inner}
    assert inner == {"0.gate_proj", "0.up_proj"}


def test_a_model_runs_once_however_often_the_ends_of_its_layers_are_looked_up(llama):
    model, runs = copy.deepcopy(llama), []
    model.register_forward_hook(lambda *_: runs.append(1))
    tables = [prunable_layers(model, ignore=ignore) for ignore in ((), (), ["re:.*down_proj"])]
    ends = [{layer.name for layer in with_inner(model, table).layers if not layer.inner} for table in tables]
    assert ends[0] == ends[1] and "model.layers.0.mlp.up_proj" in ends[2] - ends[0] and len(runs) == 2


@dataclass(frozen=True)
class Narrow(Level):
    """A width: the first half of an MLP's channels; of an attention all. A new kind of level, known to this test alone."""

    name = "narrow"
    sparsity = Fraction(1, 2)
    servable = False

    def kept(self, unit):
        return sum(layer.weights // 2 if ".mlp." in layer.name else layer.weights for layer in unit.layers)

    def misfit(self, unit):
        return None


@dataclass(frozen=True)
class Channels(Wanda):
    """Keeps the MLP's channels that give most; all layers of the MLP lose the same ones."""

    name = "channels"

    def check_menu(self, menu):
        super().check_menu([level for level in menu if level != Narrow()])

    def prune_unit(self, inputs, levels) -> Iterator:
        modules = inputs.modules
        ends = [name for name in modules if name.endswith("down_proj")]
        for name, module in modules.items():
            yield (
                name,
                (
                    self.narrowed(name, modules, ends) if level == Narrow() else 0 * module.weight
                    for level in levels
                ),
            )

    def narrowed(self, name, modules, ends):
        weight = modules[name].weight.detach().clone()
        for end in ends:
            lost = (
                modules[end]
                .weight.abs()
                .sum(0)
                .argsort()[: weight.shape[0] // 2 if name != end else weight.shape[1] // 2]
            )
            if name == end:
                weight[:, lost] = 0
            else:
                weight[lost] = 0
        return weight


def test_a_level_and_a_method_of_a_third_party_go_through_a_search(llama, data, plan, tmp_path):
    menu = (DENSE, Narrow(), DROPPED)
    made = replace(plan(levels=["dense", "dropped"], allocator=SEARCH), menu=menu, pruner=Channels())
    made.pruner.check_menu(menu)
    found = allocate(llama, data, made).allocation
    assert found.budget.zeros == sum(
        {"dense": 0, "narrow": unit.weights // 2 if "mlp" in unit.name else 0, "dropped": unit.weights}[
            level.name
        ]
        for unit, level in zip(found.table, found.levels, strict=True)
    )
    database = LevelDatabase(tmp_path / "own", {}, menu)
    build_database(database, llama, found.table, made.pruner, data)
    channels = [database.weight(f"model.layers.0.mlp.{name}", "narrow") for name in ("gate_proj", "up_proj")]
    kept = database.weight("model.layers.0.mlp.down_proj", "narrow").any(0)
    assert kept.sum() == 64 and all(torch.equal(weight.any(1), kept) for weight in channels)
    with pytest.raises(RecipeError, match="method 'magnitude' cannot make level narrow"):
        Magnitude().check_menu(menu)


def test_neighbours_are_next_in_cost_whatever_the_menus_order(llama):
    table = UnitTable(prunable_layers(llama, granularity="half").units[:2])
    menu = (DROPPED, Narrow(), Level.parse("2:4"), Level.parse("1:4"), DENSE)
    problem = AllocationProblem(table, menu, Fraction(1, 2))
    assert [[menu[k].name for k in row] for row in problem.by_cost] == [
        ["narrow", "dense", "2:4", "1:4", "dropped"],  # an attention keeps all at ``narrow``
        ["dense", "narrow", "2:4", "1:4", "dropped"],
    ]
    assert problem.neighbours(0, 2, 1) == (3, 4) and problem.neighbours(1, 2, 1) == (1, 3)
    assert problem.neighbours(1, 0, 2) == (2, 3) and problem.neighbours(0, 1, 9) == (0, 2, 3, 4)


def test_a_mutation_does_not_depend_on_the_menus_order(llama):
    table = prunable_layers(llama, granularity="half")
    names = []
    for order in ("dense 2:4 1:4 dropped", "dropped 2:4 dense 1:4"):
        menu = tuple(map(Level.parse, order.split()))
        problem, rng = AllocationProblem(table, menu, Fraction(1, 2)), np.random.default_rng(0)
        half = (menu.index(Level.parse("2:4")),) * len(table)
        children = [mutate(problem, half, 2, rng) for _ in range(20)]
        names.append([[menu[k].name for k in child] for child in children])
    assert names[0] == names[1] and len({tuple(child) for child in names[0]}) > 5


def test_units_that_a_method_prunes_together_hold_all_that_share_an_input():
    layers = [
        (0, Layer(f"layers.0.{name}", 8, 8)) for name in ("a.q_proj", "a.k_proj", "a.o_proj", "b.up_proj")
    ]
    for granularity, names in (
        ("layer", ["layers.0.a.qkv_proj", "layers.0.a.o_proj", "layers.0.b.up_proj"]),
        ("half", ["layers.0.a", "layers.0.b.up_proj"]),
        ("block", ["layers.0"]),
    ):
        assert [unit.name for unit in pruned_together(group_layers(layers, granularity))] == names
