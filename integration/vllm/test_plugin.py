"""The vLLM plugin inside vLLM: what it claims, loads, refuses and reports, and whole models against dense.

    pytest integration/vllm/test_plugin.py

in the environment that integration/vllm/serve_demo.py builds, with pytest installed. It starts no server and
needs no GPU and no download: vLLM's linears are built one by one, the kernels of a GPU are played by stand-ins,
and tiny models are served in processes of their own, of which this file is the program too.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}

pytest.importorskip("vllm", reason="without vLLM it is not checked that vLLM serves 2:4 checkpoints")

import torch
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping
from vllm.lora.layers.utils import _get_lora_device
from vllm.lora.punica_wrapper import get_punica_wrapper
from vllm.lora.utils import from_layer
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from msp_plugin.errors import FormatError, ServingError
from msp_plugin.formats.sparse24 import SUFFIXES, pack
from msp_plugin.serving.kernels import Choice, Packed24
from msp_plugin.serving.vllm import linear as plugin
from msp_plugin.serving.vllm import register
from msp_plugin.serving.vllm.config import NAME, Sparse24Config
from msp_plugin.serving.vllm.linear import PackAtLoadMethod, PackedMethod
from msp_plugin.serving.vllm.report import LayerReport, Report

COLUMNS = 64
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Kind:
    """One of vLLM's linears: how it is built, the checkpoint's layers in it and vLLM's names of these shards."""

    def __init__(self, build, prefix, *parts):
        self.build, self.prefix = build, f"model.layers.0.{prefix}"
        parent = self.prefix.rpartition(".")[0]
        self.rows = {f"{parent}.{name}": rows for name, _, rows in parts}
        self.shards = {f"{parent}.{name}": shard for name, shard, _ in parts}

    def __call__(self, config=None, *, dtype=torch.float32, bias=False, **options):
        return self.build(quant_config=config, prefix=self.prefix, params_dtype=dtype, bias=bias, **options)


def column(**options):
    return ColumnParallelLinear(COLUMNS, 96, **options)


def row(**options):
    return RowParallelLinear(COLUMNS, 96, **options)


def replicated(**options):
    return ReplicatedLinear(COLUMNS, 96, **options)


def merged(**options):
    return MergedColumnParallelLinear(COLUMNS, [96, 96], **options)


def qkv(**options):
    return QKVParallelLinear(COLUMNS, 16, 4, 2, **options)


COLUMN = Kind(column, "mlp.fc", ("fc", None, 96))
ROW = Kind(row, "mlp.down_proj", ("down_proj", None, 96))
REPLICATED = Kind(replicated, "mlp.router", ("router", None, 96))
MERGED = Kind(merged, "mlp.gate_up_proj", ("gate_proj", 0, 96), ("up_proj", 1, 96))
QKV = Kind(qkv, "self_attn.qkv_proj", ("q_proj", "q", 64), ("k_proj", "k", 32), ("v_proj", "v", 32))
KINDS = {"column": COLUMN, "row": ROW, "replicated": REPLICATED, "merged": MERGED, "qkv": QKV}
Q, K, V = QKV.rows
GATE, UP = MERGED.rows

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def masked(weight):
    """Return the weight with the two smallest of every four set to zero, none of them negative."""
    groups = weight.reshape(-1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, 1).indices, True)
    return torch.where(kept, groups, 0).reshape(weight.shape)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_of(kind, packed=None, dtype=torch.float32):
    """Return random weights by layer: 2:4 those named, all by default."""
    weights = {
        name: random(rows, COLUMNS, seed=i, dtype=dtype) for i, (name, rows) in enumerate(kind.rows.items())
    }
    return {name: masked(w) if packed is None or name in packed else w for name, w in weights.items()}


def biases_of(kind):
    return {f"{name}.bias": random(rows, seed=9 + i) for i, (name, rows) in enumerate(kind.rows.items())}


def config_for(targets):
    config = Sparse24Config(targets)
    config.packed_modules_mapping = MAPPING
    return config


def tensors_of(name, weight, packed):
    return pack(weight, name).tensors(name) if packed else {f"{name}.weight": weight}


def checkpoint_of(weights, packed):
    return {k: t for name, w in weights.items() for k, t in tensors_of(name, w, name in packed).items()}


def load(layer, kind, tensors):
    """Load a checkpoint's tensors as vLLM's models do."""
    for name, tensor in tensors.items():
        part, _, suffix = name.rpartition(".")
        parameter, shard = getattr(layer, suffix), kind.shards[part]
        parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))
    return layer


def ready(layer):
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def served(kind, tensors, targets, **options):
    return ready(load(kind(config_for(targets), **options), kind, tensors))


