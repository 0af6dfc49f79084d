"""vLLM's linears of a checkpoint in the bitmask format: unpacked when they are loaded.

Shape legend, for one process of a tensor parallel group: O output rows of all fused shards, I input columns.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import BasevLLMParameter

from msp_plugin.formats.bitmask import SUFFIXES, Packed, unpack
from msp_plugin.formats.sparse24 import is_packable
from msp_plugin.serving import kernels
from msp_plugin.serving.vllm.linear import Sparse24LinearMethod, is_dummy
from msp_plugin.serving.vllm.shards import Linear


@register_weight_loader_v2_supported_method
class BitmaskMethod(Sparse24LinearMethod):
    """A linear whose shards are stored as nonzeros and a bitmask, dense or mixed.

    How many nonzeros a shard has is known when it comes, and which of them belong to this process when its bitmask
    came too. So the tensors are held as they are stored, in memory of their own, beside parameters of one number
    each, until all of the model came; then vLLM's own loader takes this process's part of each unpacked weight.
    """

    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._stored: dict[Any, dict[str, torch.Tensor]] = {}

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
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
        self._loader = extra_weight_attrs["weight_loader"].__func__
        others = {name: value for name, value in extra_weight_attrs.items() if name != "weight_loader"}
        self._create_dense = partial(self._dense.create_weights, **others)
        self._sizes = sizes
        super().create_weights(layer, *sizes, **extra_weight_attrs)

    def _create_packed(self, layer: Linear, columns: int, dtype: torch.dtype, loader: MethodType) -> None:
        """Create a parameter of one number for each suffix, whose loader holds the tensor that comes."""
        for suffix in self.suffixes:
            parameter = BasevLLMParameter(
                data=torch.zeros(1, dtype=torch.uint8),
                weight_loader=self.shards.counted(layer, suffix, self._collector(layer, suffix)),
            )
            # A reload ends when as many values came as there are: each shard writes one.
            parameter.weight_loader_numel = len(self.shards.packed_names)
            layer.register_parameter(suffix, parameter)

    def _collector(self, layer: Linear, suffix: str) -> MethodType:
        """Return the loader of ``<layer>.<suffix>``, as a method of the layer that does not hold it."""
        stored = self._stored

        def collect(_: Linear, param: torch.nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
            param.data.copy_(torch.ones(1))
            stored.setdefault(shard, {})[suffix] = loaded.detach().to("cpu", copy=True)

        return MethodType(collect, layer)

    def _weight(self, layer: Linear) -> torch.Tensor:
        """Return the dense weight [O, I], and remove the parameters of one number.

        Raises:
            FormatError: a shard is damaged, or of another size than vLLM's layer.
        """
        if any(self.shards.packed):
            if all(self.shards.packed):
                self._create_weight(layer, self._sizes[-1])
            if is_dummy():
                layer.weight.data.zero_()
            while self._stored:
                shard, tensors = self._stored.popitem()
                name = ", ".join(self.shards.parts(shard))
                self._take(layer, shard, self._unpack(tensors, name))
            self._remove_parameters(layer)
        dense: torch.Tensor = layer.weight.data
        return dense

    def _unpack(self, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        """Return the weight of a shard; a FormatError says that it is damaged."""
        return unpack(Packed.of(tensors, name), name)

    def _create_weight(self, layer: Linear, dtype: torch.dtype) -> None:
        """Create ``weight`` for this process's part of all shards."""
        with torch.device(layer.compressed.device):
            sizes = (*self._sizes[:-1], dtype)
            self._create_dense(layer, *sizes, weight_loader=MethodType(self._loader, layer))
        layer.update_param_tp_status()

    def _take(self, layer: Linear, shard: Any, weight: torch.Tensor) -> None:
        """Copy this process's part of a shard's weight into ``weight``.

        Raises:
            FormatError: the shard is of another size than vLLM's layer.
        """
        name = ", ".join(self.shards.parts(shard))
        self.shards.check_size(layer, name, (weight.shape[0], weight.shape[1]))
        MethodType(self._loader, layer)(layer.weight, weight, *(() if shard is None else (shard,)))

    def _remove_parameters(self, layer: Linear) -> None:
        """Remove the parameters of one number."""
        for suffix in self.suffixes:
            delattr(layer, suffix)

    def _choose(self, weight: torch.Tensor) -> kernels.Choice:
        choice = kernels.choose((weight.shape[0], weight.shape[1]), weight.dtype, weight.device)
        if choice.kernel != "dense" and not is_packable(weight):
            return kernels.Choice("dense", "it is not 2:4")
        return choice
