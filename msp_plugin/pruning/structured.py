"""The base class of methods that remove whole heads and channels.

Shape legend: G groups of a half, O out_features, I in_features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from msp_plugin.errors import NumericsError
from msp_plugin.plan.levels import Level, Pattern
from msp_plugin.plan.units import Layer
from msp_plugin.pruning.base import InputNorm, LayerwisePruner, UnitInputs
from msp_plugin.pruning.masks import groups_of, nm_mask
from msp_plugin.pruning.sparsegpt import quadratic_form


class InputMoments(InputNorm):
    """The sums over tokens of a layer's inputs x: of their squares (see InputNorm), of x, and of x x^T where asked for.

    Args:
        gram: collect x x^T, float32[I, I].
    """

    def __init__(self, in_features: int, device: torch.device, gram: bool = False):
        super().__init__(in_features, device)
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.gram = torch.zeros(in_features, in_features, device=device) if gram else None

    def add(self, inputs: torch.Tensor) -> None:
        super().add(inputs)
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.total += flat.sum(dim=0, dtype=torch.float64)
        if self.gram is not None:
            self.gram.addmm_(flat.T, flat)

    @property
    def variance(self) -> torch.Tensor:
        """float64[I], the variance of each feature over the tokens."""
        count = max(self.tokens, 1)
        return (self.sum / count - (self.total / count).square()).clamp(min=0)


@dataclass(frozen=True)
class HalfLayer:
    """One layer of an attention or an MLP.

    Args:
        layer: with its groups.
        weight: [O, I], in the model's dtype.
        inputs: the sums of its inputs.
        score: what ``gradient_score`` gave of it, None without gradients.
    """

    layer: Layer
    weight: torch.Tensor
    inputs: InputMoments
    score: torch.Tensor | None

    def by_group(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return [G, rows of a group, I] of a matrix [O, I]; of the last layer [G, columns of a group, O]."""
        return groups_of(matrix, self.layer)


@dataclass(frozen=True)
class HalfInputs:
    """An attention or an MLP, as a method that removes its heads or channels sees it.

    Args:
        name: of its module.
        groups: G, its KV heads or channels.
        layers: in the model's order.
    """

    name: str
    groups: int
    layers: tuple[HalfLayer, ...]

    @property
    def output(self) -> HalfLayer:
        """The last layer, whose columns belong to the groups."""
        return next(part for part in self.layers if not part.layer.inner)


@dataclass(frozen=True)
class Cut:
    """What a width keeps of a half.

    Args:
        kept: bool[G].
        output: [O, I], the last layer's weight where the columns that stay make up for the others; None: as it was.
    """

    kept: torch.Tensor
    output: torch.Tensor | None = None


