"""Linears of a checkpoint in the bitmask format: whole, fused, mixed with dense shards, cut over processes, damaged."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import linears
import pytest
import torch
from linears import (
    COLUMN,
    COLUMNS,
    GATE,
    KINDS,
    MAPPING,
    MERGED,
    MIXED,
    MIXED_NAMES,
    QKV,
    REPLICATED,
    ROW,
    UP,
    K,
    Kind,
    Q,
    V,
    biases_of,
    every_kind,
    load,
    random,
    ready,
    unquantized,
    weight_in,
    weights_of,
)
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_processing,
    initialize_layerwise_reload,
)

from msp_plugin.errors import FormatError
from msp_plugin.formats.bitmask import SUFFIXES, SparseBitmask
from msp_plugin.serving.vllm import register
from msp_plugin.serving.vllm.config import BitmaskConfig, Sparse24Config

FORMAT = SparseBitmask()
checkpoint_of = partial(linears.checkpoint_of, format=FORMAT)
stored = partial(linears.tensors_of, format=FORMAT)


def sparse(weights, share=0.6):
    """Return the weights with that share of zeros at random places, so of no pattern."""
    return {
        name: torch.where(random(*w.shape, seed=i).argsort(1) < (1 - share) * w.shape[1], w, 0)
        for i, (name, w) in enumerate(weights.items())
    }


def config_for(targets):
    config = BitmaskConfig(targets)
    config.packed_modules_mapping = MAPPING
    return config


def served(kind, tensors, targets, **options):
    return ready(load(kind(config_for(targets), **options), kind, tensors))


def halves(weight, rank, dim=0):
    return weight.chunk(2, dim)[rank]


def test_vllm_asks_for_it_by_its_own_name_and_each_config_claims_its_own_format():
    register()
    assert get_quantization_config("bitmask") is BitmaskConfig
    about = FORMAT.config([Q], [])
    assert BitmaskConfig.override_quantization_method(about, None) == "bitmask"
    assert Sparse24Config.override_quantization_method(about, None) is None
    assert BitmaskConfig.from_config(about).targets == {Q}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        *((kind, tuple(kind.rows)) for kind in KINDS.values()),
        *((kind, ()) for kind in KINDS.values()),
        *MIXED,
    ],
    ids=[*(f"{name}-packed" for name in KINDS), *(f"{name}-dense" for name in KINDS), *MIXED_NAMES],
)
def test_a_linear_computes_what_vllms_own_does_bit_for_bit(kind, packed, bias):
    weights = sparse(weights_of(kind, ()))
    biases = biases_of(kind) if bias else {}
    layer = served(kind, checkpoint_of(weights, packed) | biases, packed, bias=bias)
    theirs = ready(load(kind(bias=bias), kind, checkpoint_of(weights, ()) | biases))
    assert {name for name, _ in layer.named_parameters()} == {"weight", *(["bias"] if bias else [])}
    for tokens in (1, 5, 32):
        x = random(tokens, COLUMNS, seed=tokens)
        assert torch.equal(layer(x)[0], theirs(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_served_in_the_type_that_is_asked_for(dtype):
    weights = sparse(weights_of(MERGED, ()))
    layer = served(MERGED, checkpoint_of(weights, MERGED.rows), tuple(MERGED.rows), dtype=dtype)
    assert torch.equal(layer.weight, unquantized(MERGED, weights, dtype=dtype).weight)


def test_tensors_may_come_in_any_order_and_a_width_need_be_no_multiple_of_eight():
    weights = {name: w[:, :61] for name, w in sparse(weights_of(QKV, ())).items()}
    narrow = Kind(lambda **o: QKVParallelLinear(61, 16, 4, 2, **o), "self_attn.qkv_proj",
                  ("q_proj", "q", 64), ("k_proj", "k", 32), ("v_proj", "v", 32))  # fmt: skip
    layer = narrow(config_for((Q, K)))
    for name, tensor in sorted(checkpoint_of(weights, (Q, K)).items(), reverse=True):
        part, _, suffix = name.rpartition(".")
        parameter = getattr(layer, suffix)
        parameter.weight_loader(parameter, tensor, loaded_shard_id=QKV.shards[part])
    assert torch.equal(weight_in(ready(layer), 61), torch.cat(list(weights.values())))


def test_what_was_loaded_is_in_memory_of_its_own():
    weights = sparse(weights_of(COLUMN, ()))
    tensors = checkpoint_of(weights, COLUMN.rows)
    layer = load(COLUMN(config_for(tuple(COLUMN.rows))), COLUMN, tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(weight_in(ready(layer)), *weights.values())


@pytest.mark.parametrize("kind", [MERGED, QKV], ids=["merged", "qkv"])
def test_a_checkpoint_may_hold_the_parts_fused(kind, rank):
    weights = sparse(weights_of(kind, ()))
    layer = kind(BitmaskConfig((kind.prefix,)))
    for name, tensor in stored(kind.prefix, torch.cat(list(weights.values()))).items():
        parameter = getattr(layer, name.rpartition(".")[2])
        parameter.weight_loader(parameter, tensor)
    assert torch.equal(weight_in(ready(layer)), torch.cat([halves(w, rank) for w in weights.values()]))


@pytest.mark.parametrize(
    ("kind", "packed"),
    [*((kind, tuple(kind.rows)) for kind in (COLUMN, MERGED, QKV)), *MIXED],
    ids=["column", "merged", "qkv", *MIXED_NAMES],
)
def test_each_of_two_processes_holds_its_rows(kind, packed, rank):
    weights = sparse(weights_of(kind, ()))
    layer = served(kind, checkpoint_of(weights, packed), packed)
    assert torch.equal(weight_in(layer), torch.cat([halves(w, rank) for w in weights.values()]))


def test_each_of_two_processes_holds_its_columns_cut_anywhere(rank):
    weight, name = *sparse({"w": random(96, 24)}).values(), *ROW.rows
    layer = RowParallelLinear(24, 96, bias=False, quant_config=config_for((name,)), prefix=ROW.prefix)
    load(layer, ROW, stored(name, weight))
    assert torch.equal(weight_in(ready(layer), 12), halves(weight, rank, dim=1))


@pytest.mark.parametrize("packed", [(Q, K, V), (Q, K), (V,)], ids=["qkv", "qk", "v"])
def test_two_processes_both_hold_the_one_key_and_value_head(packed, rank):
    one_head = Kind(lambda **o: QKVParallelLinear(COLUMNS, 16, 4, 1, **o), "self_attn.qkv_proj",
                    ("q_proj", "q", 64), ("k_proj", "k", 16), ("v_proj", "v", 16))  # fmt: skip
    weights = sparse(weights_of(one_head, ()))
    layer = served(one_head, checkpoint_of(weights, packed), packed)
    assert torch.equal(weight_in(layer), torch.cat([halves(weights[Q], rank), weights[K], weights[V]]))


@pytest.mark.parametrize(
    "kind", [REPLICATED, COLUMN, ROW, MERGED], ids=["replicated", "column", "row", "merged"]
)
def test_layers_that_are_not_cut_are_whole_in_each_process(kind, rank):
    weights = sparse(weights_of(kind, ()))
    layer = served(kind, checkpoint_of(weights, kind.rows), tuple(kind.rows), disable_tp=True)
    assert torch.equal(weight_in(layer), torch.cat(list(weights.values())))


# called again, reloaded, reported


def test_being_called_again_without_new_weights_changes_nothing(report):
    weights = sparse(weights_of(COLUMN, ()))
    layer = served(COLUMN, checkpoint_of(weights, COLUMN.rows), tuple(COLUMN.rows))
    assert torch.equal(weight_in(ready(layer)), *weights.values())
    assert len(report()) == 1


@pytest.mark.parametrize(("kind", "packed"), [(QKV, (Q, K, V)), *MIXED], ids=["qkv", *MIXED_NAMES])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_other_weights_can_be_loaded_later(kind, packed, bias):
    first, second = sparse(weights_of(kind, ())), sparse(weights_of(kind, ()), 0.3)
    biases = biases_of(kind) if bias else {}
    layer = kind(config_for(packed), bias=bias)
    record_metadata_for_reloading(layer)
    ready(load(layer, kind, checkpoint_of(first, packed) | biases))
    initialize_layerwise_reload(layer)
    load(layer, kind, checkpoint_of(second, packed) | biases)
    finalize_layerwise_processing(layer, None)
    product = layer(torch.eye(COLUMNS))[0] - (layer.bias if bias else 0)
    assert torch.allclose(product.t(), torch.cat(list(second.values())), atol=1e-6)


def test_vllms_notes_for_reloading_do_not_keep_a_layer_alive():
    layer = QKV(config_for((Q, K)))
    record_metadata_for_reloading(layer)
    there = weakref.ref(layer)
    del layer
    gc.collect()
    assert there() is None


def test_the_report_says_what_was_packed_and_why_it_is_dense(report, log):
    weights = sparse(weights_of(QKV, ()))
    served(QKV, checkpoint_of(weights, (Q, K)), (Q, K))
    size = 128 * COLUMNS * 4
    assert [(line["packed"], line["kernel"], line["bytes"]) for line in report()] == [([Q, K], "dense", size)]
    assert log[0].startswith(
        f"bitmask: 1 on dense; {size:,} bytes, 1.000 of dense; dense because MSP_CPU_KERNEL says so"
    )


@every_kind
def test_where_there_is_a_kernel_a_2_4_layer_runs_on_it(gpu, report, kind):
    weights = weights_of(kind, dtype=torch.float16)
    served(kind, checkpoint_of(weights, kind.rows), tuple(kind.rows), dtype=torch.float16)
    assert [(line["kernel"], line["packed"]) for line in report()] == [("cusparselt", list(kind.rows))]


def test_where_there_is_a_kernel_a_layer_of_another_level_stays_dense(gpu, report):
    weights = sparse(weights_of(QKV, (), dtype=torch.float16))
    served(QKV, checkpoint_of(weights, QKV.rows), tuple(QKV.rows), dtype=torch.float16)
    assert [(line["kernel"], line["reason"]) for line in report()] == [("dense", "it is not 2:4")]


# missing and damaged tensors


MISSING = [
    *((QKV, packed, f"{part}.{suffix}") for packed in ((Q, K, V), (Q, K)) for part in packed for suffix in SUFFIXES),
    (QKV, (Q, K), f"{V}.weight"),
    *((MERGED, (UP,), f"{UP}.{suffix}") for suffix in SUFFIXES),
    (MERGED, (UP,), f"{GATE}.weight"),
    *((ROW, tuple(ROW.rows), f"{name}.{suffix}") for name in ROW.rows for suffix in SUFFIXES),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "targets", "lost"), MISSING)
def test_a_missing_tensor_is_named_with_its_layer(kind, targets, lost):
    tensors = checkpoint_of(sparse(weights_of(kind, ())), targets)
    del tensors[lost]
    layer = load(kind(config_for(targets)), kind, tensors)
    with pytest.raises(FormatError) as refused:
        ready(layer)
    assert f"{lost} is not in the checkpoint" in str(refused.value) and kind.prefix in str(refused.value)


OTHERS = {
    "fewer": lambda t: t[:-1],
    "more": lambda t: torch.cat([t, t[-1:]]),
    "one_more_dimension": lambda t: t[None],
    "scalar": lambda t: t.reshape(-1)[0],
    "empty": lambda t: t[:0],
    "another_type": lambda t: t.to(torch.int16) if t.dtype != torch.float32 else t.to(torch.complex64),
    "other_numbers": lambda t: t + 1,
}
#: Other values are other weights.
DAMAGED = [(s, o) for s in SUFFIXES for o in OTHERS if (s, o) != ("compressed", "other_numbers")]


@pytest.mark.parametrize(("suffix", "other"), [d for d in DAMAGED if d != ("shape", "one_more_dimension")])
@pytest.mark.parametrize(
    ("kind", "name"), [(QKV, K), (MERGED, UP), (ROW, *ROW.rows)], ids=["qkv", "merged", "row"]
)
def test_a_damaged_tensor_is_refused_by_name(kind, name, suffix, other):
    tensors = checkpoint_of(sparse(weights_of(kind, ())), kind.rows)
    tensors[f"{name}.{suffix}"] = OTHERS[other](tensors[f"{name}.{suffix}"])
    layer = load(kind(config_for(tuple(kind.rows))), kind, tensors)
    with pytest.raises(FormatError, match=name):
        ready(layer)


@every_kind
def test_a_layer_with_more_rows_than_vllm_takes_is_refused_by_name(kind):
    name, rows = list(kind.rows.items())[-1]
    tensors = checkpoint_of(sparse(weights_of(kind, ())), kind.rows)
    tensors |= stored(name, *sparse({"w": random(2 * rows, COLUMNS)}).values())
    with pytest.raises(FormatError) as refused:
        ready(load(kind(config_for(tuple(kind.rows))), kind, tensors))
    assert f"{name} is stored as [{2 * rows}, {COLUMNS}]" in str(refused.value)
    assert kind.prefix in str(refused.value)


def test_a_row_parallel_layer_with_more_columns_is_refused_by_name(rank):
    (name,) = ROW.rows
    tensors = stored(name, *sparse({"w": random(96, 2 * COLUMNS)}).values())
    with pytest.raises(FormatError, match=rf"{name} is stored as \[96, 128\]"):
        ready(load(ROW(config_for((name,))), ROW, tensors))
