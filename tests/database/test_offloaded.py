"""Models whose weights accelerate holds in main memory or on disk, against the same models in memory."""

import pytest
import torch

from msp_plugin.allocators.knapsack import Knapsack
from msp_plugin.data.samples import TextSplit
from msp_plugin.database.build import build_database, check_space
from msp_plugin.database.store import LevelDatabase
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import check_finite_weights, prunable_layers
from msp_plugin.models.offload import offloaded_module, onloaded
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.menus import parse_menu
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.pruning.sparsegpt import SparseGPT
from msp_plugin.pruning.wanda import Wanda
from msp_plugin.search.measurements import Measurements

accelerate = pytest.importorskip("accelerate")
MENU = parse_menu(["dense", "2:4", "1:8"])
PRUNERS = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT()}


def database(root):
    return LevelDatabase(root, {"test": "offloaded"}, MENU)


@pytest.mark.parametrize("method", PRUNERS)
def test_an_offloaded_model_gives_the_database_of_the_model_in_memory(tmp_path, pair, data, method):
    model, away = pair
    table, pruner = prunable_layers(model), PRUNERS[method]
    check_space(database(tmp_path / "away-db"), away, table)
    check_finite_weights(away, table)
    for name, its in (("here", model), ("away-db", away)):
        build_database(database(tmp_path / name), its, table, pruner, data)
    here, there = database(tmp_path / "here"), database(tmp_path / "away-db")
    for layer in table.layers:
        for level in MENU[1:]:
            assert torch.equal(here.weight(layer.name, level.name), there.weight(layer.name, level.name))
    assert all((a == b).all() for a, b in zip(here.errors(table), there.errors(table), strict=True))


def test_the_fingerprint_is_that_of_the_model_in_memory_and_the_weights_go_away_again(pair):
    model, away = pair
    assert fingerprint(away) == fingerprint(model)
    name = offloaded_module(away)
    with onloaded(away.get_submodule(name)) as module:
        assert all(p.device.type == "cpu" for p in module.parameters(recurse=False))
    assert all(p.device.type == "meta" for p in away.get_submodule(name).parameters(recurse=False))


def test_the_fingerprint_reads_each_offloaded_weight_once(llama, monkeypatch):
    accelerate.cpu_offload(llama, execution_device=torch.device("cpu"))
    llama.model.layers[0].register_buffer("saved", torch.zeros(3))
    hooks = [getattr(module, "_hf_hook", None) for module in llama.modules()]
    maps = {type(hook.weights_map) for hook in hooks if getattr(hook, "weights_map", None) is not None}
    read = []
    for cls in maps:
        own = cls.__getitem__
        monkeypatch.setattr(cls, "__getitem__", lambda self, key, own=own: read.append(key) or own(self, key))
    fingerprint(llama)
    assert read and len(read) <= len(list(llama.parameters())) + 2  # tied embeddings, and the block's buffer


def test_offloaded_embeddings_are_read_for_the_first_block_only(tmp_path, llama, data, monkeypatch):
    accelerate.cpu_offload(llama, execution_device=torch.device("cpu"))
    read, own = [], llama.model.embed_tokens._hf_hook.pre_forward
    monkeypatch.setattr(
        llama.model.embed_tokens._hf_hook, "pre_forward", lambda *a, **k: read.append(1) or own(*a, **k)
    )
    build_database(database(tmp_path), llama, prunable_layers(llama), Wanda(), data, batch_tokens=48)
    assert len(read) == 1 + 2 + 3  # the check's whole pass, its two samples, three batches


def test_an_offloaded_model_is_allocated_by_errors_alone(tmp_path, pair, data):
    found = []
    for number, its in enumerate(pair):
        table = prunable_layers(its)
        held = Measurements(its, table, MENU, Wanda(), TextSplit(data), {}, str(tmp_path / str(number)))
        problem = AllocationProblem(table, MENU, parse_sparsity("0.5"))
        found.append(held.allocate(Knapsack(surrogate="output"), problem, 0)[0].choice)
    assert found[0] == found[1]
