"""vLLM's linears with 2:4 weights.

Shape legend, for one process of a tensor parallel group: O output rows of all fused shards, I input columns.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter

from msp_plugin.errors import MSPError, ServingError
from msp_plugin.formats.bits import positive_zeros
from msp_plugin.formats.sparse24 import SUFFIXES, Packed, is_packable, unpack
from msp_plugin.serving import kernels
from msp_plugin.serving.algorithms import TOLERANCE, FoundAlgorithms
from msp_plugin.serving.cpu.kernel import KERNELS, PackedWeight, checked_choice, choose, pack_dense, pays
from msp_plugin.serving.cpu.memory import in_huge_pages
from msp_plugin.serving.vllm.report import LayerReport, Report
from msp_plugin.serving.vllm.shards import Linear, Shards


class Sparse24LinearMethod(LinearMethodBase):
    """A linear that runs on a 2:4 kernel where there is one, dense elsewhere.

    Attributes:
        suffixes: of the tensors that stand for a packed weight.

    Args:
        report: collects how the layers of a model are served.
        algorithms: of the kernels, found so far; shared by the layers of a model.
        prefix: vLLM's name of the layer.
        names: the checkpoint's names of the layers fused into it.
        packed: for each of them, whether the checkpoint holds it packed.
    """

    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES

    def __init__(
        self,
        report: Report,
        algorithms: FoundAlgorithms,
        prefix: str,
        names: tuple[str, ...],
        packed: tuple[bool, ...],
    ):
        self.report, self.algorithms, self.prefix = report, algorithms, prefix
        self.shards = Shards(prefix, names, packed, self.suffixes)
        self._dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Linear,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create ``weight`` if a shard is dense, the tensors of the format if one is packed.

        Raises:
            ServingError: vLLM fuses the layer in another way than is known, or cuts a packed weight between
                bytes.
        """
        loader = extra_weight_attrs.pop("weight_loader")
        layer.sparse24_rows, layer.sparse24_columns = list(output_partition_sizes), input_size
        self.shards.expect_parts(len(output_partition_sizes))
        if not all(self.shards.packed):
            self._dense.create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                weight_loader=self.shards.counted(layer, "weight", loader),
                **extra_weight_attrs,
            )
        if getattr(layer, "has_bias", False):  # the bias is created after this, with the loader that it finds
            layer.weight_loader = self.shards.counted(layer, "bias", layer.weight_loader)
        if any(self.shards.packed):
            self._create_packed(layer, input_size_per_partition, params_dtype, loader)

    def _create_packed(self, layer: Linear, columns: int, dtype: torch.dtype, loader: MethodType) -> None:
        """Create ``compressed``, ``bitmask`` and ``shape``, for the rows of all shards.

        Raises:
            ServingError: a packed weight would be cut between bytes.
        """
        rows, input_size = sum(layer.sparse24_rows), layer.sparse24_columns
        if columns % 8:
            raise ServingError(
                f"{self.prefix} has {columns} input columns in each process; a packed weight is cut at "
                "multiples of 8",
                hint="use a smaller tensor parallel size"
                if columns < input_size
                else "export the model to dense, and serve that with quantization sparse24",
            )
        sizes = {"compressed": (columns // 2, dtype), "bitmask": (columns // 8, torch.uint8)}
        for suffix, (width, kind) in sizes.items():
            parameter = ModelWeightParameter(
                data=torch.empty(rows, width, dtype=kind),
                input_dim=1,
                output_dim=0,
                weight_loader=self.shards.counted(layer, suffix, loader),
            )
            layer.register_parameter(suffix, parameter)
        shape = BasevLLMParameter(
            data=torch.zeros(2, 1, dtype=torch.int64),
            weight_loader=self.shards.counted(layer, "shape", loader),
        )
        # A reload ends when as many values came as there are: each shard writes its shape over the last
        # one's.
        shape.weight_loader_numel = 2 * len(self.shards.packed_names)
        layer.register_parameter("shape", shape)

    def process_weights_after_loading(self, layer: Linear) -> None:
        """Bring the loaded weight into the form that it is served in, and report it.

        Raises:
            FormatError: a shard never came, or is damaged.
        """
        if hasattr(layer, "sparse24_kernel") and not self.shards.any_loaded:  # called again without a reload
            return
        if not is_dummy():
            self.shards.check(layer)
        self.shards.forget()
        weight = self._weight(layer)
        served: kernels.Packed24 | PackedWeight | None = None
        if self._on_cpu(weight):
            served, choice, wanted = self._pack_on_cpu(weight)
        else:
            choice = self._choose(weight)
            wanted = choice.kernel
            if wanted != "dense":
                served, choice = self._pack(weight, choice)
        layer.sparse24_kernel = choice.kernel
        if isinstance(served, PackedWeight):
            layer.register_parameter("weight", torch.nn.Parameter(served.values, requires_grad=False))
            layer.register_buffer("msp_bitmask", served.bitmask)
            layer.register_buffer("msp_row_offsets", served.row_offsets)
            layer.register_buffer("msp_scale", served.scale)
        elif served is None:
            if any(self.shards.packed):  # else vLLM's own parameter stays, which it can load into again
                layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
        else:
            # Under the name `weight`, because LoRA looks there for the layer's device.
            layer.register_parameter("weight", torch.nn.Parameter(served.packed, requires_grad=False))
            # Persistent, because a reload leaves other buffers as they were.
            layer.register_buffer("sparse24_meta", served.meta)
            layer.sparse24_algorithms = list(served.algorithms)
            layer.sparse24_out = served.out_features
        self._report(choice, wanted, weight.nbytes, served)
        if served is None:
            self._dense.process_weights_after_loading(layer)

    def _report(
        self,
        choice: kernels.Choice,
        wanted: str,
        dense_bytes: int,
        served: kernels.Packed24 | PackedWeight | None,
    ) -> None:
        """Report how the layer is served: by which kernel, why not by the wanted one, in how many bytes."""
        shards = zip(self.shards.names, self.shards.packed, strict=True)
        packed = [name for name, stored_packed in shards if stored_packed or served is not None]
        self.report.add(
            LayerReport(
                layer=self.prefix,
                packed=tuple(dict.fromkeys(packed)),
                kernel=choice.kernel,
                reason=choice.reason if choice.kernel == "dense" else "",
                bytes=dense_bytes if served is None else served.bytes,
                dense_bytes=dense_bytes,
                rank=get_tensor_model_parallel_rank(),
                failed=choice.kernel != wanted,
            )
        )

    def _weight(self, layer: Linear) -> torch.Tensor:
        """Return the dense weight [O, I], and remove the packed parameters."""
        if not any(self.shards.packed):
            dense: torch.Tensor = layer.weight.data
            return dense
        columns = 2 * layer.compressed.shape[1]
        if is_dummy():
            layer.compressed.data.zero_()
            layer.bitmask.data.fill_(0x33)  # any two of four
        parts, start = [], 0
        shards = zip(self.shards.names, layer.sparse24_rows, self.shards.packed, strict=True)
        for name, rows, packed in shards:
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
        """Return the kernel for the weight of all shards, and why."""
        packed = self.shards.packed
        if any(packed) and not all(packed):
            dense = self.shards.names[packed.index(False)]
            return kernels.Choice("dense", f"{dense.rpartition('.')[2]} is not 2:4 and fused with it")
        if not any(packed) and not self._may_pack():
            return kernels.Choice("dense", "the checkpoint stores it dense")
        choice = kernels.choose((weight.shape[0], weight.shape[1]), weight.dtype, weight.device)
        if choice.kernel != "dense" and not any(packed) and not is_packable(weight):
            return kernels.Choice("dense", "it is not 2:4")
        return choice

    def _may_pack(self) -> bool:
        """Return True if dense weights are packed when they are 2:4."""
        return False

    def _on_cpu(self, weight: torch.Tensor) -> bool:
        """Return True if the weight is a CPU's own to serve."""
        if weight.device.type != "cpu":
            return False
        return (
            kernels.choose((weight.shape[0], weight.shape[1]), weight.dtype, weight.device).kernel == "dense"
        )

    def _pack_on_cpu(self, weight: torch.Tensor) -> tuple[PackedWeight | None, kernels.Choice, str]:
        """Return the weight of all shards for the CPU's kernel, or None; why; and the kernel that was wanted.

        Shards of all forms become one packed weight, so that a fused linear is one call.
        """
        if not any(self.shards.packed) and not self._may_pack():
            return None, kernels.Choice("dense", "the checkpoint stores it dense"), "dense"
        # A mask times a negative weight leaves -0.0, which would be kept as a value.
        weight, _ = positive_zeros(weight)
        if not pays(weight):
            return None, kernels.Choice("dense", "packing does not pay"), "dense"
        wanted = choose(weight.dtype)
        if wanted.kernel == "dense":
            return None, wanted, "dense"
        packed = pack_dense(weight)
        choice = checked_choice(weight, packed)
        return in_huge_pages(packed) if choice.kernel != "dense" else None, choice, wanted.kernel

    def _pack(
        self, weight: torch.Tensor, choice: kernels.Choice
    ) -> tuple[kernels.Packed24 | None, kernels.Choice]:
        """Return a weight in its kernel's form, or None and why: the kernel fails on it, or is wrong."""
        try:
            packed = kernels.pack(weight, choice.kernel, found=self.algorithms)
            error = kernels.self_check(weight, packed)
        except (MSPError, RuntimeError) as failure:
            return None, kernels.Choice("dense", f"{choice.kernel} failed: {str(failure).splitlines()[0]}")
        if error > TOLERANCE[weight.dtype]:
            return None, kernels.Choice("dense", f"{choice.kernel} was wrong by {error:.2g}")
        return packed, choice

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x [..., I] times the transposed weight plus bias [O]."""
        out: torch.Tensor
        if layer.sparse24_kernel == "dense":
            out = self._dense.apply(layer, x, bias)
        elif layer.sparse24_kernel in KERNELS:
            out = torch.ops.msp_plugin.bitmask_linear(
                x,
                layer.weight,
                layer.msp_bitmask,
                layer.msp_row_offsets,
                layer.msp_scale,
                bias,
                x.shape[-1],
                layer.sparse24_kernel,
            )
        else:
            out = torch.ops.msp_plugin.sparse24_linear(
                x,
                layer.weight,
                layer.sparse24_meta,
                bias,
                layer.sparse24_out,
                layer.sparse24_kernel,
                layer.sparse24_algorithms,
            )
        return out


def is_dummy() -> bool:
    """Return True if vLLM makes up the weights (``--load-format dummy``)."""
    config = get_current_vllm_config_or_none()
    return config is not None and str(config.load_config.load_format) == "dummy"


@register_weight_loader_v2_supported_method
class PackedMethod(Sparse24LinearMethod):
    """A linear of a packed checkpoint; its shards may be packed, dense or mixed."""


@register_weight_loader_v2_supported_method
class PackAtLoadMethod(Sparse24LinearMethod):
    """A linear of a dense checkpoint, packed at load time if its weight is 2:4 and a kernel runs it."""

    def __init__(self, report: Report, algorithms: FoundAlgorithms, prefix: str, names: tuple[str, ...]):
        super().__init__(report, algorithms, prefix, names, (False,) * len(names))

    def _may_pack(self) -> bool:
        return True
