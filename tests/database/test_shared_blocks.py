"""A level database that ranks build together, each its own layers."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import MSPError, NumericsError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.menus import parse_menu
from msp_plugin.pruning.sparsegpt import SparseGPT
from msp_plugin.pruning.wanda import Wanda
from msp_plugin.runtime.ranks import ALONE

MENU = parse_menu(["dense", "2:4", "1:8"])
BLOCKS = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=BLOCKS, **sizes)).eval()


@pytest.fixture
def mixed(make_samples):
    """Four batches, two of another shape."""
    return CalibrationSet(make_samples(4, 24).samples + make_samples(4, 40, seed=1).samples, "mixed")


@pytest.fixture
def build(model, mixed, tmp_path):
    """Return what builds a database of a name, on the ranks that it is given."""

    def make(name, ranks=ALONE, pruner=None, own=None, **options):
        pruner, own = pruner or SparseGPT(block_size=32), own or copy.deepcopy(model)
        database = LevelDatabase(tmp_path / name, {"method": pruner.name}, MENU)
        options = {"batch_tokens": 80, **options}
        written = build_database(database, own, prunable_layers(own), pruner, mixed, ranks=ranks, **options)
        return database, written

    return make


def files(database):
    return {path.name: path.read_bytes() for path in database.path.glob("*.safetensors")}


def uniform(model):
    """Return one level for all layers: the pruned blocks that the statistics are taken behind."""
    return {layer.name: "2:4" for layer in prunable_layers(model).layers}


@pytest.mark.parametrize(
    ("size", "statistics_bytes", "behind"),
    [
        (2, 1 << 30, False),
        (3, 1, False),
        (3, 1 << 30, True),
        pytest.param(9, 1, True, marks=pytest.mark.slow),
    ],
)
def test_the_files_are_those_of_one_process(build, on_ranks, model, size, statistics_bytes, behind):
    options = {"prefix": uniform(model) if behind else None, "statistics_bytes": statistics_bytes}
    alone, count = build("alone", **options)
    found = on_ranks(size, lambda ranks: build("shared", ranks, **options))
    assert [written for _, written in found] == [count] * size == [7 * BLOCKS] * size
    assert files(found[0][0]) == files(alone)


def test_a_rank_runs_every_sample_through_every_block_once(build, on_ranks, model):
    def work(ranks):
        own, runs = copy.deepcopy(model), [0] * BLOCKS
        for number, block in enumerate(own.model.layers):

            def count(module, args, output, number=number):
                runs[number] += len(output)

            block.mlp.register_forward_hook(count)
        build("shared", ranks, Wanda(), own)
        return runs

    looks = 3  # at the start one sample, whole and by block with another one, shows that the model runs so
    assert on_ranks(3, work) == [[looks + 8] * BLOCKS] * 3


def test_only_missing_layers_are_built_whoever_wrote_the_others(build, on_ranks):
    database, _ = build("shared")
    before = files(database)
    for gone in ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.o_proj"):
        database.file(gone).unlink()
    found = on_ranks(3, lambda ranks: build("shared", ranks))
    assert [written for _, written in found] == [
        3
    ] * 3  # gate and up have one input, and are written together
    assert files(database) == before


@dataclass(frozen=True)
class Failing(SparseGPT):
    name = "failing"

    layer: str = ""

    def prune_levels(self, module, statistic, levels, layer):
        if layer == self.layer:
            raise NumericsError(f"cannot prune {layer}")
        return super().prune_levels(module, statistic, levels, layer)


@pytest.mark.parametrize(
    ("size", "block", "behind"),
    [(2, 0, False), (2, BLOCKS - 1, True), (3, 1, True), pytest.param(7, 2, False, marks=pytest.mark.slow)],
)
def test_a_layer_that_fails_ends_all_ranks_with_its_error(build, on_ranks, model, size, block, behind):
    layer = f"model.layers.{block}.self_attn.o_proj"
    prefix = uniform(model) if behind else None

    def work(ranks):
        with pytest.raises(MSPError) as found:
            build("failing", ranks, Failing(block_size=32, layer=layer), prefix=prefix)
        return found.value.message, build("shared", ranks)[1]  # the ranks go on together

    messages, written = zip(*on_ranks(size, work), strict=True)
    assert written == (7 * BLOCKS,) * size
    (failed,) = (rank for rank, message in enumerate(messages) if message == f"cannot prune {layer}")
    assert set(messages) == {f"cannot prune {layer}", f"rank {failed}: cannot prune {layer}"}


@pytest.mark.parametrize("block", [0, BLOCKS - 2])
def test_an_activation_that_overflows_ends_all_ranks_with_its_error(build, on_ranks, model, block):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[block].mlp.down_proj.weight.fill_(float("inf"))
    errors = on_ranks(2, lambda ranks: build("shared", ranks, own=copy.deepcopy(broken)))
    said = f"the output of model.layers.{block} is not finite"
    assert [error.message for error in errors] == [said, said]


def test_ranks_that_see_differently_whether_a_model_runs_by_block_take_the_way_that_all_can(
    build, on_ranks, monkeypatch
):
    seen = []

    def differs(model, ids):
        seen.append(ids)
        return len(seen) != 2

    monkeypatch.setattr("msp_plugin.database.statistics.runs_by_block", differs)
    found = on_ranks(2, lambda ranks: build("shared", ranks)[1])
    assert found == [7 * BLOCKS] * 2 and len(seen) == 2
