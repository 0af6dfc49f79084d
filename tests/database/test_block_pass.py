"""The pass block by block against whole forward passes, which are the definition."""

import copy
import gc
import logging
from dataclasses import dataclass

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.statistics import collect
from msp_plugin.database.store import LevelDatabase
from msp_plugin.models.layers import decoder_blocks, prunable_layers
from msp_plugin.passes.by_block import BlockPass, runs_by_block
from msp_plugin.plan.menus import parse_menu
from msp_plugin.pruning.base import InputNorm
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.pruning.sparsegpt import SparseGPT
from msp_plugin.pruning.wanda import Wanda

MENU = parse_menu(["dense", "2:4", "1:8"])


def gemma2():
    """Every second block attends to a sliding window, so that blocks get different masks."""
    torch.manual_seed(4)
    config = Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=5, initializer_range=0.15,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def handing_over(llama):
    """The second block adds what the first left in an attribute, beside the hidden state."""
    first, second = llama.model.layers
    first.mlp.register_forward_hook(lambda module, args, output: setattr(llama, "left", output))
    second.mlp.register_forward_hook(lambda module, args, output: output + llama.left)
    return llama


@pytest.fixture
def mixed(make_samples):
    """Samples of two lengths, so that the batches differ in shape."""
    return CalibrationSet(make_samples(3, 24).samples + make_samples(5, 40, seed=1).samples, "mixed")


@pytest.fixture(params=["llama", pytest.param("qwen2", marks=pytest.mark.slow), "gemma2"])
def any_model(request):
    return gemma2() if request.param == "gemma2" else request.getfixturevalue(request.param)


def database(root, pruner):
    return LevelDatabase(root, {"method": pruner.name}, MENU)


def tensors(held, table):
    return [held.weight(a.name, level.name) for a in table.layers for level in MENU if not level.is_dense]


def same(first, second, table):
    weights = zip(tensors(first, table), tensors(second, table), strict=True)
    return all(torch.equal(a, b) for a, b in weights) and all(
        (a == b).all() for a, b in zip(first.errors(table), second.errors(table), strict=True)
    )


@pytest.mark.parametrize("batch_tokens", [1, 80])
def test_statistics_are_those_of_whole_forward_passes_bit_for_bit(any_model, mixed, batch_tokens):
    table, pruner = prunable_layers(any_model), SparseGPT()
    expected = collect(any_model, list(table), pruner, mixed, batch_tokens)
    walk = BlockPass(any_model, mixed, batch_tokens)
    found = {}

    def add(unit, inputs):
        module = any_model.get_submodule(units[unit].layers[0].name)
        found[unit] = pruner.observe(module, inputs, found.get(unit) or pruner.new_statistic(module))

    for block in range(len(walk.blocks)):
        units = {unit.name: unit for unit in table if unit.block == block}
        walk.run(list(units.values()), add)
    assert found.keys() == expected.keys()
    for name, statistic in found.items():
        assert torch.equal(statistic.hessian, expected[name].hessian)
        assert (statistic.samples, statistic.tokens) == (expected[name].samples, expected[name].tokens)


def test_every_block_runs_once_per_batch_and_the_head_never(tmp_path, llama, mixed):
    ran = []
    for number, block in enumerate(llama.model.layers):
        block.mlp.register_forward_hook(lambda module, args, out, number=number: ran.append(number))
    llama.lm_head.register_forward_hook(lambda *args: ran.append("head"))
    runs_by_block(llama, mixed.samples[0])
    del ran[:]
    build_database(
        database(tmp_path, Wanda()), llama, prunable_layers(llama), Wanda(), mixed, batch_tokens=80
    )
    checks = [0, 1, "head", 0, 0, 1, 1]
    assert ran == [*checks, 0, 0, 0, 0, 1, 1, 1, 1]


def test_a_build_goes_on_after_half_of_the_layers(tmp_path, any_model, mixed):
    table, pruner = prunable_layers(any_model), SparseGPT()
    whole, cut = database(tmp_path / "whole", pruner), database(tmp_path / "cut", pruner)
    build_database(whole, any_model, table, pruner, mixed)

    class StoppedError(Exception):
        pass

    def stop(done, total):
        if done == total // 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        build_database(cut, any_model, table, pruner, mixed, progress=stop)
    before = {path.name: path.stat().st_mtime_ns for path in cut.path.iterdir()}
    assert len(before) == len(table.layers) // 2
    assert build_database(cut, any_model, table, pruner, mixed) == len(table.layers) - len(before)
    assert {name: (cut.path / name).stat().st_mtime_ns for name in before} == before
    assert same(whole, cut, table)


