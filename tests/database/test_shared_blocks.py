"""A level database that ranks build together, each its own blocks."""

import copy
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import HostError, MSPError, NumericsError
from msp_plugin.hosts.llm_compressor.methods import SparseGPT, Wanda
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.levels import parse_menu
from msp_plugin.runtime.ranks import ALONE

MENU = parse_menu(["dense", "2:4", "1:8"])
BLOCKS = 5


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


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("statistics_bytes", [1 << 30, 2 * 4 * 32 * 32])
def test_the_files_are_those_of_one_process(build, on_ranks, size, statistics_bytes):
    alone, count = build("alone")
    found = on_ranks(size, lambda ranks: build("shared", ranks, statistics_bytes=statistics_bytes))
    assert [written for _, written in found] == [count] * size == [7 * BLOCKS] * size
    assert files(found[0][0]) == files(alone)


def test_a_rank_runs_its_own_blocks_only_and_each_batch_once(build, on_ranks, model):
    def work(ranks):
        own, runs = copy.deepcopy(model), [0] * BLOCKS
        for number, block in enumerate(own.model.layers):

            def count(module, args, output, number=number):
                runs[number] += 1

            block.mlp.register_forward_hook(count)
        build("shared", ranks, Wanda(), own)
        return runs

    looks = 3  # at the start one sample, whole and by block with another one, shows that the model runs so
    found = on_ranks(2, work)
    assert found == [[looks + 4 * (b % 2 == rank) for b in range(BLOCKS)] for rank in (0, 1)]


def test_only_missing_layers_are_built_whoever_wrote_the_others(build, on_ranks):
    database, _ = build("shared")
    before = files(database)
    for gone in ("model.layers.1.mlp.up_proj", "model.layers.3.self_attn.o_proj"):
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
    error: type[MSPError] = NumericsError

    def prune_levels(self, module, statistic, levels, layer):
        if layer == self.layer:
            raise self.error(f"cannot prune {layer}", hint="none")
        return super().prune_levels(module, statistic, levels, layer)


@pytest.mark.parametrize(("size", "block"), [(2, 0), (2, BLOCKS - 1), (3, 1), (7, 2), (7, 3)])
@pytest.mark.parametrize("error", [NumericsError, HostError])
def test_a_layer_that_fails_ends_all_ranks_with_its_error(build, on_ranks, size, block, error):
    layer = f"model.layers.{block}.self_attn.o_proj"

    def work(ranks):
        with pytest.raises(error) as found:
            build("failing", ranks, Failing(block_size=32, layer=layer, error=error))
        return str(found.value), files(build("shared", ranks)[0])  # the ranks go on together

    alone = files(build("alone")[0])
    assert on_ranks(size, work) == [(f"cannot prune {layer}\n  -> none", alone)] * size


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("block", range(BLOCKS - 1))
def test_an_activation_that_overflows_ends_all_ranks_with_its_error(build, on_ranks, model, size, block):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[block].mlp.down_proj.weight.fill_(float("inf"))
    errors = on_ranks(size, lambda ranks: build("shared", ranks, own=copy.deepcopy(broken)))
    said = f"the output of model.layers.{block} is not finite"
    assert [str(error).split("\n")[0] for error in errors] == [said] * size


def test_ranks_that_see_differently_whether_a_model_runs_by_block_take_the_way_that_all_can(
    build, on_ranks, monkeypatch
):
    seen = []

    def differs(model, ids):
        seen.append(ids)
        return len(seen) != 2

    monkeypatch.setattr("msp_plugin.database.build.runs_by_block", differs)
    found = on_ranks(2, lambda ranks: build("shared", ranks)[1])
    assert found == [7 * BLOCKS] * 2 and len(seen) == 2


def test_hidden_states_of_another_dtype_than_the_embeddings_are_handed_on(build, on_ranks, model):
    own = copy.deepcopy(model)
    own.model.embed_tokens.bfloat16()
    alone = files(build("alone", own=copy.deepcopy(own))[0])
    found = on_ranks(3, lambda ranks: files(build("shared", ranks, own=copy.deepcopy(own))[0]))
    assert found == [alone] * 3


PROCESS = """
import sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.hosts.llm_compressor.methods import SparseGPT
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.levels import parse_menu
from msp_plugin.runtime.ranks import join

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
samples = CalibrationSet(tuple(torch.load(sys.argv[2])), "mixed")
database = LevelDatabase(Path(sys.argv[3]), {}, parse_menu(["dense", "2:4", "1:8"]))
ranks = join()
build_database(
    database, model, prunable_layers(model), SparseGPT(block_size=32), samples,
    batch_tokens=80, statistics_bytes=1, ranks=ranks,
)
ranks.leave()
"""


@pytest.mark.slow
def test_processes_of_torchrun_write_the_files_of_one_process(model, mixed, tmp_path):
    model.save_pretrained(tmp_path / "model")
    torch.save(list(mixed.samples), tmp_path / "samples.pt")
    (tmp_path / "process.py").write_text(PROCESS)
    written = []
    for count, start in ((1, []), (2, ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        subprocess.run(
            [sys.executable, *start, "process.py", "model", "samples.pt", str(count)],
            cwd=tmp_path, check=True, timeout=120, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        written.append({p.name: p.read_bytes() for p in (tmp_path / str(count)).rglob("*.safetensors")})
    assert written[0] == written[1] and len(written[0]) == 7 * BLOCKS
