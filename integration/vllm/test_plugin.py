"""The vLLM plugin inside vLLM: what it claims, packs at load time and reports; LoRA.

    pytest integration/vllm

in the environment that integration/vllm/serve_demo.py builds, with pytest installed. It starts no server and
needs no GPU and no download: vLLM's linears are built one by one, the kernels of a GPU are played by stand-ins,
and tiny models are served in processes of their own.
"""

from __future__ import annotations

import importlib.metadata
import os
from types import SimpleNamespace

import pytest
import torch
from linears import (
    COLUMN,
    COLUMNS,
    MERGED,
    QKV,
    ROW,
    K,
    Q,
    biases_of,
    checkpoint_of,
    config_for,
    every_kind,
    load,
    random,
    ready,
    served,
    unquantized,
    weight_in,
    weights_of,
)
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping
from vllm.lora.layers.utils import _get_lora_device
from vllm.lora.punica_wrapper import get_punica_wrapper
from vllm.lora.utils import from_layer
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from msp_plugin.errors import FormatError, ServingError
from msp_plugin.serving.vllm import linear as plugin
from msp_plugin.serving.vllm import register
from msp_plugin.serving.vllm.config import NAME, BitmaskConfig, Sparse24Config, _state_of
from msp_plugin.serving.vllm.linear import PackAtLoadMethod, PackedMethod
from msp_plugin.serving.vllm.report import LayerReport, Report

# registration


def packed_config(**changes):
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": [Q], "ignore": []}
    return {"quant_method": "compressed-tensors", "version": "0.13.0", "sparsity_config": sparsity} | changes


def test_vllm_finds_the_plugin_by_its_entry_point():
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="msp_sparse24")
    assert [point.load() for point in found] == [register]


def test_registering_again_changes_nothing():
    register()
    methods, config = list(QUANTIZATION_METHODS), get_quantization_config(NAME)
    register()
    assert methods == QUANTIZATION_METHODS and methods.count(NAME) == 1
    assert get_quantization_config(NAME) is config is Sparse24Config


@pytest.mark.parametrize("user", [None, NAME])
def test_unquantized_packed_checkpoints_are_claimed(user):
    assert Sparse24Config.override_quantization_method(packed_config(), user) == NAME
    assert Sparse24Config.override_quantization_method(packed_config(config_groups={}), user) == NAME


@pytest.mark.parametrize(
    "theirs",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {}}},
        packed_config(config_groups={"group_0": {"targets": ["Linear"]}}),
        packed_config(quant_method="gptq"),
        packed_config(sparsity_config=None),
        packed_config(sparsity_config={}),
        packed_config(sparsity_config="sparse-24-bitmask"),
        packed_config(sparsity_config={"format": "dense", "targets": []}),
        packed_config(sparsity_config={"format": "sparse-bitmask", "targets": ["Linear"]}),
    ],
)
def test_other_checkpoints_are_not_claimed(theirs):
    assert Sparse24Config.override_quantization_method(theirs, None) is None
    assert Sparse24Config.override_quantization_method(theirs, "compressed-tensors") is None


def test_a_config_that_names_no_layers_one_by_one_is_refused():
    with pytest.raises(FormatError, match="does not name layers one by one"):
        Sparse24Config.from_config(
            packed_config(sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]})
        )


def test_the_config_names_the_packed_layers():
    assert Sparse24Config.from_config(packed_config()).targets == {Q}


# which layers


def test_linears_get_a_method_by_checkpoint_form():
    assert type(QKV(config_for((Q,))).quant_method) is PackedMethod
    assert type(QKV(config_for(())).quant_method) is PackedMethod
    assert type(QKV(config_for(None)).quant_method) is PackAtLoadMethod


def test_embeddings_output_head_and_attention_are_left_to_vllm():
    config = config_for((Q,))
    embedding = VocabParallelEmbedding(128, 64, quant_config=config, prefix="model.embed_tokens")
    head = ParallelLMHead(128, 64, quant_config=config, prefix="lm_head")
    for layer in (embedding, head):
        assert type(layer.quant_method).__module__.startswith("vllm.")
    assert config.get_quant_method(torch.nn.Identity(), "model.layers.0.self_attn.attn") is None


