"""What the loss rises by when attentions and MLPs are taken out: one by one, or in random orders.

Shape legend: H halves.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import RecipeError
from msp_plugin.models.offload import input_device
from msp_plugin.passes.losses import summed_cross_entropy
from msp_plugin.progress import Progress, silent
from msp_plugin.sensitivity.base import Estimator, half_of
from msp_plugin.structure.halves import find_halves, without


class _TakenOut(Estimator):
    """Mean rise of the cross entropy, nats per token, when a half is taken out; each layer gets that of its half."""

    combine: ClassVar[str] = "halves"
    samples: int

    @abstractmethod
    def removals(self, count: int) -> list[list[np.ndarray]]:
        """Return by round the runs of halves that are taken out one after the other, each run from the whole model."""

    def forward_tokens(self, data: CalibrationSet) -> int:
        return sum(map(len, data.samples[: self.samples]))

    def passes(self, model: torch.nn.Module, layers: Sequence[str]) -> int:
        count = len(set(map(half_of, layers)))
        return 1 + count * len(self.removals(count))

    def parts(self, data: CalibrationSet) -> tuple[CalibrationSet, ...]:
        return tuple(CalibrationSet((sample,), data.source) for sample in data.samples[: self.samples])

    @torch.no_grad()
    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        asked = set(map(half_of, layers))
        halves = [half for half in find_halves(model) if half.name in asked]
        chosen = data.samples[: self.samples]
        done, total = 0, self.passes(model, layers)

        def loss(removed: Sequence[int]) -> float:
            nonlocal done
            done += 1
            with without(model, [halves[number] for number in removed]):
                losses = [_cross_entropy(model, sample) for sample in chosen]
            progress(done, total)
            return sum(losses) / len(losses)

        rises = mean_rises(loss, self.removals(len(halves)), len(halves))
        found = {half.name: float(rise) for half, rise in zip(halves, rises, strict=True)}
        return {layer: found[half_of(layer)] for layer in layers}


@dataclass(frozen=True)
class LeaveOneOut(_TakenOut):
    """Rise of the cross entropy, nats per token, when this half alone is taken out (arXiv 2407.16286, section 3).

    Deviation: the authors also sample sets of half the layers; see ``shapley`` for those.

    Args:
        samples: calibration samples that are used, the first ones. One forward pass for each half.
    """

    name = "leave_one_out"

    samples: int = 16

    def __post_init__(self) -> None:
        _check(self.name, samples=self.samples)

    def removals(self, count: int) -> list[list[np.ndarray]]:
        return [[np.array([number]) for number in range(count)]]


@dataclass(frozen=True)
class Shapley(_TakenOut):
    """Shapley value of a half by sampled orders: the mean rise of the cross entropy when it goes after some others.

    The value of a set of halves is minus the cross entropy of the model that holds them, nats per token (arXiv
    2407.16286, section 3); orders are sampled as by Castro, Gomez and Tejada (2009): each round draws one, takes the
    halves out in it, and gives each the rise that it makes. With ``share`` below 1 an order is cut into runs of so
    many halves, each of which begins at the whole model: what a half is worth where nearly all are gone says
    nothing of a model that lost a fifth of them, and has the larger spread. A share of 1 is the Shapley value; with
    one half a run it is ``leave_one_out``. One forward pass for each half and round.

    Deviation: the authors compare random sets with and without a half, of half the layers each.

    Args:
        samples: calibration samples that are used, the first ones.
        rounds: orders that are drawn.
        share: of the halves that a run takes out, in (0, 1].
        seed: of the orders.
    """

    name = "shapley"

    samples: int = 4
    rounds: int = 8
    share: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.name, samples=self.samples, rounds=self.rounds)
        if not 0 < self.share <= 1:
            raise RecipeError(f"shapley: share = {self.share} is outside (0, 1]")

    def removals(self, count: int) -> list[list[np.ndarray]]:
        rng = np.random.default_rng(self.seed)
        runs = -(-count // max(1, round(self.share * count)))
        return [np.array_split(rng.permutation(count), runs) for _ in range(self.rounds)]


def mean_rises(
    loss: Callable[[Sequence[int]], float], removals: Sequence[Sequence[np.ndarray]], count: int
) -> np.ndarray:
    """Return float64[H], the mean over rounds of the rise of a loss when each half goes.

    Args:
        loss: of the model without some halves, by their numbers in increasing order.
        removals: by round the runs, each int[n]; a round takes out each half once.
        count: H.
    """
    rises, whole = np.zeros(count), loss(())
    for runs in removals:
        for run in runs:
            before = whole
            for gone, half in enumerate(run, 1):
                behind = loss(sorted(int(number) for number in run[:gone]))
                rises[half] += behind - before
                before = behind
    return rises / len(removals)


def _cross_entropy(model: torch.nn.Module, sample: torch.Tensor) -> float:
    """Return the mean cross entropy of a sample's next tokens, nats."""
    ids = sample[None].to(input_device(model))
    logits = model(ids, use_cache=False).logits[0, :-1]
    return summed_cross_entropy(logits, ids[0, 1:]) / (ids.shape[1] - 1)


def _check(name: str, **options: int) -> None:
    for option, value in options.items():
        if value < 1:
            raise RecipeError(f"{name}: {option} = {value} must be at least 1")
