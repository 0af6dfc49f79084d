"""vLLM's linears of a checkpoint with values in int8: on a CPU they stay in int8, each row with its own scale.

Shape legend, for one process of a tensor parallel group: O output rows of all fused shards, I input columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method

from msp_plugin.formats.bitmask_int8 import SCALE, SUFFIXES, Int8Bitmask, dequantize
from msp_plugin.serving import kernels
from msp_plugin.serving.cpu.kernel import PackedWeight, checked_choice, choose, pack_dense
from msp_plugin.serving.cpu.memory import in_huge_pages
from msp_plugin.serving.vllm.bitmask import BitmaskMethod
from msp_plugin.serving.vllm.linear import is_dummy
from msp_plugin.serving.vllm.shards import Linear


@register_weight_loader_v2_supported_method
class Int8BitmaskMethod(BitmaskMethod):
    """A linear whose shards are stored with values in int8, dense or mixed.

    vLLM's own loader fuses and cuts the values as if they were a weight, and after them the scales, repeated over the
    columns. Where a shard is dense there is no scale for its rows, so all shards are served in the model's dtype.
    """

    suffixes = SUFFIXES

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._int8: tuple[torch.Tensor, torch.Tensor] | None = None

    def _unpack(self, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        dtype: torch.dtype = self._sizes[-1]  # for which a scale may be too small
        return Int8Bitmask().unpack({**tensors, SCALE: tensors[SCALE].float()}, name).to(dtype)

    def _weight(self, layer: Linear) -> torch.Tensor:
        """Return the dense weight [O, I], and hold its values and scales if all shards have them.

        Raises:
            FormatError: a shard is damaged, or of another size than vLLM's layer.
        """
        if not all(self.shards.packed) or is_dummy():
            return super()._weight(layer)
        dtype: torch.dtype = self._sizes[-1]
        scales = {}
        self._create_weight(layer, dtype)  # which holds whole numbers up to 127 exactly
        while self._stored:
            shard, tensors = self._stored.popitem()
            values, scale = Int8Bitmask().values(tensors, ", ".join(self.shards.parts(shard)))
            scales[shard] = scale.float()[:, None].expand(values.shape)
            self._take(layer, shard, values.to(dtype))
        values = layer.weight.data.to(torch.int8)
        self._create_weight(layer, torch.float32)
        for shard, repeated in scales.items():
            self._take(layer, shard, repeated)
        self._remove_parameters(layer)
        held = (values, layer.weight.data[:, 0].clone())
        weight = dequantize(*held).to(dtype)
        if self._on_cpu(weight):
            self._int8 = held
        return weight

    def _pack_on_cpu(self, weight: torch.Tensor) -> tuple[PackedWeight | None, kernels.Choice, str]:
        held, self._int8 = self._int8, None
        if held is None:
            return super()._pack_on_cpu(weight)
        packed = replace(pack_dense(held[0]), scale=held[1])
        if packed.bytes >= weight.nbytes:
            return None, kernels.Choice("dense", "packing does not pay"), "dense"
        wanted = choose(weight.dtype)
        if wanted.kernel == "dense":
            return None, wanted, "dense"
        choice = checked_choice(weight, packed)
        return in_huge_pages(packed) if choice.kernel != "dense" else None, choice, wanted.kernel
