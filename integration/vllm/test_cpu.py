"""The vLLM plugin on a CPU with its kernels: packed, dense and mixed shards, tensor parallel parts, whole models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from linears import COLUMNS, QKV, ROW, Q, checkpoint_of, every_kind, random, served, weights_of
from tiny_models import save_models

from msp_plugin.serving.cpu.build import load_operator
from msp_plugin.serving.cpu.kernel import FORCE, choose

reason = load_operator()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no kernels here: {reason}")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.delenv(FORCE, raising=False)


def assert_served_by_a_kernel(layer, weights, report, packed, dtype=torch.float32):
    (line,) = report()
    dense = torch.cat(list(weights.values()))
    assert (line["kernel"], line["packed"]) == (choose(dtype).kernel, list(packed))
    assert line["bytes"] < line["dense_bytes"] == dense.nbytes
    for tokens in (1, 9):
        x = random(tokens, COLUMNS, dtype=dtype)
        assert torch.allclose(
            layer(x)[0], torch.nn.functional.linear(x, dense), atol=1e-4 if dtype == torch.float32 else 0.1
        )


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_fused_linear_of_packed_shards_is_one_packed_weight(kind, dtype, report):
    weights = weights_of(kind, dtype=dtype)
    layer = served(kind, checkpoint_of(weights, weights), tuple(weights), dtype=dtype)
    assert_served_by_a_kernel(layer, weights, report, weights, dtype)


def test_a_dense_shard_joins_the_packed_ones(report):
    weights = weights_of(QKV, (Q,))
    layer = served(QKV, checkpoint_of(weights, (Q,)), (Q,))
    assert_served_by_a_kernel(layer, weights, report, weights)


def test_what_a_packed_checkpoint_holds_dense_stays_dense(report):
    weights = weights_of(ROW, ())
    served(ROW, checkpoint_of(weights, ()), (Q,))
    assert report()[0]["reason"] == "the checkpoint stores it dense"


def test_negative_zeros_of_a_dense_checkpoint_are_not_kept_as_values(report):
    """A mask times a weight leaves them."""
    sizes = []
    for name, weight in [*weights_of(ROW).items()] * 2:
        weight = weight if not sizes else torch.where(weight == 0, -0.0, weight)
        served(ROW, checkpoint_of({name: weight}, ()), None)
        sizes.append(report()[-1]["bytes"])
    assert sizes[0] == sizes[1] < weight.nbytes


def test_a_process_of_two_packs_its_own_part(rank, report):
    weights = weights_of(ROW)
    layer = served(ROW, checkpoint_of(weights, weights), tuple(weights))
    (weight,) = weights.values()
    part = weight.chunk(2, dim=1)[rank]
    x = random(3, COLUMNS // 2)
    out = layer.quant_method.apply(layer, x)
    assert report()[0]["kernel"] == choose(torch.float32).kernel
    assert torch.allclose(out, torch.nn.functional.linear(x, part), atol=1e-4)


@pytest.mark.parametrize("form", ["packed", "bitmask"])
def test_a_whole_model_gives_the_dense_models_tokens(form, tmp_path):
    save_models(tmp_path)
    names = ("llama", f"llama-{form}")
    (tmp_path / "jobs.json").write_text(json.dumps({name: {"model": str(tmp_path / name)} for name in names}))
    command = [sys.executable, tiny_models.__file__, str(tmp_path / "jobs.json"), str(tmp_path / "out.json")]
    environment = {name: value for name, value in os.environ.items() if name != FORCE}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    dense, packed = (json.loads((tmp_path / "out.json").read_text())[name] for name in names)
    assert packed["tokens"] == dense["tokens"]
    lines = [json.loads(line) for line in Path(f"{tmp_path}/out.json.llama-{form}").read_text().splitlines()]
    kernels = {line["layer"]: line["kernel"] for line in lines}
    assert list(kernels.values()).count("dense") == 1  # the one that is stored dense
    assert set(kernels.values()) == {"dense", choose(torch.float32).kernel}
