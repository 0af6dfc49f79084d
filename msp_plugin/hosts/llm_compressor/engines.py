"""The final pruning inside llm-compressor's calibration, where a block's inputs come from the pruned blocks before it.

Each engine follows the modifier's life cycle: ``initialize``, ``event``, ``finalize``, and after a failure ``abort``,
which removes all hooks and statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.errors import RecipeError
from msp_plugin.hosts.llm_compressor.methods import HostMethod, host_method
from msp_plugin.models.offload import linear
from msp_plugin.passes.observe import as_samples
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level, Pattern
from msp_plugin.plan.units import Layer, Unit
from msp_plugin.pruning.base import Pruner, UnitInputs

if TYPE_CHECKING:
    from llmcompressor.core import Event, State
    from llmcompressor.modifiers import Modifier


def make_engine(
    pruner: Pruner, allocation: Allocation, owner: Modifier
) -> HostEngine | LayerwiseEngine | BothEngines:
    """Return the engine for a method and its layers' levels.

    The host's own modifiers prune the levels that they can make. Layer-wise methods, and levels that only our functions
    can make, go through our hooks.
    """
    levels = {name: level for name, level in allocation.by_layer.items() if not level.is_dense}
    method = host_method(pruner)
    if method is None:
        return LayerwiseEngine(pruner, levels, owner)
    theirs = {
        name: pattern
        for name, level in levels.items()
        if (pattern := level.pattern) and _host_makes(method, pattern)
    }
    ours = {name: level for name, level in levels.items() if name not in theirs}
    if not ours:
        return HostEngine(method, theirs)
    if not theirs:
        return LayerwiseEngine(pruner, ours, owner)
    return BothEngines((HostEngine(method, theirs), LayerwiseEngine(pruner, ours, owner)))


def _host_makes(method: HostMethod, level: Pattern) -> bool:
    try:
        method.check_modifier(level)
    except RecipeError:
        return False
    return True


class HostEngine:
    """One instance of the host's modifier per level, each with the exact names of its layers."""

    def __init__(self, method: HostMethod, levels: Mapping[str, Pattern]):
        self.method, self.levels = method, levels
        self.instances: list[Modifier] = []
        self.names: dict[torch.nn.Module, str] = {}

    def initialize(self, state: State, **kwargs: Any) -> None:
        from llmcompressor.modifiers.factory import ModifierFactory

        if not ModifierFactory._loaded:
            ModifierFactory.refresh()
        self.names = {state.model.get_submodule(name): name for name in self.levels}
        for level in sorted(set(self.levels.values()), key=lambda level: level.sparsity):
            instance = ModifierFactory.create(
                self.method.modifier,
                allow_registered=True,
                allow_experimental=True,
                targets=[name for name, its in self.levels.items() if its == level],
                **self.method.modifier_arguments(level),
            )
            self.instances.append(instance)
            _flatten_inputs(instance)
            instance.initialize(state, **kwargs)

    def event(self, state: State, event: Event, **kwargs: Any) -> None:
        from llmcompressor.core.events import EventType

        for instance in self.instances:
            if event.type_ == EventType.SEQUENTIAL_EPOCH_END:
                self.method.check_statistics(instance, self.names)
            instance.update_event(state, event, **kwargs)

    def finalize(self, state: State) -> None:
        for instance in self.instances:
            instance.finalize(state)
        self.names = {}

    def abort(self) -> None:
        for instance in self.instances:
            instance.remove_hooks()
        self.instances, self.names = [], {}


def _flatten_inputs(instance: Modifier) -> None:
    """Reshape inputs of more than three dimensions to [B, T, I] for the host's modifier, which fails on them."""
    own = getattr(instance, "calibrate_module", None)
    if own is not None:

        def calibrate(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return own(module, (as_samples(args[0]), *args[1:]), output)

        object.__setattr__(
            instance, "calibrate_module", calibrate
        )  # pydantic refuses to set what is not a field


class LayerwiseEngine:
    """Collects statistics with forward hooks, and prunes each layer when the pipeline has calibrated its block."""

    def __init__(self, pruner: Pruner, levels: Mapping[str, Level], owner: Modifier):
        self.pruner, self.levels, self.owner = pruner, levels, owner
        self.statistics: dict[torch.nn.Linear, Any] = {}
        self.pruned: set[torch.nn.Module] = set()
        self.names: dict[torch.nn.Linear, str] = {}

    def initialize(self, state: State, **kwargs: Any) -> None:
        self.names = {linear(state.model, name): name for name in self.levels}

    def event(self, state: State, event: Event, **kwargs: Any) -> None:
        from llmcompressor.core.events import EventType

        if event.type_ == EventType.CALIBRATION_START and self.pruner.needs_statistics:
            observe: Any = self._observe  # llm-compressor types every hook as a function of one argument
            for module in self.names:
                self.owner.register_hook(module, observe, "forward")
        elif event.type_ == EventType.SEQUENTIAL_EPOCH_END:
            self._prune(kwargs.get("modules") or ())
        elif event.type_ == EventType.CALIBRATION_END:
            if not self.pruner.needs_statistics:
                self._prune(self.names)  # the modules that no step of the pipeline ran
            self.owner.remove_hooks()

    def _observe(self, module: torch.nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if module not in self.statistics:
            self.statistics[module] = self.pruner.new_statistic(module)
        self.statistics[module] = self.pruner.observe(module, as_samples(args[0]), self.statistics[module])

    @torch.no_grad()
    def _prune(self, modules: Iterable[torch.nn.Module]) -> None:
        from compressed_tensors.utils import align_module_device, update_offload_parameter

        if self.pruner.needs_statistics:
            ready = list(self.statistics)
        else:
            ready = [
                module
                for module in modules
                if isinstance(module, torch.nn.Linear) and module in self.names and module not in self.pruned
            ]
        for module in ready:
            name = self.names[module]
            with align_module_device(module):
                statistic = self.statistics.pop(module, None)
                unit = Unit(name, 0, (Layer(name, module.out_features, module.in_features),))
                inputs = UnitInputs(unit, {name: module}, {name: statistic}, {})
                ((_, weights),) = self.pruner.prune_unit(inputs, [self.levels[name]])
                (pruned,) = weights
            update_offload_parameter(module, "weight", pruned)
            self.pruned.add(module)

    def finalize(self, state: State) -> None:
        self.abort()

    def abort(self) -> None:
        self.owner.remove_hooks()
        self.statistics, self.names, self.pruned = {}, {}, set()


@dataclass(frozen=True)
class BothEngines:
    """The host's modifiers and our hooks in one calibration, each for its own layers."""

    engines: tuple[HostEngine | LayerwiseEngine, ...]

    def initialize(self, state: State, **kwargs: Any) -> None:
        for engine in self.engines:
            engine.initialize(state, **kwargs)

    def event(self, state: State, event: Event, **kwargs: Any) -> None:
        for engine in self.engines:
            engine.event(state, event, **kwargs)

    def finalize(self, state: State) -> None:
        for engine in self.engines:
            engine.finalize(state)

    def abort(self) -> None:
        for engine in self.engines:
            engine.abort()
