"""The base classes of pruning methods, which turn calibration statistics into pruned weights."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch

from msp_plugin.errors import NumericsError, PluginError, RecipeError
from msp_plugin.plan.levels import Level, Pattern
from msp_plugin.plan.units import Layer, Unit
from msp_plugin.pruning import masks
from msp_plugin.pruning.masks import nm_masks
from msp_plugin.runtime.digests import component_digest, installed_version


@dataclass(frozen=True)
class UnitInputs:
    """A unit with what a method reads of its layers, each by the layer's name.

    Args:
        modules: in the unit's order; they are not changed.
        statistics: layers with the same input share one.
        scores: what ``gradient_score`` gave of each layer; empty if the method takes no gradients.
    """

    unit: Unit
    modules: Mapping[str, torch.nn.Linear]
    statistics: Mapping[str, Any]
    scores: Mapping[str, torch.Tensor]


class Pruner(ABC):
    """A pruning method. Subclasses are frozen dataclasses whose fields are recipe options.

    A statistic is an object of any type: ``new_statistic`` makes it, ``observe`` adds inputs to it, and
    ``prune_levels`` and ``output_error`` read it. A method prunes layer by layer with ``prune_levels``; one that has
    to see all layers of a unit together has a ``prune_unit`` of its own.
    """

    name: ClassVar[str]
    #: The framework whose code does the work.
    host: ClassVar[str] = "msp_plugin"
    #: False for methods that only read the weight.
    needs_statistics: ClassVar[bool] = True
    #: Modules with arithmetic of the method, beside the modules of its class and of its bases.
    arithmetic: ClassVar[tuple[ModuleType, ...]] = (masks,)

    def version(self) -> str:
        """Return the version of the distribution that contains the method; a part of every file's key."""
        top = type(self).__module__.partition(".")[0]
        owners = [top] if top == "msp_plugin" else importlib.metadata.packages_distributions().get(top, [])
        return (owners and installed_version(owners[0])) or "unversioned"

    def code(self) -> str:
        """Return a hex digest of the method's source, so that no results of other source are reused."""
        return component_digest(self, self.arithmetic)

    def check_level(self, level: Pattern) -> None:  # noqa: B027 - optional to override
        """Raise RecipeError if the method cannot prune to the pattern ``level``, which is not dense."""

    def check_menu(self, menu: Sequence[Level]) -> None:
        """Raise RecipeError if the method cannot prune to a level of the menu.

        By default it can drop what any method can, and make the patterns that ``check_level`` allows.
        """
        for level in menu:
            if level.pattern is not None:
                if not level.is_dense:
                    self.check_level(level.pattern)
            elif not level.is_dropped:
                raise RecipeError(
                    f"method {self.name!r} cannot make level {level}",
                    hint="use a method that makes widths: llm_pruner, obs, flap, saap, l2, random, or a plugin's"
                    if level.by_groups
                    else "use another method, or another level",
                )

    @property
    def needs_data(self) -> bool:
        """True if the method reads calibration samples, for statistics or for gradients."""
        return self.needs_statistics or self.gradient_order > 0

    def statistic_bytes(self, layer: Layer) -> int:
        """Return the memory of a layer's statistic in bytes."""
        return 0

    def layer_statistic(self, layer: Layer, module: torch.nn.Linear) -> Any:
        """Return an empty statistic for a layer; by default ``new_statistic``, which knows the linear alone."""
        return self.new_statistic(module)

    @abstractmethod
    def new_statistic(self, module: torch.nn.Linear) -> Any:
        """Return an empty statistic for a layer, on the device of its weight."""

    @abstractmethod
    def observe(self, module: torch.nn.Linear, inputs: torch.Tensor, statistic: Any) -> Any:
        """Return the statistic with the layer's inputs [B, T, in] added."""

    @abstractmethod
    def prune_levels(
        self, module: torch.nn.Linear, statistic: Any, levels: Sequence[Pattern], layer: str
    ) -> Iterator[torch.Tensor]:
        """Yield the pruned weight [out, in] for each pattern, in the weight's dtype; ``module`` is not changed.

        Args:
            statistic: may be used up by the last level.
            layer: name of the layer, for errors.
        """

    @property
    def prunes_units(self) -> bool:
        """True if the method has a ``prune_unit`` of its own, which gets the layers of whole units."""
        return type(self).prune_unit is not Pruner.prune_unit

    @property
    def gradient_order(self) -> int:
        """0 if the method takes no gradients of the loss by the weights, 1 if their mean, 2 if the mean of squares too."""
        return 0

    def wants_gradient(self, layer: Layer) -> bool:
        """Return True if ``gradient_score`` is to be called for a layer."""
        return True

    def gradient_score(
        self, layer: Layer, weight: torch.Tensor, gradient: torch.Tensor, squares: torch.Tensor
    ) -> torch.Tensor:
        """Return what is kept for ``prune_unit`` of a layer's gradients, of any shape.

        Args:
            weight: [O, I].
            gradient: float32[O, I], of the mean over samples of each sample's mean cross entropy.
            squares: float32[O, I], the mean over samples of the square of each sample's gradient; zeros if
                ``gradient_order`` is 1.
        """
        raise PluginError(f"method {self.name!r} sets gradient_order and defines no gradient_score")

    def prune_unit(
        self, inputs: UnitInputs, levels: Sequence[Level]
    ) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """Yield each layer of a unit with its pruned weights [out, in], one for each level, in the weight's dtype.

        By default each layer is pruned by itself: patterns by ``prune_levels``, and ``dropped`` to zeros. It may then
        be called for single layers of a unit.

        Args:
            levels: not dense.
        """
        for name, module in inputs.modules.items():
            yield name, self._prune_layer(module, inputs.statistics[name], levels, name)

    def _prune_layer(
        self, module: torch.nn.Linear, statistic: Any, levels: Sequence[Level], layer: str
    ) -> Iterator[torch.Tensor]:
        patterns = [level.pattern for level in levels if level.pattern]
        weights = self.prune_levels(module, statistic, patterns, layer) if patterns else ()
        pruned = zip(patterns, weights, strict=True)
        for level in levels:
            yield torch.zeros_like(module.weight) if level.is_dropped else next(pruned)[1]
        next(pruned, None)  # raises if there are more weights than patterns

    @abstractmethod
    def output_error(self, delta: torch.Tensor, statistic: Any) -> float:
        """Return the mean squared change of the layer's output per token for delta float32[out, in]."""

    def row_errors(self, delta: torch.Tensor, statistic: Any) -> torch.Tensor | None:
        """Return float64[out], the parts of ``output_error`` by output feature; None if the method gives none.

        Their sum is the layer's output error, and ``output_error`` is not called then.
        """
        return None