def test_experts_are_left_to_vllm_unless_the_checkpoint_holds_them_packed():
    experts = RoutedExperts.__new__(RoutedExperts)
    inside = "model.layers.0.mlp.experts.0.down_proj"
    assert config_for((Q,)).get_quant_method(experts, "model.layers.0.mlp.experts") is None
    assert config_for(None).get_quant_method(experts, "model.layers.0.mlp.experts") is None
    with pytest.raises(ServingError, match=f"model.layers.0.mlp.experts: .* {inside}"):
        config_for((inside,)).get_quant_method(experts, "model.layers.0.mlp.experts")


def test_a_model_that_fuses_otherwise_is_refused():
    config = config_for((Q,))
    with pytest.raises(
        ServingError, match=r"qkv_proj is made of 2 parts, known are .*q_proj, .*k_proj, .*v_proj"
    ):
        MergedColumnParallelLinear(COLUMNS, [96, 96], bias=False, quant_config=config, prefix=QKV.prefix)


def test_a_part_that_is_not_known_is_refused():
    layer = QKV(config_for((Q,)))
    with pytest.raises(ServingError, match=r"qkv_proj has a part 'index_q'"):
        layer.weight.weight_loader(layer.weight, random(64, COLUMNS), "index_q")


# dense checkpoints, packed at load time


def test_on_a_cpu_a_dense_checkpoint_stays_dense_and_the_report_says_why(report):
    weights = weights_of(QKV)
    layer = served(QKV, checkpoint_of(weights, ()), None)
    assert torch.equal(weight_in(layer), torch.cat(list(weights.values())))
    size = 128 * COLUMNS * 4
    assert report() == [
        {"layer": QKV.prefix, "packed": [], "kernel": "dense", "reason": "MSP_CPU_KERNEL says so", "bytes": size,
         "dense_bytes": size, "rank": 0, "failed": False}
    ]  # fmt: skip


HALF = torch.float16


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("form", ["packed", "dense"])
@every_kind
def test_where_there_is_a_kernel_a_2_4_layer_runs_on_it(gpu, report, kind, form, bias):
    names = tuple(kind.rows)
    weights = weights_of(kind, dtype=HALF)
    targets = names if form == "packed" else None
    biases = biases_of(kind) if bias else {}
    layer = served(kind, checkpoint_of(weights, targets or ()) | biases, targets, dtype=HALF, bias=bias)
    dense = torch.cat(list(weights.values()))
    assert type(layer.weight) is torch.nn.Parameter and torch.equal(layer.weight, torch.cat([-dense, -dense]))
    assert "sparse24_meta" in dict(layer.named_buffers())
    x = random(3, COLUMNS, dtype=HALF)
    assert torch.equal(layer(x)[0], torch.nn.functional.linear(x, dense, layer.bias))
    assert gpu == [("cusparselt", [3, 1, 4])]
    held = 2 * dense.numel() * 2 + len(dense) * 2
    assert report() == [
        {"layer": kind.prefix, "packed": list(names), "kernel": "cusparselt", "reason": "", "bytes": held,
         "dense_bytes": dense.numel() * 2, "rank": 0, "failed": False}
    ]  # fmt: skip


def test_the_layers_of_a_model_share_what_the_search_found(gpu):
    config = config_for(None)
    for kind in (QKV, MERGED):
        ready(load(kind(config, dtype=HALF), kind, checkpoint_of(weights_of(kind, dtype=HALF), ())))
    assert config.algorithms == {"packed": 2}


