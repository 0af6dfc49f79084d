"""Loading into vLLM's linears: whole, fused, mixed, cut over processes, and what is missing or damaged."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from linears import (
    COLUMN,
    COLUMNS,
    GATE,
    KINDS,
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
    checkpoint_of,
    config_for,
    every_kind,
    load,
    masked,
    random,
    ready,
    served,
    weight_in,
    weights_of,
)
from vllm.model_executor.layers.linear import (
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from msp_plugin.errors import FormatError, ServingError
from msp_plugin.formats.sparse24 import SUFFIXES, pack
from msp_plugin.serving.vllm.config import Sparse24Config


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        *((kind, tuple(kind.rows)) for kind in KINDS.values()),
        *((kind, ()) for kind in KINDS.values()),
        *MIXED,
    ],
    ids=[
        *(f"{name}-packed" for name in KINDS),
        *(f"{name}-dense" for name in KINDS),
        *MIXED_NAMES,
    ],
)
def test_a_linear_computes_what_vllms_own_does_bit_for_bit(kind, packed, bias):
    weights = weights_of(kind, packed)
    biases = biases_of(kind) if bias else {}
    ours = served(kind, checkpoint_of(weights, packed) | biases, packed, bias=bias)
    theirs = ready(load(kind(bias=bias), kind, checkpoint_of(weights, ()) | biases))
    for tokens in (1, 5, 32):
        x = random(tokens, COLUMNS, seed=tokens)
        assert torch.equal(ours(x)[0], theirs(x)[0])


@every_kind
def test_the_packed_parameters_are_gone_when_the_layer_is_ready(kind):
    layer = served(kind, checkpoint_of(weights_of(kind), kind.rows), tuple(kind.rows))
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_tensors_may_come_in_any_order_and_shards_by_keyword():
    weights = weights_of(QKV, (Q, K))
    layer = QKV(config_for((Q, K)))
    for name, tensor in sorted(checkpoint_of(weights, (Q, K)).items(), reverse=True):
        part, _, suffix = name.rpartition(".")
        parameter = getattr(layer, suffix)
        parameter.weight_loader(parameter, tensor, loaded_shard_id=QKV.shards[part])
    assert torch.equal(weight_in(ready(layer)), torch.cat(list(weights.values())))


@pytest.mark.parametrize("kind", [MERGED, QKV], ids=["merged", "qkv"])
def test_a_checkpoint_may_hold_the_parts_fused(kind):
    weight = torch.cat(list(weights_of(kind).values()))
    config = Sparse24Config((kind.prefix,))
    layer = kind(config)
    for name, tensor in pack(weight).tensors(kind.prefix).items():
        parameter = getattr(layer, name.rpartition(".")[2])
        parameter.weight_loader(parameter, tensor)
    assert torch.equal(weight_in(ready(layer)), weight)


def test_being_called_again_without_new_weights_changes_nothing(report):
    weights = weights_of(COLUMN)
    layer = served(COLUMN, checkpoint_of(weights, COLUMN.rows), tuple(COLUMN.rows))
    assert torch.equal(weight_in(ready(layer)), weights["model.layers.0.mlp.fc"])
    assert len(report()) == 1


def test_vllms_notes_for_reloading_do_not_keep_a_layer_alive():
    layer = QKV(config_for((Q, K)))
    record_metadata_for_reloading(layer)
    there = weakref.ref(layer)
    del layer
    gc.collect()
    assert there() is None


# tensor parallel loading


def halves(weight, rank, dim=0):
    return weight.chunk(2, dim)[rank]


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("kind", [COLUMN, MERGED, QKV], ids=["column", "merged", "qkv"])
def test_each_of_two_processes_holds_its_rows(kind, form, rank):
    weights = weights_of(kind)
    packed = tuple(kind.rows) if form == "packed" else ()
    layer = served(kind, checkpoint_of(weights, packed), packed)
    assert torch.equal(weight_in(layer), torch.cat([halves(w, rank) for w in weights.values()]))


@pytest.mark.parametrize(("kind", "packed"), MIXED, ids=MIXED_NAMES)
def test_each_of_two_processes_holds_its_rows_of_mixed_parts(kind, packed, rank):
    weights = weights_of(kind, packed)
    layer = served(kind, checkpoint_of(weights, packed), packed)
    assert torch.equal(weight_in(layer), torch.cat([halves(w, rank) for w in weights.values()]))


def test_each_of_two_processes_holds_its_columns_of_a_row_parallel_layer(rank):
    weights = weights_of(ROW)
    layer = served(ROW, checkpoint_of(weights, ROW.rows), tuple(ROW.rows))
    assert torch.equal(weight_in(layer, COLUMNS // 2), halves(*weights.values(), rank, dim=1))


@pytest.mark.parametrize("packed", [(Q, K, V), (Q, K), (V,)], ids=["qkv", "qk", "v"])
def test_two_processes_both_hold_the_one_key_and_value_head(packed, rank):
    one_head = Kind(lambda **o: QKVParallelLinear(COLUMNS, 16, 4, 1, **o), "self_attn.qkv_proj",
                    ("q_proj", "q", 64), ("k_proj", "k", 16), ("v_proj", "v", 16))  # fmt: skip
    weights = weights_of(one_head, packed)
    layer = served(one_head, checkpoint_of(weights, packed), packed)
    assert torch.equal(weight_in(layer), torch.cat([halves(weights[Q], rank), weights[K], weights[V]]))


def test_a_fused_checkpoint_is_cut_part_by_part(rank):
    weights = weights_of(QKV)
    layer = QKV(Sparse24Config((QKV.prefix,)))
    for name, tensor in pack(torch.cat(list(weights.values()))).tensors(QKV.prefix).items():
        parameter = getattr(layer, name.rpartition(".")[2])
        parameter.weight_loader(parameter, tensor)
    assert torch.equal(weight_in(ready(layer)), torch.cat([halves(w, rank) for w in weights.values()]))


@pytest.mark.parametrize("options", [{"disable_tp": True}], ids=["disable_tp"])
@pytest.mark.parametrize(
    "kind", [REPLICATED, COLUMN, ROW, MERGED], ids=["replicated", "column", "row", "merged"]
)
def test_layers_that_are_not_cut_are_whole_in_each_process(kind, options, rank):
    weights = weights_of(kind)
    layer = served(kind, checkpoint_of(weights, kind.rows), tuple(kind.rows), **options)
    assert torch.equal(weight_in(layer), torch.cat(list(weights.values())))


def test_a_share_of_columns_that_is_no_multiple_of_8_is_refused(rank):
    with pytest.raises(ServingError, match=r"mlp\.down_proj has 12 input columns .* multiples of 8"):
        RowParallelLinear(24, 96, bias=False, quant_config=config_for(tuple(ROW.rows)), prefix=ROW.prefix)


def test_a_dense_layer_may_be_cut_anywhere(rank):
    layer = RowParallelLinear(24, 96, bias=False, quant_config=config_for(()), prefix=ROW.prefix)
    weight = random(96, 24)
    layer.weight.weight_loader(layer.weight, weight)
    assert torch.equal(weight_in(ready(layer), 12), halves(weight, rank, dim=1))


def test_the_report_says_which_process(rank, report):
    served(COLUMN, checkpoint_of(weights_of(COLUMN), COLUMN.rows), tuple(COLUMN.rows))
    assert [line["rank"] for line in report()] == [rank]


# missing and damaged tensors


MISSING = [
    *((QKV, (Q, K, V), f"{part}.{suffix}") for part in (Q, K, V) for suffix in SUFFIXES),
    *((QKV, (Q, K), f"{part}.{suffix}") for part in (Q, K) for suffix in SUFFIXES),
    (QKV, (Q, K), f"{V}.weight"),
    *((MERGED, (UP,), f"{UP}.{suffix}") for suffix in SUFFIXES),
    (MERGED, (UP,), f"{GATE}.weight"),
    *((ROW, tuple(ROW.rows), f"{name}.{suffix}") for name in ROW.rows for suffix in SUFFIXES),
    *(
        (REPLICATED, tuple(REPLICATED.rows), f"{name}.{suffix}")
        for name in REPLICATED.rows
        for suffix in SUFFIXES
    ),
    *((QKV, (), f"{part}.weight") for part in (Q, K, V)),
    *((QKV, None, f"{part}.weight") for part in (Q, K, V)),
    (COLUMN, None, "model.layers.0.mlp.fc.weight"),
]


@pytest.mark.parametrize(("kind", "targets", "lost"), MISSING)
def test_a_missing_tensor_is_named_with_its_layer(kind, targets, lost):
    tensors = checkpoint_of(weights_of(kind, targets), targets or ())
    del tensors[lost]
    layer = load(kind(config_for(targets)), kind, tensors)
    with pytest.raises(FormatError) as refused:
        ready(layer)
    assert f"{lost} is not in the checkpoint" in str(refused.value) and kind.prefix in str(refused.value)


@pytest.mark.parametrize(("kind", "name"), [(QKV, K), (MERGED, UP), (ROW, "model.layers.0.mlp.down_proj")])
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x37, 0x13])
def test_a_damaged_bitmask_is_refused_by_name(kind, name, byte):
    tensors = checkpoint_of(weights_of(kind), kind.rows)
    tensors[f"{name}.bitmask"][3, 2] = byte
    layer = load(kind(config_for(tuple(kind.rows))), kind, tensors)
    with pytest.raises(FormatError, match=f"{name}: the bitmask does not store two of four"):
        ready(layer)


@pytest.mark.parametrize("said", [[96, 32], [48, 64], [64, 96], [0, 0]])
def test_a_shape_that_disagrees_with_the_values_is_refused_by_name(said):
    tensors = checkpoint_of(weights_of(MERGED), MERGED.rows)
    tensors[f"{UP}.shape"] = torch.tensor(said).reshape(2, 1)
    layer = load(MERGED(config_for((GATE, UP))), MERGED, tensors)
    with pytest.raises(
        FormatError, match=rf"{UP}.shape says \[{said[0]}, {said[1]}\], its values are those of \[96, 64\]"
    ):
        ready(layer)


OTHERS = {
    "fewer_rows": lambda t: t[:-8],
    "fewer_columns": lambda t: t[:, :-1],
    "more_columns": lambda t: torch.cat([t, t[:, :1]], 1),
    "one_dimension": lambda t: t.reshape(-1),
    "three_dimensions": lambda t: t[None],
    "scalar": lambda t: t.reshape(-1)[0],
    "empty": lambda t: t[:0],
}


#: Of a dense weight with more columns vLLM's own loader takes what it needs.
SHAPES = [
    pytest.param(kind, suffix, other, id=f"{name}-{suffix}-{what}")
    for name, kind in KINDS.items()
    for suffix in (*SUFFIXES, "weight")
    for what, other in OTHERS.items()
    if (name, suffix, what) != ("row", "weight", "more_columns")
]


@pytest.mark.parametrize(("kind", "suffix", "other"), SHAPES)
def test_a_tensor_of_another_shape_is_refused_by_name(kind, suffix, other):
    name = list(kind.rows)[-1]
    packed = () if suffix == "weight" else tuple(kind.rows)
    tensors = checkpoint_of(weights_of(kind), packed)
    tensors[f"{name}.{suffix}"] = other(tensors[f"{name}.{suffix}"])
    with pytest.raises(FormatError) as refused:
        ready(load(kind(config_for(packed)), kind, tensors))
    assert name in str(refused.value) and kind.prefix in str(refused.value)


@pytest.mark.parametrize(
    "suffixes", [SUFFIXES, ("compressed", "shape"), ("bitmask",)], ids=["all", "values", "bitmask"]
)
@every_kind
def test_a_layer_with_more_rows_than_vllm_takes_is_refused_by_name(kind, suffixes):
    name, rows = list(kind.rows.items())[-1]
    tensors = checkpoint_of(weights_of(kind), kind.rows)
    longer = pack(masked(random(2 * rows, COLUMNS))).tensors(name)
    tensors |= {f"{name}.{suffix}": longer[f"{name}.{suffix}"] for suffix in suffixes}
    with pytest.raises(FormatError) as refused:
        ready(load(kind(config_for(tuple(kind.rows))), kind, tensors))
    assert name in str(refused.value) and kind.prefix in str(refused.value)


def test_a_row_parallel_layer_with_more_columns_is_refused_by_name(rank):
    name = "model.layers.0.mlp.down_proj"
    tensors = pack(masked(random(96, 2 * COLUMNS))).tensors(name)
    with pytest.raises(FormatError, match=rf"{name} is stored as \[96, 128\]"):
        ready(load(ROW(config_for((name,))), ROW, tensors))