class InputNorm:
    """The sum of squares of every input feature, float64[in], and the count of tokens."""

    def __init__(self, in_features: int, device: torch.device):
        self.sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs [..., in]."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        self.sum += flat.float().square().sum(dim=0, dtype=torch.float64)
        self.tokens += flat.shape[0]

    @property
    def rms(self) -> torch.Tensor:
        """Root mean square of every feature over the tokens, float32[in]."""
        return (self.sum / max(self.tokens, 1)).sqrt().float()


class LayerwisePruner(Pruner):
    """A method that scores each weight, keeps the best in each group of a level, and changes none of these.

    A subclass only defines ``score``. Set ``needs_statistics = False`` if the score does not use
    ``input_norm``.
    """

    @abstractmethod
    def score(self, weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
        """Return float32[out, in], higher for weights to keep.

        Args:
            weight: float32[out, in].
            input_norm: float32[in], root mean square of each input feature over the calibration
                tokens; ones if ``needs_statistics`` is False.
        """

    def statistic_bytes(self, layer: Layer) -> int:
        return 8 * layer.in_features

    def new_statistic(self, module: torch.nn.Linear) -> InputNorm:
        return InputNorm(module.in_features, module.weight.device)

    def observe(self, module: torch.nn.Linear, inputs: torch.Tensor, statistic: InputNorm) -> InputNorm:
        statistic.add(inputs)
        return statistic

    def prune_levels(
        self, module: torch.nn.Linear, statistic: InputNorm, levels: Sequence[Pattern], layer: str
    ) -> Iterator[torch.Tensor]:
        weight = module.weight.detach()
        norm = statistic.rms if self.needs_statistics else torch.ones_like(weight[0], dtype=torch.float32)
        score = self.score(weight.float(), norm)
        if not torch.isfinite(score).all():
            raise NumericsError(f"method {self.name!r} gives scores that are not finite for {layer}")
        for mask in nm_masks(score, levels):
            yield weight.masked_fill(~mask, 0)

    def output_error(self, delta: torch.Tensor, statistic: InputNorm) -> float:
        """Return the mean squared output change per token, as if the input features were uncorrelated."""
        rows = self.row_errors(delta, statistic)
        return float(delta.double().square().sum() if rows is None else rows.sum())

    def row_errors(self, delta: torch.Tensor, statistic: InputNorm) -> torch.Tensor | None:
        if not self.needs_statistics:
            return None
        return delta.double().square() @ statistic.rms.double().square()