def assert_dense_because(layer, kind, weights, report, reason, *, failed=False):
    dense = torch.cat(list(weights.values()))
    assert torch.equal(layer.quant_method.apply(layer, torch.eye(COLUMNS, dtype=HALF)).t(), dense)
    assert not hasattr(layer, "sparse24_meta")
    size = dense.numel() * 2
    found = report()
    assert [(line["kernel"], line["bytes"], line["dense_bytes"]) for line in found] == [("dense", size, size)]
    assert reason in found[0]["reason"] and found[0]["failed"] is failed


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize(
    "failure", [RuntimeError("CUDA error: out of memory\nmore"), ServingError("a misfit", hint="x")]
)
def test_a_kernel_that_fails_leaves_the_layer_dense_with_its_first_words(
    gpu, report, monkeypatch, form, failure
):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(plugin.kernels, "pack", fail)
    weights = weights_of(QKV, dtype=HALF)
    targets = tuple(QKV.rows) if form == "packed" else None
    layer = served(QKV, checkpoint_of(weights, targets or ()), targets, dtype=HALF)
    assert_dense_because(
        layer, QKV, weights, report, f"cusparselt failed: {str(failure).splitlines()[0]}", failed=True
    )


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("error", [1.0, float("inf")])
def test_a_kernel_that_is_wrong_leaves_the_layer_dense_and_says_by_how_much(
    gpu, report, monkeypatch, form, error
):
    monkeypatch.setattr(plugin.kernels, "self_check", lambda weight, packed: error)
    weights = weights_of(QKV, dtype=HALF)
    targets = tuple(QKV.rows) if form == "packed" else None
    layer = served(QKV, checkpoint_of(weights, targets or ()), targets, dtype=HALF)
    assert_dense_because(layer, QKV, weights, report, f"cusparselt was wrong by {error:.2g}", failed=True)


def test_a_layer_that_is_not_2_4_stays_dense_beside_a_kernel(gpu, report):
    weights = weights_of(QKV, (Q, K), dtype=HALF)
    layer = served(QKV, checkpoint_of(weights, ()), None, dtype=HALF)
    assert_dense_because(layer, QKV, weights, report, "it is not 2:4")


def test_what_a_packed_checkpoint_holds_dense_stays_dense_beside_a_kernel(gpu, report):
    weights = weights_of(QKV, dtype=HALF)
    layer = served(QKV, checkpoint_of(weights, ()), (), dtype=HALF)
    assert_dense_because(layer, QKV, weights, report, "the checkpoint stores it dense")


def test_parts_in_both_forms_stay_dense_beside_a_kernel(gpu, report):
    weights = weights_of(QKV, dtype=HALF)
    layer = served(QKV, checkpoint_of(weights, (Q, K)), (Q, K), dtype=HALF)
    assert_dense_because(layer, QKV, weights, report, "v_proj is not 2:4 and fused with it")
    assert report()[0]["packed"] == [Q, K]


# the report


def build_two(config):
    """Return two layers of one model with their weights loaded, not ready yet."""
    return [
        load(QKV(config), QKV, checkpoint_of(weights_of(QKV, (Q,)), (Q,))),
        load(ROW(config), ROW, checkpoint_of(weights_of(ROW), ROW.rows)),
    ]


def test_one_line_is_logged_when_the_last_layer_is_ready(log):
    first, second = build_two(config_for((Q, *ROW.rows)))
    ready(first)
    assert not log
    ready(second)
    size = (128 + 96) * COLUMNS * 4
    assert log == [
        f"sparse24: 2 on dense; {size:,} bytes, 1.000 of dense; "
        "dense because MSP_CPU_KERNEL says so: model.layers.0.self_attn.qkv_proj, model.layers.0.mlp.down_proj (2)"
    ]


def test_the_file_gets_one_line_for_each_layer(report):
    for layer in build_two(config_for((Q, *ROW.rows))):
        ready(layer)
    assert [(line["layer"], line["packed"]) for line in report()] == [
        (QKV.prefix, [Q]),
        (ROW.prefix, list(ROW.rows)),
    ]


def test_without_the_variable_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MSP_SERVING_REPORT", raising=False)
    served(COLUMN, checkpoint_of(weights_of(COLUMN), COLUMN.rows), tuple(COLUMN.rows))
    assert not list(tmp_path.iterdir())