def unquantized(kind, weights, **options):
    return ready(load(kind(**options), kind, checkpoint_of(weights, ())))


def weight_in(layer, columns=COLUMNS):
    """Return the weight that a layer multiplies with: its product with the unit matrix, which is exact."""
    return layer.quant_method.apply(layer, torch.eye(columns)).t()


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    with set_current_vllm_config(VllmConfig()):
        rendezvous = tmp_path_factory.mktemp("distributed") / "file"
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    parallel_state.cleanup_dist_env_and_memory()


@pytest.fixture(params=[0, 1], ids=["rank0", "rank1"])
def rank(request, monkeypatch):
    """One process of a tensor parallel group of two, as far as loading goes."""
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=request.param, world_size=2))
    return request.param


class Lines(logging.Handler):
    """What the plugin logs while this is open."""

    def __init__(self):
        super().__init__()
        self.lines, self.logger = [], logging.getLogger("vllm.msp_plugin")

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self.lines

    def __exit__(self, *_):
        self.logger.removeHandler(self)


@pytest.fixture
def log():
    """The lines that the plugin logs; vLLM's loggers do not reach pytest's."""
    with Lines() as lines:
        yield lines


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Return the lines of the report so far."""
    file = tmp_path / "report.jsonl"
    monkeypatch.setenv("MSP_SERVING_REPORT", str(file))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


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


# loading


MIXED = [
    (QKV, (Q, K)),
    (QKV, (V,)),
    (MERGED, (GATE,)),
    (MERGED, (UP,)),
]


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
        "qk",
        "v",
        "gate",
        "up",
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


@pytest.mark.parametrize(("kind", "packed"), MIXED, ids=["qk", "v", "gate", "up"])
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


# dense checkpoints, packed at load time


def test_on_a_cpu_a_dense_checkpoint_stays_dense_and_the_report_says_why(report):
    weights = weights_of(QKV)
    layer = served(QKV, checkpoint_of(weights, ()), None)
    assert torch.equal(weight_in(layer), torch.cat(list(weights.values())))
    size = 128 * COLUMNS * 4
    assert report() == [
        {"layer": QKV.prefix, "packed": [], "kernel": "dense", "reason": "no sparse kernel on cpu", "bytes": size,
         "dense_bytes": size, "rank": 0, "failed": False}
    ]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """Stand-ins for a GPU's kernels: the packed weight is the weight twice over, with its sign changed."""
    calls = []

    def choose(shape, dtype, device):
        return Choice("cusparselt", "played")

    def pack24(weight, kernel, *, found):
        found["packed"] = found.get("packed", 0) + 1
        meta = torch.full((weight.shape[0], 1), 7, dtype=torch.int16)
        return Packed24(kernel, torch.cat([-weight, -weight]), meta, *weight.shape, algorithms=(3, 1, 4))

    def multiply(x, packed, meta, bias, out_features, kernel, algorithms):
        assert bool((meta == 7).all())
        calls.append((kernel, algorithms))
        return torch.nn.functional.linear(x, -packed[:out_features], bias)

    monkeypatch.setattr(plugin.kernels, "choose", choose)
    monkeypatch.setattr(plugin.kernels, "pack", pack24)
    monkeypatch.setattr(plugin.kernels, "self_check", lambda weight, packed: 0.001)
    monkeypatch.setattr(torch.ops.msp_plugin, "sparse24_linear", multiply)
    return calls


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
        "dense because k_proj is not 2:4 and fused with it: model.layers.0.self_attn.qkv_proj (1); "
        "dense because no sparse kernel on cpu: model.layers.0.mlp.down_proj (1)"
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


# whole models


PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [100] * 9]
DENSE_LAYER = "model.layers.0.self_attn.o_proj"
SIZES = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.15,
}


def save_models(directory):
    """Save tiny models with 2:4 weights, but for one layer, in both forms."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    from msp_plugin.checkpoint.export import Sparse24, export_checkpoint

    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
        "phi3": Phi3ForCausalLM(Phi3Config(**SIZES)),
    }
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            if key.endswith("proj.weight") and not key.startswith(DENSE_LAYER):
                parameter.data = masked(parameter.data)
            elif key.endswith("bias"):
                parameter.data.normal_()
        model.float().save_pretrained(directory / name)
        written = export_checkpoint(directory / name, Sparse24(), directory / f"{name}-packed")
        assert set(written.kept_dense) == {DENSE_LAYER}


def save_adapter(directory):
    """Save a LoRA adapter for layers of every kind."""
    sizes = {"self_attn.q_proj": (128, 128), "self_attn.o_proj": (128, 128), "mlp.up_proj": (128, 160)}
    tensors = {}
    for i, (name, (inputs, outputs)) in enumerate(sizes.items()):
        full = f"base_model.model.model.layers.1.{name}"
        tensors[f"{full}.lora_A.weight"] = random(8, inputs, seed=i)
        tensors[f"{full}.lora_B.weight"] = random(outputs, 8, seed=9 + i)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "bias": "none"}
    about["target_modules"] = [name.rpartition(".")[2] for name in sizes]
    (directory / "adapter_config.json").write_text(json.dumps(about))


def without(source, target, lost, *, keep_manifest=True):
    """Copy a checkpoint without one of its tensors."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            del tensors[lost]
            save_file(tensors, target / file.name, metadata={"format": "pt"})
        elif keep_manifest or file.name != "export.json":
            (target / file.name).write_bytes(file.read_bytes())


