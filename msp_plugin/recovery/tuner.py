"""Weight changes as adapters of peft, which saves, loads and shows them.

This file needs peft, so that it is imported inside functions only. After ``import msp_plugin.recovery.adapters`` peft
knows adapters of the type ``MSP_PLUGIN``: ``PeftModel.from_pretrained(pruned_model, directory)`` loads a saved one.
Without it peft refuses them, as it should: a masked change that is loaded as something else fills zeros in.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch.func import functional_call

from msp_plugin.recovery.weight_change import ChangedLinear, WeightChange, changed_weight

PEFT_TYPE = "MSP_PLUGIN"
#: Starts the name of each trained tensor in a state dict.
PREFIX = "msp_"


@dataclass
class SparseAdapterConfig(PeftConfig):  # type: ignore[misc,unused-ignore] # Any where peft is missing
    """The options of an adapter that keeps zeros, as adapter_config.json holds them.

    Args:
        change: name of the weight change, and the arguments that make it.
        layers: names of the layers that it changes. peft shortens a list of twenty and more ``target_modules`` to their
            endings, which say less, so nothing reads those.
        vectors: names of the modules whose own vectors (norms) are trained too.
        biases: also train the biases of the layers.
        seed: of the start of the trained tensors.
    """

    change: str = "masked_lora"
    options: dict[str, Any] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    target_modules: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    biases: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    @classmethod
    def of(cls, change: WeightChange, layers: list[str], **options: Any) -> SparseAdapterConfig:
        """Return the configuration of a change of some layers, which makes its tensors."""
        config = cls(
            change=change.name,
            options=change.options(),
            layers=layers,
            target_modules=list(layers),
            **options,
        )
        config._made = change
        return config

    def make(self) -> WeightChange:
        """Return the change: the one that this configuration was made of, or a new one for a saved adapter."""
        made: WeightChange | None = getattr(self, "_made", None)
        return made or WeightChange.known[self.change](**self.options)


class _Layer(torch.nn.Module, BaseTunerLayer):  # type: ignore[misc,unused-ignore]
    """A module with trained tensors in place of its own, by adapter."""

    other_param_names = ("scaling",)
    # Of BaseTunerLayer, which has no types here.
    weight: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    get_base_layer: Any
    set_adapter: Any

    def __init__(self, base_layer: torch.nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names: tuple[str, ...] = ()
        #: By adapter, the share of the change that is applied; importance-aware schedules damp it (see ist).
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def add(self, adapter: str, tensors: dict[str, torch.Tensor]) -> None:
        """Add trained tensors, float32, for an adapter."""
        self.scaling[adapter] = 1.0
        device = self.weight.device
        for name, tensor in tensors.items():
            attribute = PREFIX + name
            if attribute not in self.adapter_layer_names:
                setattr(self, attribute, torch.nn.ParameterDict())
                self.adapter_layer_names = (*self.adapter_layer_names, attribute)
            getattr(self, attribute)[adapter] = torch.nn.Parameter(tensor.to(device))

    def trained(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return the trained tensors of an adapter by name."""
        own = (name for name in self.adapter_layer_names if adapter in getattr(self, name))
        return {name.removeprefix(PREFIX): getattr(self, name)[adapter] for name in own}

    def current(self) -> str | None:
        """Return the adapter that changes this layer now; the layer is its own for None."""
        active = [a for a in self.active_adapters if a in self.scaling]
        return active[0] if active and not self.disable_adapters and not self.merged else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the module the changed tensors of its adapter in place; that cannot be undone."""
        adapter = self.current()
        if adapter is None:
            return
        with torch.no_grad():
            for name, tensor in self.changed(adapter).items():
                getattr(self.base_layer, name).copy_(tensor)
        self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        raise ValueError("a merged weight has been rounded and cannot be taken apart: load the model again")

    @abstractmethod
    def changed(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return the module's tensors with the change of an adapter, in the module's dtype."""


