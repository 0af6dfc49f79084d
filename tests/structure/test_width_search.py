"""Widths in a search: losses, gradients of moves, allocations on the exact budget, and whole runs."""

import copy
import json
from fractions import Fraction

import numpy as np
import pytest
import torch

import msp_plugin
from msp_plugin import Allocation, AllocationProblem, Level
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import TextSplit, split_text
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import RecipeError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plugins.manager import Plugins
from msp_plugin.pruning.masks import groups_of
from msp_plugin.search.allocate import allocate, check_model
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.move_gradients import changes_within
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve
from msp_plugin.structure.groups import with_groups

PLUGINS = Plugins(entry_points=False)
MENU = parse_menu("dense,2:4,3/4 wide,1/2 wide,1/2 wide 2:4,dropped")
SEARCH = {"name": "search", "tokens": 48, "holdout": 24, "rounds": 2, "max_tokens": 60_000}


@pytest.fixture
def searched(tiny, tmp_path):
    """Return a tiny Llama, its problem, a database of the largest heads and channels, and text."""
    model = tiny("llama")
    table = with_groups(model, prunable_layers(model, granularity="half"), 4)
    problem = AllocationProblem(table, MENU, Fraction(1, 4))
    ids = torch.randint(0, 96, (2, 14), generator=torch.Generator().manual_seed(5))
    data = CalibrationSet(tuple(ids), "test")
    database = LevelDatabase(tmp_path, {"test": "widths"}, MENU)
    build_database(database, model, table, PLUGINS.build("pruners", "l2"), data)
    return model, problem, database, data


def at(*names):
    return tuple(MENU.index(Level.parse(name)) for name in names)


REST = ("dense", "1/2 wide", "3/4 wide", "dropped", "2:4", "dense")


@pytest.mark.parametrize("first, second", [("3/4 wide", "1/2 wide 2:4"), ("1/2 wide 2:4", "3/4 wide")])
def test_with_the_last_layers_alone_narrowed_the_loss_is_the_same(searched, first, second):
    model, problem, database, data = searched
    choice = at(first, second, *REST)
    with CandidateWeights(model, database, problem) as weights:
        loss = CandidateLoss(weights, data, "kl").prepare()
        expected = loss(choice)
        weights.set(choice, inner_dense=True)
        inner = [layer for layer in problem.table[3].layers if layer.inner]
        for layer in inner:  # at 1/2 wide, with its dense rows
            assert (model.get_submodule(layer.name).weight != 0).any(1).all()
        assert loss.quality()[0] == pytest.approx(expected, rel=1e-6)


def test_moves_read_no_inner_weight_of_what_is_dropped_and_none_twice_that_stays_as_it_was(searched):
    model, problem, database, _ = searched
    with CandidateWeights(model, database, problem) as weights:
        for level, others in (("dropped", set()), ("3/4 wide", {"2:4", "1/2 wide 2:4"})):
            changes, read = changes_within(weights, at(level, level, *REST), 9), []
            weights.weight = lambda layer, name, read=read: (
                read.append(name) or CandidateWeights.weight(weights, layer, name)
            )
            inner, last = problem.table[1].layers[0].name, problem.table[1].layers[-1].name
            first = changes(inner)[1]
            assert {MENU[k].name for k in first} == others and "dropped" not in read
            read.clear()
            assert changes(inner)[1].keys() == first.keys() and set(read) - {level} == others
            assert {MENU[k].name for k in changes(last)[1]} == {a.name for a in MENU} - {level}


def loss_along(model, ids, dense, changes, step):
    """KL of a float64 model whose weights are moved a step along changes."""
    with torch.no_grad():
        for name, change in changes.items():
            model.get_submodule(name).weight.add_(step * change)
        logp, logq = (m(ids[None]).logits[0].log_softmax(-1) for m in (dense, model))
        for name, change in changes.items():
            model.get_submodule(name).weight.sub_(step * change)
    return float((logp.exp() * (logp - logq)).sum(-1).mean())