@pytest.mark.parametrize("change", [lambda model: model, handing_over], ids=["by block", "as a whole"])
def test_behind_a_prefix_layers_see_what_a_pruning_of_the_whole_model_shows_them(
    tmp_path, llama, mixed, change
):
    """Each block is pruned by hand, with statistics of a model whose earlier blocks are pruned already."""
    by_hand, differ = change(copy.deepcopy(llama)), 0
    llama = change(llama)
    pruner, table = SparseGPT(), prunable_layers(llama)
    dense = database(tmp_path / "dense", pruner)
    build_database(dense, llama, table, pruner, mixed)
    behind = database(tmp_path / "behind", pruner)
    names = [level.name for level in behind.menu if not level.is_dense]
    prefix = {a.name: names[u % len(names)] for u, unit in enumerate(table) for a in unit.layers}
    before = {name: p.clone() for name, p in llama.named_parameters()}
    build_database(behind, llama, table, pruner, mixed, prefix=prefix)
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())
    for number in sorted({unit.block for unit in table}):
        units = [unit for unit in table if unit.block == number]
        statistics = collect(by_hand, units, pruner, mixed, 4096)
        for unit in units:
            for layer in unit.layers:
                module = by_hand.get_submodule(layer.name)
                levels = [level for level in behind.menu if not level.is_dense]
                weights = dict(
                    zip(
                        names,
                        pruner.prune_levels(module, statistics[unit.name], levels, layer.name),
                        strict=True,
                    )
                )
                for level, weight in weights.items():
                    torch.testing.assert_close(behind.weight(layer.name, level), weight, rtol=1e-4, atol=1e-5)
                    differ += not torch.equal(weight, dense.weight(layer.name, level))
        for unit in units:
            for layer in unit.layers:
                module = by_hand.get_submodule(layer.name)
                module.weight.data.copy_(behind.weight(layer.name, prefix[layer.name]))
    assert differ >= len(table.layers) // 2  # those of the second block


def test_a_model_that_hands_over_more_is_run_as_a_whole(tmp_path, llama, mixed, caplog):
    model, pruner = handing_over(llama), SparseGPT()
    table = prunable_layers(model)
    assert not runs_by_block(model, mixed.samples[0])
    with caplog.at_level(logging.INFO, logger="msp_plugin"):
        build_database(database(tmp_path, pruner), model, table, pruner, mixed)
    assert "LlamaForCausalLM does not run block by block: whole forward passes" in caplog.messages
    held, expected = database(tmp_path, pruner), collect(model, list(table), pruner, mixed, 4096)
    for unit in table:
        for layer in unit.layers:
            module = model.get_submodule(layer.name)
            for level in MENU[1:]:
                (wanted,) = pruner.prune_levels(module, expected[unit.name], [level], layer.name)
                assert torch.equal(held.weight(layer.name, level.name), wanted)


def test_a_model_of_another_calling_convention_is_run_as_a_whole(llama, mixed, count_hooks):
    hooks = count_hooks(llama)
    for block in llama.model.layers:
        own = block.forward
        block.forward = lambda hidden_states, own=own, **kwargs: {"hidden": own(hidden_states, **kwargs)}
    llama.model.forward = lambda input_ids, use_cache: (_ for _ in ()).throw(LookupError("hidden"))
    assert not runs_by_block(llama, mixed.samples[0])
    assert count_hooks(llama) == hooks


def test_the_check_and_the_pass_leave_the_model_as_it_was(any_model, mixed, bits, count_hooks):
    before, hooks = bits(any_model), count_hooks(any_model)
    forwards = [block.forward for block in decoder_blocks(any_model)[1]]
    assert runs_by_block(any_model, mixed.samples[0])
    assert bits(any_model) == before and count_hooks(any_model) == hooks
    assert [block.forward for block in decoder_blocks(any_model)[1]] == forwards


LIVE, MOST = [], []


class Counted(InputNorm):
    """A statistic that says how many of its kind there are."""

    def __init__(self, *args):
        super().__init__(*args)
        LIVE.append(None)
        MOST.append(len(LIVE))

    def __del__(self):
        LIVE.pop()


@dataclass(frozen=True)
class Counting(Magnitude):
    name = "counting"
    needs_statistics = True

    def new_statistic(self, module):
        return Counted(module.in_features, module.weight.device)


@pytest.mark.parametrize("limit, most", [(4 * 1024**3, 4), (1, 1)])
def test_no_more_statistics_are_held_than_one_blocks_or_than_fit(tmp_path, any_model, mixed, limit, most):
    gc.collect()
    del LIVE[:], MOST[:]
    table, held = prunable_layers(any_model), database(tmp_path, Counting())
    build_database(held, any_model, table, Counting(), mixed, statistics_bytes=limit)
    assert len(MOST) == len(table) and max(MOST) <= most + 1 and not LIVE


def test_a_block_beyond_the_limit_is_run_again_and_no_other(tmp_path, llama, data):
    ran = []
    for number, block in enumerate(llama.model.layers):
        block.mlp.register_forward_hook(lambda module, args, out, number=number: ran.append(number))
    table, pruner = prunable_layers(llama), Wanda()
    one, many = database(tmp_path / "one", pruner), database(tmp_path / "many", pruner)
    build_database(one, llama, table, pruner, data)
    once = len(ran)
    build_database(many, llama, table, pruner, data, statistics_bytes=1)
    assert ran[once:].count(0) == ran[:once].count(0) + 3 and ran[once:].count(1) == ran[:once].count(1) + 3
    assert same(one, many, table)
