"""Linears of a checkpoint with values in int8: fused, mixed with dense shards, cut over processes, reloaded, whole models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import linears
import pytest
import tiny_models
import torch
from linears import (
    COLUMN,
    COLUMNS,
    MAPPING,
    MERGED,
    MIXED,
    MIXED_NAMES,
    QKV,
    ROW,
    K,
    Q,
    every_kind,
    load,
    random,
    ready,
    weights_of,
)
from tiny_models import save_models
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_processing,
    initialize_layerwise_reload,
)

from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.packed_export import Bitmask
from msp_plugin.errors import FormatError
from msp_plugin.formats.bitmask_int8 import SUFFIXES, Int8Bitmask
from msp_plugin.serving.cpu.build import load_operator
from msp_plugin.serving.cpu.kernel import FORCE, choose
from msp_plugin.serving.vllm import register
from msp_plugin.serving.vllm.config import BitmaskConfig, Int8BitmaskConfig

FORMAT = Int8Bitmask()
checkpoint_of = partial(linears.checkpoint_of, format=FORMAT)
stored = partial(linears.tensors_of, format=FORMAT)
reason = load_operator()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no kernels here: {reason}")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.delenv(FORCE, raising=False)


def scaled(kind, dtype=torch.float32):
    """Return random 2:4 weights whose rows have magnitudes of their own, so that each scale counts."""
    return {
        name: (w * 2.0 ** torch.arange(len(w))[:, None].remainder(7)).to(dtype)
        for name, w in weights_of(kind).items()
    }


def meant(weights, packed, dtype=torch.float32):
    """Return the weights that a checkpoint stands for, in a model's dtype."""
    return {
        name: dequantized(w, name, dtype) if name in packed else w.to(dtype) for name, w in weights.items()
    }


def dequantized(weight, name, dtype):
    tensors = FORMAT.pack(weight, name)
    return FORMAT.unpack({**tensors, "scale": tensors["scale"].to(dtype)}, name)


def built(kind, targets, **options):
    config = Int8BitmaskConfig(targets)
    config.packed_modules_mapping = MAPPING
    return kind(config, **options)


def served(kind, tensors, targets, **options):
    return ready(load(built(kind, targets, **options), kind, tensors))


def assert_product(layer, weight, dtype=torch.float32):
    columns = weight.shape[1]
    for tokens in (1, 3, 20):
        x = random(tokens, columns, dtype=dtype)
        out, expected = layer.quant_method.apply(layer, x).double(), x.double() @ weight.double().T
        each_row = (x.double().abs() @ weight.double().abs().T).amax(0).clamp(min=1e-30)
        assert float(((out - expected).abs() / each_row).max()) < (1e-5 if dtype == torch.float32 else 2**-7)