class ChangedLayer(_Layer):
    """A linear layer with a changed weight, and with a trained bias where the adapter has one."""

    def __init__(self, base_layer: torch.nn.Linear):
        super().__init__(base_layer)
        self.changes: dict[str, WeightChange] = {}
        self.msp_fixed = torch.nn.ModuleDict()

    def add_change(self, adapter: str, change: WeightChange, layer: str, config: SparseAdapterConfig) -> None:
        """Add an adapter; the start of its tensors depends on the seed and the layer's name alone."""
        base = self.get_base_layer()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + hash_of(layer))
        tensors = change.start(layer, base.weight.detach(), generator)
        if config.biases and base.bias is not None:
            tensors["bias"] = base.bias.detach().float().clone()
        self.changes[adapter] = change
        self.add(adapter, tensors)
        if fixed := change.fixed(layer):
            moved = {name: tensor.to(base.weight.device) for name, tensor in fixed.items()}
            self.msp_fixed[adapter] = BufferDict(moved, persistent=True)

    def _tensors(self, adapter: str) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Return the tensors of the change, and the bias, in the dtype of the layer."""
        tensors, base = self.trained(adapter), self.get_base_layer()
        bias = tensors.pop("bias", None)
        if adapter in self.msp_fixed:
            fixed: Any = self.msp_fixed[adapter]
            tensors |= dict(fixed.items())
        return tensors, base.bias if bias is None else bias.to(base.weight.dtype)

    def changed(self, adapter: str) -> dict[str, torch.Tensor]:
        tensors, bias = self._tensors(adapter)
        weight = self.get_base_layer().weight
        new = {"weight": changed_weight(self.changes[adapter], weight, tensors, share=self.scaling[adapter])}
        return new if bias is None else {**new, "bias": bias}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapter, base = self.current(), self.get_base_layer()
        output: torch.Tensor
        if adapter is None:
            output = base(x)
        elif not torch.is_grad_enabled():
            changed = self.changed(adapter)
            output = torch.nn.functional.linear(x, changed["weight"], changed.get("bias"))
        else:
            tensors, bias = self._tensors(adapter)
            apply: Any = ChangedLinear.apply  # not every torch has types for it
            output = apply(x, base.weight, bias, self.changes[adapter], tuple(tensors), *tensors.values())
        return output


class ChangedVectors(_Layer):
    """A norm, or another module whose own parameters are vectors, all of them trained in float32."""

    def changed(self, adapter: str) -> dict[str, torch.Tensor]:
        new = {}
        for name, tensor in self.trained(adapter).items():
            own = getattr(self.base_layer, name)
            if self.scaling[adapter] != 1.0:
                tensor = torch.lerp(own.float(), tensor, self.scaling[adapter])
            new[name] = tensor.to(own.dtype)
        return new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter = self.current()
        if adapter is None:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, self.changed(adapter), args, kwargs)


class SparseTuner(BaseTuner):  # type: ignore[misc,unused-ignore]
    """Puts a ChangedLayer around each layer, and a ChangedVectors around each norm."""

    prefix = PREFIX
    tuner_layer_cls = _Layer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.layers or key in peft_config.vectors

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: torch.nn.Module,
        target_name: str,
        parent: torch.nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer: _Layer
        if current_key in peft_config.vectors:
            layer = target if isinstance(target, _Layer) else ChangedVectors(target)
            own = layer.get_base_layer().named_parameters(recurse=False)
            layer.add(adapter_name, {name: p.detach().float().clone() for name, p in own})
        else:
            assert isinstance(target, torch.nn.Linear | ChangedLayer), f"{current_key} is no linear"
            layer = target if isinstance(target, ChangedLayer) else ChangedLayer(target)
            change = peft_config.make()
            layer.add_change(adapter_name, change, current_key, peft_config)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        setattr(parent, target_name, layer)


def hash_of(name: str) -> int:
    """Return 31 bits that depend on a name alone."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def add_adapter(model: torch.nn.Module, config: PeftConfig) -> PeftModel:
    """Return peft's model around ``model``, whose layers it replaces until ``unload``; only the adapter is trained."""
    adapted = PeftModel(model, config)
    config.base_model_name_or_path = ""  # peft looks there for changed embeddings at every save
    return adapted


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SparseAdapterConfig  # type: ignore[index,unused-ignore]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SparseTuner  # type: ignore[index,unused-ignore]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX  # type: ignore[index,unused-ignore]