MOVES = [
    ("dense", "3/4 wide"),
    ("3/4 wide", "dense"),
    ("3/4 wide", "1/2 wide"),
    ("1/2 wide", "3/4 wide"),
    ("1/2 wide", "1/2 wide 2:4"),
    ("1/2 wide 2:4", "1/2 wide"),
    ("1/2 wide 2:4", "dropped"),
    ("dropped", "1/2 wide 2:4"),
]


@pytest.mark.parametrize(
    "unit, now, then",
    [
        pytest.param(unit, *move, marks=() if (2 * i + unit) % 4 == 1 else pytest.mark.slow)
        for i, move in enumerate(MOVES)
        for unit in (0, 1)
    ],
)
def test_the_gradient_of_a_move_is_the_derivative_of_the_loss_along_it(searched, unit, now, then):
    """The oracle moves the last layer along the move, and of the others the rows that both levels keep."""
    model, problem, database, data = searched
    choice = (*at(*["dense"] * unit), *at(now), *at(*REST, "dense")[unit:])
    choice = choice[: len(problem.table)]
    with CandidateWeights(model, database, problem) as weights:
        loss = CandidateLoss(weights, data, "kl").prepare()
        first_order, curvature = loss.move_gradients(choice, [0], 2, 0)
    dense, moved = copy.deepcopy(model).double(), copy.deepcopy(model).double()

    def weight(layer, level):
        own = dense.get_submodule(layer.name).weight.detach()
        return own if level == "dense" else database.weight(layer.name, level).double()

    changes = {}
    with torch.no_grad():
        for u, part in enumerate(problem.table):
            level = MENU[choice[u]].name
            for layer in part.layers:
                own, at_level = weight(layer, "dense"), weight(layer, level)
                gone = ~(groups_of(at_level, layer) != 0).any((1, 2))
                if layer.inner:  # the rows that have gone are there again, and change nothing
                    at_level = torch.where(
                        gone.repeat_interleave(len(own) // len(gone))[:, None], own, at_level
                    )
                moved.get_submodule(layer.name).weight.copy_(at_level)
        for layer in problem.table[unit].layers:
            a, b = weight(layer, now), weight(layer, then)
            change = b - a
            if layer.inner:
                change = change * ((a != 0).any(1, keepdim=True) & (b != 0).any(1, keepdim=True))
            changes[layer.name] = change
    ids, eps = data.samples[0], 2e-3  # transformers computes norms in float32
    up, down = (loss_along(moved, ids, dense, changes, sign * eps) for sign in (1, -1))
    k = MENU.index(Level.parse(then))
    assert first_order[0, unit, k] == pytest.approx((up - down) / (2 * eps), rel=2e-3, abs=2e-6)
    assert np.isfinite(curvature[0, unit, k])


@pytest.mark.parametrize(
    "method, allocator",
    [
        ("llm_pruner", "uniform"),
        ("obs", {"name": "knapsack", "surrogate": "output"}),
        ("llm_pruner", {"name": "knapsack", "surrogate": "fisher"}),
    ],
)
def test_every_allocation_is_on_the_budget_to_the_weight(tiny, tmp_path, allocator, method):
    model = tiny("mistral")
    before = [p.clone() for p in model.parameters()]
    options = Options(
        sparsity="3/10", method=method, levels=["mixed", "1/2 wide 2:4"], quantum=4, allocator=allocator,
        cache=str(tmp_path),
    )  # fmt: skip
    made = resolve(options, PLUGINS)
    ids = torch.randint(0, 96, (8, 12), generator=torch.Generator().manual_seed(5))
    found = allocate(model, split_text(CalibrationSet(tuple(ids), "test"), made.search_text), made).allocation
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert abs(found.budget.sparsity - Fraction(3, 10)) < Fraction(1, 100)
    assert found.provenance["quantum"] == 4 and found.provenance["granularity"] == "half"
    assert Allocation.from_dict(json.loads(found.to_json())).levels == found.levels
    assert any(level.narrows for level in found.levels)


@pytest.mark.slow
@pytest.mark.parametrize("method, levels", [("llm_pruner", "width"), ("obs", "mixed,1/2 wide 2:4")])
def test_a_demo_model_becomes_smaller_and_is_verified(method, levels, tmp_path, msp):
    run, small = tmp_path / "run", tmp_path / "small"
    text = [
        "--data",
        "demo:calibration",
        "--test-data",
        "demo:test",
        "--samples",
        "12",
        "--length",
        "48",
        "--test-samples",
        "4",
    ]
    search = [f"--set=allocator.{option}" for option in ("tokens=192", "holdout=96", "rounds=1")]
    msp("prune", "demo:llama", "-m", method, "--levels", levels, "-s", "0.2", *text, *search,
        "--cache", str(tmp_path / "cache"), "--out", str(run))  # fmt: skip
    msp("export", str(run), "--to", "small", "--out", str(small))
    found = msp("verify", str(small), "--reference", str(run)).out
    assert "passed" in found
    allocation = Allocation.read(run / "allocation.json")
    assert allocation.budget.exact and any(level.narrows for level in allocation.levels)
    dense, now = (msp_plugin.load(path, dtype="float32") for path in (run, small))
    gone = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in now.parameters())
    assert gone > 0 and (levels != "width" or gone == allocation.budget.zeros)