def test_vllm_asks_for_it_by_its_own_name_and_it_claims_its_own_format():
    register()
    assert get_quantization_config("bitmask_int8") is Int8BitmaskConfig
    about = FORMAT.config([Q], [])
    assert Int8BitmaskConfig.override_quantization_method(about, None) == "bitmask_int8"
    assert BitmaskConfig.override_quantization_method(about, None) is None


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_all_rows_of_a_fused_linear_stay_in_int8_with_their_own_scales(kind, dtype, report):
    weights = scaled(kind, torch.bfloat16)
    layer = served(kind, checkpoint_of(weights, weights), tuple(weights), dtype=dtype)
    assert (layer.weight.dtype, layer.msp_scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(
        layer.msp_scale, torch.cat([FORMAT.pack(w, "w")["scale"] for w in weights.values()]).float()
    )
    assert_product(layer, torch.cat(list(meant(weights, weights).values())), dtype)
    (line,) = report()
    rows = sum(kind.rows.values())
    assert (line["kernel"], line["packed"]) == (choose(dtype).kernel, list(weights))
    assert line["bytes"] == layer.weight.numel() + rows * (COLUMNS // 8 + 8 + 4)


@pytest.mark.parametrize(("kind", "packed"), MIXED, ids=MIXED_NAMES)
def test_beside_a_dense_shard_it_is_served_in_the_models_type(kind, packed):
    weights = scaled(kind)
    layer = served(kind, checkpoint_of(weights, packed), packed)
    assert layer.weight.dtype == torch.float32 and layer.msp_scale is None
    assert_product(layer, torch.cat(list(meant(weights, packed).values())))


@pytest.mark.parametrize("kind", [COLUMN, MERGED, QKV], ids=["column", "merged", "qkv"])
def test_each_of_two_processes_holds_its_rows_and_their_scales(kind, rank):
    weights = scaled(kind)
    layer = served(kind, checkpoint_of(weights, weights), tuple(weights))
    assert layer.weight.dtype == torch.int8
    assert_product(layer, torch.cat([w.chunk(2)[rank] for w in meant(weights, weights).values()]))


def test_each_of_two_processes_holds_its_columns_and_all_scales(rank):
    weights = scaled(ROW)
    layer = served(ROW, checkpoint_of(weights, weights), tuple(weights))
    (weight,) = meant(weights, weights).values()
    assert layer.weight.dtype == torch.int8 and len(layer.msp_scale) == 96
    assert_product(layer, weight.chunk(2, dim=1)[rank])


def test_a_checkpoint_may_hold_the_parts_fused(rank):
    weights = scaled(QKV)
    layer = QKV(Int8BitmaskConfig((QKV.prefix,)))
    for name, tensor in stored(QKV.prefix, torch.cat(list(weights.values()))).items():
        parameter = getattr(layer, name.rpartition(".")[2])
        parameter.weight_loader(parameter, tensor)
    assert_product(ready(layer), torch.cat([w.chunk(2)[rank] for w in meant(weights, weights).values()]))


def test_where_there_is_no_kernel_it_is_dense(monkeypatch, report):
    monkeypatch.setenv(FORCE, "dense")
    weights = scaled(MERGED, torch.bfloat16)
    layer = served(MERGED, checkpoint_of(weights, weights), tuple(weights), dtype=torch.bfloat16)
    assert_product(layer, torch.cat(list(meant(weights, weights, torch.bfloat16).values())), torch.bfloat16)
    assert report()[0]["kernel"] == "dense"


def test_other_weights_can_be_loaded_later():
    first = scaled(QKV)
    second = {name: w.flip(0) * 3 for name, w in first.items()}
    layer = built(QKV, tuple(first))
    record_metadata_for_reloading(layer)
    ready(load(layer, QKV, checkpoint_of(first, first)))
    initialize_layerwise_reload(layer)
    load(layer, QKV, checkpoint_of(second, second))
    finalize_layerwise_processing(layer, None)
    assert_product(layer, torch.cat(list(meant(second, second).values())))


@pytest.mark.parametrize("lost", [f"{part}.{suffix}" for part in (Q, K) for suffix in SUFFIXES])
def test_a_missing_tensor_is_named_with_its_layer(lost):
    weights = scaled(QKV)
    tensors = checkpoint_of(weights, weights)
    del tensors[lost]
    with pytest.raises(FormatError, match=f"{lost} is not in the checkpoint"):
        ready(load(built(QKV, tuple(weights)), QKV, tensors))


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("scale", lambda t: -t),
        ("scale", lambda t: t[:-1]),
        ("scale", lambda t: t.double()),
        ("scale", lambda t: t * torch.nan),
        ("compressed", lambda t: t.float()),
        ("compressed", torch.zeros_like),
        ("compressed", lambda t: t[:-1]),
        ("row_offsets", lambda t: t + 1),
        ("bitmask", lambda t: t ^ 1),
    ],
)
def test_a_damaged_tensor_is_refused_by_name(suffix, change):
    weights = scaled(QKV)
    tensors = checkpoint_of(weights, weights)
    tensors[f"{K}.{suffix}"] = change(tensors[f"{K}.{suffix}"])
    layer = load(built(QKV, tuple(weights)), QKV, tensors)
    with pytest.raises(FormatError, match=K):
        ready(layer)


def test_whole_models_give_the_tokens_of_their_dense_forms_also_after_a_reload(tmp_path):
    save_models(tmp_path)
    jobs = {}
    for name in ("llama", "qwen2", "phi3"):
        export_checkpoint(tmp_path / name, Bitmask(values="int8"), tmp_path / f"{name}-int8")
        export_checkpoint(tmp_path / f"{name}-int8", Dense(), tmp_path / f"{name}-dense")
        jobs[f"{name}-int8"] = {"reload": name == "llama"}
        jobs[f"{name}-dense"] = {}
    jobs["made-up"] = {"model": "llama-int8", "options": {"load_format": "dummy"}}
    for name, job in jobs.items():
        job["model"] = str(tmp_path / job.get("model", name))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, tiny_models.__file__, str(tmp_path / "jobs.json"), str(tmp_path / "out.json")]
    environment = {name: value for name, value in os.environ.items() if name != FORCE}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads((tmp_path / "out.json").read_text())
    assert not [answer["error"] for answer in answers.values() if "error" in answer]
    for name in ("llama", "qwen2", "phi3"):
        assert answers[f"{name}-int8"]["tokens"] == answers[f"{name}-dense"]["tokens"]
        lines = Path(f"{tmp_path}/out.json.{name}-int8").read_text().splitlines()
        assert {json.loads(line)["kernel"] for line in lines} == {choose(torch.float32).kernel}
        assert all(json.loads(line)["bytes"] < 0.35 * json.loads(line)["dense_bytes"] for line in lines)
    assert answers["llama-int8"]["again"]["tokens"] == answers["llama-int8"]["tokens"]