def serve_all(jobs_file, results_file):
    """Serve one model after the other in this process and write down what they answer."""
    jobs, results = json.loads(Path(jobs_file).read_text()), {}
    for name, job in jobs.items():
        os.environ["MSP_SERVING_REPORT"] = f"{results_file}.{name}"
        with Lines() as lines:
            try:
                results[name] = serve(job)
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["log"] = lines
        gc.collect()
        parallel_state.cleanup_dist_env_and_memory()
        Path(results_file).write_text(json.dumps(results))


def serve(job):
    from vllm import LLM

    llm = LLM(
        job["model"], dtype="float32", enforce_eager=True, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=4,
        skip_tokenizer_init=True, disable_log_stats=True, **job.get("options", {}),
    )  # fmt: skip
    result = generate(llm, job.get("adapter"))
    if job.get("reload"):
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        result["again"] = generate(llm, None)
    return result


def generate(llm, adapter):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    greedy = SamplingParams(temperature=0, max_tokens=16, logprobs=1, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    found = [answer.outputs[0] for answer in llm.generate(prompts, greedy, lora_request=lora, use_tqdm=False)]
    chosen = [
        [step[token].logprob for token, step in zip(f.token_ids, f.logprobs, strict=True)] for f in found
    ]
    return {"tokens": [list(f.token_ids) for f in found], "logprobs": chosen}


def run(jobs, directory, seconds):
    """Serve models in a process of their own; return answers, and the report's lines under ``report``."""
    asked, answered = directory / "jobs.json", directory / "results.json"
    asked.write_text(json.dumps(jobs))
    command = [sys.executable, __file__, str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads(answered.read_text())
    for name, result in results.items():
        file = Path(f"{answered}.{name}")
        result["report"] = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    save_models(directory)
    save_adapter(directory / "adapter")
    packed = directory / "llama-packed"
    without(packed, directory / "no-bitmask", f"{LAYER}.bitmask")
    without(packed, directory / "no-dense", f"{DENSE_LAYER}.weight")
    without(packed, directory / "no-dense-no-manifest", f"{DENSE_LAYER}.weight", keep_manifest=False)
    without(packed, directory / "no-norm", NORM, keep_manifest=False)
    without(directory / "llama", directory / "no-norm-dense", NORM)
    without(directory / "qwen2-packed", directory / "no-bias", BIAS, keep_manifest=False)
    shutil.copytree(packed, directory / "flipped")
    flip_a_bit(directory / "flipped" / "model.safetensors")
    without(directory / "llama", directory / "no-weight", f"{LAYER}.weight")
    return directory


LAYER = "model.layers.1.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"
BIAS = "model.layers.0.self_attn.k_proj.bias"


def flip_a_bit(file):
    """Flip one bit of the last tensor's data."""
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.write_bytes(data)


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory):
    """Serve every model once."""
    lora = {"options": {"enable_lora": True, "max_lora_rank": 8}, "adapter": str(models / "adapter")}
    at_load = {"options": {"quantization": NAME}}
    jobs = {
        "llama": {},
        "llama-packed": {"reload": True},
        "llama-at-load": {"model": "llama", "reload": True, **at_load},
        "llama-lora": {"model": "llama", **lora},
        "llama-packed-lora": {"model": "llama-packed", **lora},
        "qwen2": {},
        "qwen2-packed": {},
        "phi3": {},
        "phi3-packed": {},
        "no-bitmask": {},
        "no-dense": {},
        "no-dense-no-manifest": {},
        "no-weight": {**at_load},
        "no-norm": {},
        "no-norm-dense": {**at_load},
        "no-bias": {},
        "flipped": {},
        "made-up": {"model": "llama-packed", "options": {"load_format": "dummy"}},
    }
    for name, job in jobs.items():
        job["model"] = str(models / job.get("model", name))
        job["options"] = {"distributed_executor_backend": "uni", **job.get("options", {})}
    return run(jobs, tmp_path_factory.mktemp("answers"), 300)


def answer(result):
    assert "error" not in result, result["error"]
    return result["tokens"], result["logprobs"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_a_packed_model_answers_as_the_dense_one_bit_for_bit(answers, name):
    assert answer(answers[f"{name}-packed"]) == answer(answers[name])


def test_the_answers_are_worth_comparing(answers):
    for name in ("llama", "qwen2", "phi3"):
        assert len({token for tokens in answers[name]["tokens"] for token in tokens}) > 8


def test_a_dense_model_is_served_with_the_methods_name(answers):
    assert answer(answers["llama-at-load"]) == answer(answers["llama"])
    found = {line["layer"]: line["reason"] for line in answers["llama-at-load"]["report"]}
    assert found.pop(DENSE_LAYER) == "no sparse kernel on cpu"
    assert set(found.values()) == {"no sparse kernel on cpu"} and len(found) == 7


@pytest.mark.parametrize("name", ["llama-packed", "llama-at-load"])
def test_a_model_answers_the_same_after_its_weights_were_loaded_again(answers, name):
    assert answer(answers[name]["again"]) == answer(answers["llama"])


@pytest.mark.parametrize("name", ["llama-packed", "llama-at-load"])
def test_one_line_is_logged_when_all_layers_are_ready_and_one_when_they_were_loaded_again(answers, name):
    assert [line.partition(";")[0] for line in answers[name]["log"]] == ["sparse24: 8 on dense"] * 2


def test_an_adapter_gives_the_same_answers_on_a_packed_model(answers):
    assert answer(answers["llama-packed-lora"]) == answer(answers["llama-lora"])
    assert answers["llama-lora"]["tokens"] != answers["llama"]["tokens"]


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_a_served_model_reports_every_linear_once(answers, name):
    layers = [line["layer"] for line in answers[f"{name}-packed"]["report"]]
    leaves = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert sorted(layers) == sorted(f"model.layers.{i}.{leaf}" for i in range(2) for leaf in leaves)
    assert len(answers[f"{name}-packed"]["log"]) == 1


def test_a_model_without_the_method_is_not_touched(answers):
    for name in ("llama", "qwen2", "phi3"):
        assert answers[name]["report"] == answers[name]["log"] == []


def test_a_missing_tensor_of_a_packed_layer_is_named_before_anything_is_loaded(answers):
    assert f"there is no {LAYER}.bitmask" in answers["no-bitmask"]["error"]


def test_a_missing_dense_tensor_is_named_by_the_exports_manifest(answers):
    assert f"{DENSE_LAYER}.weight" in answers["no-dense"]["error"]


def test_a_missing_dense_linear_is_named_without_a_manifest_too(answers):
    assert f"{DENSE_LAYER}.weight" in answers["no-dense-no-manifest"]["error"]


def test_a_missing_tensor_of_a_dense_checkpoint_is_named(answers):
    assert f"{LAYER}.weight is not in the checkpoint" in answers["no-weight"]["error"]


@pytest.mark.parametrize("name", ["no-norm", "no-norm-dense"])
def test_a_missing_norm_is_named_as_for_an_unquantized_model(answers, name):
    assert NORM in answers[name]["error"]


def test_the_missing_bias_of_one_shard_is_named(answers):
    assert f"{BIAS} is not in the checkpoint" in answers["no-bias"]["error"]


def test_a_file_with_a_flipped_bit_is_refused(answers):
    assert "model.safetensors has other bytes than were written" in answers["flipped"]["error"]


def test_a_packed_model_runs_with_weights_that_vllm_makes_up(answers):
    assert "error" not in answers["made-up"], answers["made-up"]["error"]


def test_two_tensor_parallel_processes_give_the_same_tokens(answers, models, tmp_path):
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    jobs = {"two": {"model": str(models / "llama-packed"), "options": options}}
    found = run(jobs, tmp_path, 150)["two"]
    assert answer(found)[0] == answers["llama"]["tokens"]
    assert sorted(line["rank"] for line in found["report"]) == [0] * 8 + [1] * 8


def test_the_compile_cache_key_depends_on_the_kernels_of_the_layers(tmp_path):
    def key(kernel):
        config, report = VllmConfig(), Report()
        report.expect("a")
        with set_current_vllm_config(config):
            report.add(LayerReport("a", (), kernel, "", 9, 16, 0))
        return config.compute_hash()

    assert key("cusparselt") == key("cusparselt") != key("dense")


if __name__ == "__main__":
    serve_all(*sys.argv[1:])