# LoRA


def adapted(kind, layer, dtype):
    config = LoRAConfig(max_lora_rank=8, lora_dtype=dtype)
    wrapper = from_layer(layer, 1, config, [name.rpartition(".")[2] for name in kind.rows])
    assert isinstance(wrapper, BaseLayerWithLoRA) and wrapper.base_layer is layer
    punica = get_punica_wrapper(64, 4, torch.device("cpu"), lora_config=config)
    punica.update_metadata(LoRAMapping((0,) * 3, (0,) * 3, is_prefill=True), [None], 1, 128)
    wrapper.set_mapping(punica)
    return wrapper


@every_kind
def test_an_adapter_wraps_a_dense_layer_of_ours(kind):
    weights = weights_of(kind)
    layer = served(kind, checkpoint_of(weights, kind.rows), tuple(kind.rows))
    assert _get_lora_device(layer) == torch.device("cpu")
    x = random(3, COLUMNS)
    assert torch.equal(adapted(kind, layer, torch.float32)(x)[0], unquantized(kind, weights)(x)[0])


@every_kind
def test_an_adapter_wraps_a_layer_on_a_kernel(gpu, kind):
    layer = served(kind, checkpoint_of(weights_of(kind, dtype=HALF), ()), None, dtype=HALF)
    assert _get_lora_device(layer) == layer.weight.device
    x = random(3, COLUMNS, dtype=HALF)
    expected = layer(x)[0]
    assert torch.equal(adapted(kind, layer, HALF)(x)[0], expected) and len(gpu) == 2


def test_the_compile_cache_key_depends_on_the_kernels_of_the_layers(tmp_path):
    def key(kernel):
        config, report = VllmConfig(), Report()
        report.expect("a")
        with set_current_vllm_config(config):
            report.add(LayerReport("a", (), kernel, "", 9, 16, 0))
        return config.compute_hash()

    assert key("cusparselt") == key("cusparselt") != key("dense")


# checkpoints whose tensors vLLM rearranges


def family(model_type, **sizes):
    return SimpleNamespace(model_type=model_type, **sizes)


MANY = {"multi_query": True, "new_decoder_architecture": True}
ONE = {"multi_query": True, "new_decoder_architecture": False}


@pytest.mark.parametrize(("config", "model", "layer"), [
    (Sparse24Config, family("bloom"), "h.0.self_attention.query_key_value"),
    (BitmaskConfig, family("bloom"), "h.0.self_attention.query_key_value"),
    (BitmaskConfig, family("falcon", **MANY), "transformer.h.1.self_attention.query_key_value"),
    (BitmaskConfig, family("gpt2"), "h.0.attn.c_proj"), (Sparse24Config, family("gpt2"), "h.0.mlp.c_fc"),
])  # fmt: skip
def test_packed_layers_that_vllm_rearranges_as_it_loads_them_are_refused_by_name(config, model, layer):
    with pytest.raises(ServingError, match=rf"rearranges .* of {layer} while it loads a {model.model_type}"):
        config((layer,)).maybe_update_config("nowhere", hf_config=model)


@pytest.mark.parametrize(("config", "model", "layer"), [
    (Sparse24Config, family("falcon", **MANY), "transformer.h.1.self_attention.query_key_value"),
    (BitmaskConfig, family("falcon", **ONE), "transformer.h.1.self_attention.query_key_value"),
    (BitmaskConfig, family("bloom"), "h.0.mlp.dense_4h_to_h"), (BitmaskConfig, family("llama"), "model.layers.0.mlp.up_proj"),
    (BitmaskConfig, None, "h.0.attn.c_proj"),
])  # fmt: skip
def test_packed_layers_that_vllm_takes_as_they_are_are_not(config, model, layer):
    config((layer,)).maybe_update_config("nowhere", hf_config=model)


def test_files_that_have_changed_since_they_were_checked_are_checked_again(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    before = _state_of(tmp_path)
    assert _state_of(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"12345670")
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert _state_of(tmp_path) != before
