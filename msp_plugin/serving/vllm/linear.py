"""vLLM's linears with 2:4 weights.

Shape legend, for one process of a tensor parallel group: O output rows of all fused shards, I input columns.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter

from msp_plugin.errors import FormatError, MSPError, ServingError
from msp_plugin.formats.sparse24 import SUFFIXES, Packed, is_packable, unpack
from msp_plugin.serving import kernels
from msp_plugin.serving.vllm.report import LayerReport, Report

#: vLLM's names of the shards of a fused attention projection, by position.
_ATTENTION = {"q": 0, "k": 1, "v": 2}


class Sparse24LinearMethod(LinearMethodBase):
    """A linear that runs on a 2:4 kernel where there is one, dense elsewhere.

    Args:
        report: what is told how the layer is served.
        algorithms: of the kernels, found so far; shared by the layers of a model.
        prefix: vLLM's name of the layer.
        shards: the checkpoint's names of the layers fused into it.
        packed: for each shard, whether the checkpoint holds it packed.
    """

    def __init__(
        self,
        report: Report,
        algorithms: kernels.Found,
        prefix: str,
        shards: tuple[str, ...],
        packed: tuple[bool, ...],
    ):
        self.report, self.algorithms, self.prefix = report, algorithms, prefix
        self.shards, self.packed = shards, packed
        self._dense = UnquantizedLinearMethod()
        self._ours: set[Callable[..., None]] = set()
        self._loaded: dict[str, set[int]] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create ``weight`` if a shard is dense, ``compressed``, ``bitmask`` and ``shape`` if one is packed."""
        loader = extra_weight_attrs.pop("weight_loader")
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        layer.sparse24_rows, layer.sparse24_columns = list(output_partition_sizes), input_size
        if len(self.shards) == 1:  # several parts of one name: the checkpoint holds them fused
            self.shards, self.packed = (
                group * len(output_partition_sizes) for group in (self.shards, self.packed)
            )
        if len(output_partition_sizes) != len(self.shards):
            raise ServingError(
                f"{self.prefix} is made of {len(output_partition_sizes)} parts, known are {', '.join(self.shards)}",
                hint="this model class is fused in a way that msp_plugin does not know",
            )
        if not all(self.packed):
            self._dense.create_weights(
                layer, columns, output_partition_sizes, input_size, output_size, params_dtype,
                weight_loader=self._counted(layer, "weight", loader), **extra_weight_attrs,
            )  # fmt: skip
        if getattr(layer, "has_bias", False):  # the bias is created after this, with the loader that it finds
            layer.weight_loader = self._counted(layer, "bias", layer.weight_loader)
        if not any(self.packed):
            return
        if columns % 8:
            raise ServingError(
                f"{self.prefix} has {columns} input columns in each process; a packed weight is cut at multiples of 8",
                hint="use a smaller tensor parallel size"
                if columns < input_size
                else "export the model to dense, and serve that with quantization sparse24",
            )
        sizes = {"compressed": (columns // 2, params_dtype), "bitmask": (columns // 8, torch.uint8)}
        for suffix, (width, dtype) in sizes.items():
            parameter = ModelWeightParameter(
                data=torch.empty(rows, width, dtype=dtype), input_dim=1, output_dim=0,
                weight_loader=self._counted(layer, suffix, loader),
            )  # fmt: skip
            layer.register_parameter(suffix, parameter)
        shape = BasevLLMParameter(
            data=torch.zeros(2, 1, dtype=torch.int64), weight_loader=self._counted(layer, "shape", loader)
        )
        # A reload ends when as many values came as there are: each shard writes its shape over the last one's.
        shape.weight_loader_numel = 2 * len({n for n, p in zip(self.shards, self.packed, strict=True) if p})
        layer.register_parameter("shape", shape)

    def _counted(self, layer: torch.nn.Module, suffix: str, loader: MethodType) -> MethodType:
        """Return the layer's loader with our bookkeeping, as a method of the layer like the loader itself.

        vLLM keeps copies of parameters for reloads and unbinds the methods in them; a function that held the layer
        would keep it alive for ever.
        """
        unbound = loader.__func__

        def load(
            layer: torch.nn.Module,
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            loaded_shard_id: Any = None,
        ) -> None:
            self._load(suffix, MethodType(unbound, layer), param, loaded_weight, loaded_shard_id)

        self._ours.add(load)
        return MethodType(load, layer)

    def _load(
        self,
        suffix: str,
        loader: Callable[..., None],
        param: torch.nn.Parameter,
        loaded: torch.Tensor,
        shard: Any,
    ) -> None:
        """Load one tensor of the checkpoint into its place, and note that it came."""
        indices = self._indices(shard)
        parts = tuple(dict.fromkeys(self.shards[i] for i in indices))
        names = ", ".join(parts)
        try:
            loader(param, loaded, shard) if shard is not None else loader(param, loaded)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            raise FormatError(
                f"{names}.{suffix} {list(loaded.shape)} does not fit into {self.prefix}.{suffix} "
                f"{list(param.shape)}: {error or 'other shape'}",
                hint="the file is damaged, or config.json is from another model",
            ) from error
        self._loaded.setdefault(suffix, set()).update(indices)
        if len(parts) == 1:
            said = tuple(loaded.reshape(-1).tolist()) if suffix == "shape" else tuple(loaded.shape)
            self._shapes.setdefault(parts[0], {})[suffix] = said

    def _indices(self, shard: Any) -> tuple[int, ...]:
        """Return the positions of the shards that one tensor of the checkpoint holds; all if it is fused there."""
        if shard is None:
            return tuple(range(len(self.shards)))
        if isinstance(shard, tuple):
            return shard
        if isinstance(shard, str) and shard not in _ATTENTION:
            raise ServingError(
                f"{self.prefix} has a part {shard!r}, known are {', '.join(_ATTENTION)}",
                hint="this model class is fused in a way that msp_plugin does not know",
            )
        return (_ATTENTION[shard] if isinstance(shard, str) else shard,)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Bring the loaded weight into the form that it is served in.

        Raises:
            FormatError: a shard never came, or is damaged.
        """
        if hasattr(layer, "sparse24_kernel") and not self._loaded:  # called again, nothing was loaded since
            return
        if not _is_dummy():
            self._check_loaded(layer)
        self._loaded, self._shapes = {}, {}
        weight = self._weight(layer)
        choice, served = self._choose(weight), None
        wanted = choice.kernel
        if wanted != "dense":
            served, choice = self._pack(weight, choice)
        layer.sparse24_kernel = choice.kernel
        if served is None:
            if any(self.packed):  # else vLLM's own parameter stays, which it can load into again
                layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
            held = weight.numel() * weight.element_size()
        else:
            # Under the name `weight`, because LoRA looks there for the layer's device.
            layer.register_parameter("weight", torch.nn.Parameter(served.packed, requires_grad=False))
            # Persistent, because a reload leaves other buffers as they were.
            layer.register_buffer("sparse24_meta", served.meta)
            layer.sparse24_algorithms = list(served.algorithms)
            layer.sparse24_out = served.out_features
            held = served.bytes
        packed = [n for n, p in zip(self.shards, self.packed, strict=True) if p or served is not None]
        self.report.add(
            LayerReport(
                self.prefix, tuple(dict.fromkeys(packed)), choice.kernel, choice.reason if choice.kernel == "dense" else "", held,
                weight.numel() * weight.element_size(), get_tensor_model_parallel_rank(), choice.kernel != wanted,
            )
        )  # fmt: skip
        if served is None:
            self._dense.process_weights_after_loading(layer)

    def _check_loaded(self, layer: torch.nn.Module) -> None:
        """Raise unless every tensor of every shard came, in shapes that agree."""
        bias = ("bias",) if getattr(layer, "bias", None) is not None else ()
        for index, (name, packed) in enumerate(zip(self.shards, self.packed, strict=True)):
            for suffix in (*(SUFFIXES if packed else ("weight",)), *bias):
                if not self._replaced(layer, suffix) and index not in self._loaded.get(suffix, ()):
                    raise FormatError(
                        f"{name}.{suffix} is not in the checkpoint (part of {self.prefix})",
                        hint="a file is missing or damaged: export or download it anew",
                    )
        for name, shapes in self._shapes.items():
            if SUFFIXES[0] in shapes:
                self._check_shapes(layer, name, *(shapes[suffix] for suffix in SUFFIXES))

    def _replaced(self, layer: torch.nn.Module, suffix: str) -> bool:
        """Return True if the model class put a loader of its own in the place of ours; we cannot count with it."""
        loader = getattr(getattr(layer, suffix, None), "weight_loader", None)
        return getattr(loader, "__func__", None) not in self._ours

    def _check_shapes(
        self, layer: torch.nn.Module, name: str, compressed: tuple[int, ...], bitmask: tuple[int, ...],
        shape: tuple[int, ...],
    ) -> None:  # fmt: skip
        """Raise unless the shapes of a packed layer's tensors agree with each other and with vLLM's layer.

        vLLM's loaders take what they need of a tensor that has more rows, and say nothing.
        """
        rows, columns = compressed[0], 2 * compressed[1]
        if shape != (rows, columns):
            raise FormatError(
                f"{name}.shape says {list(shape)}, its values are those of [{rows}, {columns}]",
                hint="the file is damaged: export or download it anew",
            )
        parts = [r for r, n in zip(layer.sparse24_rows, self.shards, strict=True) if n == name]
        here, tp = sum(parts), getattr(layer, "tp_size", 1)
        # Each process holds one of so many shares: tp, or fewer where key and value heads are replicated.
        shares, rest = divmod(rows, here)
        whole = len(parts) > 1 or (rest == 0 and shares > 0 and tp % shares == 0)
        if not whole or columns != layer.sparse24_columns or bitmask != (rows, columns // 8):
            raise FormatError(
                f"{name} is stored as [{rows}, {columns}] with a bitmask {list(bitmask)}; it does not fit into "
                f"{self.prefix}, which takes [{here}, {layer.sparse24_columns}] of it in each process",
                hint="the file is damaged, or config.json is from another model",
            )

    def _weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """Return the dense weight [O, I], and remove the packed parameters."""
        if not any(self.packed):
            return layer.weight.data
        columns = 2 * layer.compressed.shape[1]
        if _is_dummy():
            layer.compressed.data.zero_()
            layer.bitmask.data.fill_(0x33)  # any two of four
        parts, start = [], 0
        for name, rows, packed in zip(self.shards, layer.sparse24_rows, self.packed, strict=True):
            part = slice(start, start + rows)
            if packed:
                stored = Packed(layer.compressed.data[part], layer.bitmask.data[part], (rows, columns))
                parts.append(unpack(stored, name))
            else:
                parts.append(layer.weight.data[part])
            start += rows
        for suffix in SUFFIXES:
            delattr(layer, suffix)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _choose(self, weight: torch.Tensor) -> kernels.Choice:
        if any(self.packed) and not all(self.packed):
            dense = next(n for n, p in zip(self.shards, self.packed, strict=True) if not p)
            return kernels.Choice("dense", f"{dense.rpartition('.')[2]} is not 2:4 and fused with it")
        if not any(self.packed) and not self._may_pack():
            return kernels.Choice("dense", "the checkpoint stores it dense")
        choice = kernels.choose(tuple(weight.shape), weight.dtype, weight.device)
        if choice.kernel != "dense" and not any(self.packed) and not is_packable(weight):
            return kernels.Choice("dense", "it is not 2:4")
        return choice

    def _may_pack(self) -> bool:
        """Return True if a dense weight is to be packed when it is 2:4."""
        return False

    def _pack(
        self, weight: torch.Tensor, choice: kernels.Choice
    ) -> tuple[kernels.Packed24 | None, kernels.Choice]:
        """Return the kernel's form of a weight, or None and the reason where the kernel fails on it or is wrong."""
        try:
            packed = kernels.pack(weight, choice.kernel, found=self.algorithms)
            error = kernels.self_check(weight, packed)
        except (MSPError, RuntimeError) as failure:
            return None, kernels.Choice("dense", f"{choice.kernel} failed: {str(failure).splitlines()[0]}")
        if error > kernels.TOLERANCE[weight.dtype]:
            return None, kernels.Choice("dense", f"{choice.kernel} was wrong by {error:.2g}")
        return packed, choice

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x [..., I] times the transposed weight plus bias [O]."""
        if layer.sparse24_kernel == "dense":
            return self._dense.apply(layer, x, bias)
        return torch.ops.msp_plugin.sparse24_linear(
            x, layer.weight, layer.sparse24_meta, bias, layer.sparse24_out, layer.sparse24_kernel,
            layer.sparse24_algorithms,
        )  # fmt: skip


def _is_dummy() -> bool:
    """Return True if vLLM makes up the weights (``--load-format dummy``)."""
    config = get_current_vllm_config_or_none()
    return config is not None and str(config.load_config.load_format) == "dummy"


@register_weight_loader_v2_supported_method
class PackedMethod(Sparse24LinearMethod):
    """A linear of a packed checkpoint; its shards may be packed, dense or mixed."""


@register_weight_loader_v2_supported_method
class PackAtLoadMethod(Sparse24LinearMethod):
    """A linear of a dense checkpoint, packed at load time if its weight is 2:4 and a kernel runs it."""

    def __init__(self, report: Report, algorithms: kernels.Found, prefix: str, shards: tuple[str, ...]):
        super().__init__(report, algorithms, prefix, shards, (False,) * len(shards))

    def _may_pack(self) -> bool:
        return True