class WidthPruner(LayerwisePruner):
    """A method that makes widths: a subclass says in ``cuts`` which heads and channels stay. See StructuredPruner.

    All layers of a half lose the same groups. One calibration pass and one set of scores serve all widths. N:M patterns,
    and those inside a width, are Wanda's.
    """

    #: Collect x x^T of the last layer's inputs.
    keeps_gram: ClassVar[bool] = False

    @abstractmethod
    def cuts(self, half: HalfInputs, counts: Sequence[int]) -> Mapping[int, Cut]:
        """Return by count of groups what is kept.

        Raises:
            NumericsError: what decides is not finite.
        """

    def check_menu(self, menu: Sequence[Level]) -> None:
        super().check_menu([level for level in menu if not level.by_groups])

    def statistic_bytes(self, layer: Layer) -> int:
        width = layer.in_features
        return 16 * width + (4 * width**2 if self._takes_gram(layer) else 0)

    def _takes_gram(self, layer: Layer) -> bool:
        """Return True for the last layer of a half, where the method wants its x x^T."""
        return self.keeps_gram and layer.groups is not None and not layer.inner

    def layer_statistic(self, layer: Layer, module: torch.nn.Linear) -> InputMoments:
        return InputMoments(module.in_features, module.weight.device, gram=self._takes_gram(layer))

    def new_statistic(self, module: torch.nn.Linear) -> InputMoments:
        return InputMoments(module.in_features, module.weight.device)

    def wants_gradient(self, layer: Layer) -> bool:
        return layer.groups is not None

    def score(self, weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
        """Return Wanda's score, for the patterns."""
        return weight.abs() * input_norm

    def prune_unit(
        self, inputs: UnitInputs, levels: Sequence[Level]
    ) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        unit = inputs.unit
        counts = sorted({width[0] for level in levels if (width := level.width(unit))})
        cuts = self.cuts(_half(inputs), counts) if counts else {}
        for layer in unit.layers:
            yield layer.name, self._layer_weights(inputs, layer, levels, cuts)

    def _layer_weights(
        self, inputs: UnitInputs, layer: Layer, levels: Sequence[Level], cuts: Mapping[int, Cut]
    ) -> Iterator[torch.Tensor]:
        """Yield a layer's weight at each level; zeros at a width that does not fit the unit, which no unit takes."""
        module, statistic = inputs.modules[layer.name], inputs.statistics[layer.name]
        others = [level for level in levels if not level.by_groups]
        weights = self._prune_layer(module, statistic, others, layer.name)
        for level in levels:
            if not level.by_groups:
                yield next(weights)
            elif width := level.width(inputs.unit):
                count, inside = width
                yield self._narrowed(module.weight.detach(), layer, statistic, cuts[count], inside)
            else:
                yield torch.zeros_like(module.weight)

    def _narrowed(
        self, weight: torch.Tensor, layer: Layer, statistic: InputMoments, cut: Cut, inside: Pattern
    ) -> torch.Tensor:
        """Return a layer's weight with zeros for the groups that go, and with a pattern in what stays."""
        assert layer.groups is not None
        norm, columns = statistic.rms, not layer.inner
        length = layer.in_features if columns else layer.out_features
        kept = cut.kept.repeat_interleave(length // layer.groups.count)
        if columns and cut.output is not None:
            weight = cut.output.to(weight.dtype)
        part = weight[:, kept] if columns else weight[kept]
        if not inside.is_dense:
            score = self.score(part.float(), norm[kept] if columns else norm)
            part = part.masked_fill(~nm_mask(score, inside), 0)
        narrowed = torch.zeros_like(weight)
        if columns:
            narrowed[:, kept] = part
        else:
            narrowed[kept] = part
        return narrowed

    def row_errors(self, delta: torch.Tensor, statistic: InputNorm) -> torch.Tensor | None:
        """Return the errors by output feature, exact where x x^T is kept, else as if the inputs were uncorrelated."""
        if isinstance(statistic, InputMoments) and statistic.gram is not None:
            return quadratic_form(delta, statistic.gram) / max(statistic.tokens, 1)
        return super().row_errors(delta, statistic)


class StructuredPruner(WidthPruner):
    """A method that scores the heads and channels of a half and keeps the best; a subclass defines ``group_scores``."""

    @abstractmethod
    def group_scores(self, half: HalfInputs) -> torch.Tensor:
        """Return float[G], higher for KV heads or channels to keep; of equal ones the first stay."""

    def cuts(self, half: HalfInputs, counts: Sequence[int]) -> Mapping[int, Cut]:
        scores = self.group_scores(half)
        if not torch.isfinite(scores).all():
            raise NumericsError(f"method {self.name!r} gives scores that are not finite for {half.name}")
        order = scores.argsort(descending=True, stable=True)
        cuts = {}
        for count in counts:
            kept = torch.zeros(half.groups, dtype=torch.bool, device=scores.device)
            kept[order[:count]] = True
            cuts[count] = Cut(kept)
        return cuts


def _half(inputs: UnitInputs) -> HalfInputs:
    unit = inputs.unit
    assert unit.groups is not None
    layers = (
        HalfLayer(
            layer,
            inputs.modules[layer.name].weight.detach(),
            inputs.statistics[layer.name],
            inputs.scores.get(layer.name),
        )
        for layer in unit.layers
    )
    return HalfInputs(unit.name, unit.groups.count, tuple(layers))
