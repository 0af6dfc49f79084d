"""What a sensitivity estimator is, and the sum over the layers of a unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.plan.units import UnitTable
from msp_plugin.progress import Progress, silent
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.ranks import ALONE, Ranks

#: Parts that are shared out, and written down, at a time.
TOGETHER = 16


class Estimator(ABC):
    """A sensitivity estimator. Subclasses are frozen dataclasses whose fields are recipe options."""

    name: ClassVar[str]
    #: How the numbers of a unit's layers become the unit's: ``sum``; ``mean``, weighted by their weights, for numbers
    #: that belong to a block or do not grow with the layer; or ``halves``, the sum over its attention and its MLP, for
    #: numbers that all layers of a half share.
    combine: ClassVar[str] = "sum"
    #: False if it looks at the weights alone.
    needs_data: ClassVar[bool] = True

    @abstractmethod
    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        """Return one number per layer name; higher means that pruning it costs more.

        The model is left as it was found: weights, hooks and ``requires_grad``. Weights are read under
        ``onloaded``, and gradients taken under ``activation_gradients``: the model may be offloaded.
        """

    def forward_tokens(self, data: CalibrationSet) -> int:
        """Return the tokens that a measurement puts through the model, a backward pass counting as two forward ones.

        Of one pass over the samples: where an estimator has to hold more than it says, it takes several.
        """
        return data.tokens if self.needs_data else 0

    def passes(self, model: torch.nn.Module, layers: Sequence[str]) -> int:
        """Return how often a measurement of these layers does what ``forward_tokens`` counts; once by default."""
        return 1

    def parts(self, data: CalibrationSet) -> Sequence[CalibrationSet]:
        """Return sets of samples whose sensitivities have those of ``data`` as their mean.

        They are measured one by one, so that ranks can share them and a run that was stopped goes on with the
        next one. By default there is one, all of it.
        """
        return (data,)


def unit_sensitivities(
    estimator: Estimator,
    model: torch.nn.Module,
    data: CalibrationSet,
    table: UnitTable,
    progress: Progress = silent,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> tuple[float, ...]:
    """Return one number per unit: the sum, or the mean by weights, over its layers.

    Args:
        journal: holds what was measured; None keeps nothing.
        ranks: share the estimator's parts.

    Raises:
        NumericsError: the estimator returned a number that is not finite.
    """
    names = tuple(layer.name for layer in table.layers)
    journal = Journal(None, {}) if journal is None else journal
    parts = estimator.parts(data)
    found: list[Mapping[str, float]] = []

    def measure(part: CalibrationSet) -> Mapping[str, float]:
        report = progress if len(parts) == 1 else silent
        found = estimator.layer_sensitivities(model, part, names, report)
        return {name: float(found[name]) for name in names}

    for first in range(0, len(parts), TOGETHER):
        chunk = parts[first : first + TOGETHER]
        found += journal.get(f"parts {first}", partial(ranks.map, measure, chunk))
        if len(parts) > 1:
            progress(len(found), len(parts))
    values = {name: sum(part[name] for part in found) / len(found) for name in names}
    bad = [name for name in names if not torch.isfinite(torch.tensor(values[name]))]
    if bad:
        raise NumericsError(
            f"sensitivity {estimator.name!r} is not finite for {len(bad)} layers, e.g. {bad[0]}",
            hint="the model's loss or activations overflow: try dtype float32",
        )
    if estimator.combine == "sum":
        return tuple(sum(values[layer.name] for layer in unit.layers) for unit in table)
    if estimator.combine == "halves":
        shared = ({half_of(layer.name): values[layer.name] for layer in unit.layers} for unit in table)
        return tuple(sum(of_half.values()) for of_half in shared)
    return tuple(
        sum(layer.weights * values[layer.name] for layer in unit.layers) / unit.weights for unit in table
    )


def half_of(layer: str) -> str:
    """Return the name of the half that a layer stands in."""
    return layer.rpartition(".")[0]