@pytest.mark.slow
def test_one_command_prunes_as_llm_pruner_does_and_trains_lora_afterwards(llama_dir, tmp_path, msp):
    pytest.importorskip("peft")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the {i}th cat sat on mat {i * i % 97}" for i in range(400)))
    run, small = tmp_path / "run", tmp_path / "small"
    msp("prune", llama_dir, "-m", "llm_pruner", "--levels", "width", "-s", "0.25", "--allocator", "uniform",
        "--data", text, "--samples", "12", "--length", "16", "--test-samples", "2", "--dtype", "float32",
        "--recover", "lora", "--set", "lora.tokens=200", "--set", "lora.learning_rate=1e-3",
        "--out", run)  # fmt: skip
    record = json.loads((run / "run.json").read_text())
    assert record["stages"][-1]["recovery"]["method"]["name"] == "lora"
    allocation = Allocation.read(run / "allocation.json")
    assert allocation.budget.zeros <= record["sparsity"]["zeros"] and any(
        k.narrows for k in allocation.levels
    )
    msp("export", run, "--to", "small", "--out", small)
    assert "passed" in msp("verify", small, "--reference", run).out


@pytest.mark.parametrize("levels, refused", [("7/8 wide,dropped", True), ("dense,7/8 wide,dropped", False)])
def test_a_model_whose_attentions_may_only_be_dropped_is_refused(tiny, levels, refused):
    """With one KV head no width fits an attention."""
    model = tiny("llama", num_key_value_heads=1)
    plan = resolve(Options(sparsity=0.5, levels=levels, quantum=1, method="l2", allocator="uniform"), PLUGINS)
    if not refused:
        assert check_model(model, plan).weights
        return
    with pytest.raises(RecipeError, match="every attention may only be dropped") as error:
        check_model(model, plan)
    assert "dense" in error.value.hint


def test_an_allocation_without_any_attention_is_warned_of(tiny, tmp_path, caplog):
    model = tiny("llama")
    table = prunable_layers(model, granularity="half")
    share = Fraction(sum(unit.weights for unit in table if "self_attn" in unit.name), table.weights)
    options = Options(
        sparsity=str(share), levels="depth", method="magnitude", allocator="uniform", protect=["re:.*mlp.*"],
        cache=str(tmp_path),
    )  # fmt: skip
    allocate(model, TextSplit(), resolve(options, PLUGINS))
    assert "every attention is dropped" in caplog.text
