"""vLLM's linears for the tests beside this file: how they are built, loaded and made ready."""

from __future__ import annotations

import logging

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from msp_plugin.formats.sparse24 import Sparse24Bitmask
from msp_plugin.serving.vllm.config import Sparse24Config

SPARSE24 = Sparse24Bitmask()

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
#: Fused linears of which some shards are packed, and some dense.
MIXED = [(QKV, (Q, K)), (QKV, (V,)), (MERGED, (GATE,)), (MERGED, (UP,))]
MIXED_NAMES = ["qk", "v", "gate", "up"]

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


def tensors_of(name, weight, packed=True, format=SPARSE24):
    """Return a layer's tensors by name."""
    if not packed:
        return {f"{name}.weight": weight}
    return {f"{name}.{suffix}": tensor for suffix, tensor in format.pack(weight, name).items()}


def checkpoint_of(weights, packed, format=SPARSE24):
    """Return the tensors of a checkpoint by name, those weights packed that are named."""
    layers = (tensors_of(name, weight, name in packed, format) for name, weight in weights.items())
    return {name: tensor for layer in layers for name, tensor in layer.items()}


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
