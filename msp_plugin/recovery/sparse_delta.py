"""Sparse delta: training of few surviving weights, chosen once, from SPEFT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import RecipeError
from msp_plugin.models.weights import Weights
from msp_plugin.passes.gradients import BACKWARD, activation_gradients
from msp_plugin.recovery.base import RecoveryInputs
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.trained import AdapterRecovery, check_positive
from msp_plugin.recovery.weight_change import Tensors, WeightChange

SCORES = ("gradient", "saliency", "magnitude")


class ChosenWeights(WeightChange):
    """W + a sparse vector: one trained value for each chosen weight.

    Args:
        counts: by layer, how many weights are chosen; layers without any are left out.
        chosen: by layer, the flat positions of them, int32[count] or int64[count]; None if a saved adapter gives them.
    """

    name = "sparse_delta"

    def __init__(self, counts: Mapping[str, int], chosen: Mapping[str, torch.Tensor] | None = None):
        self.counts, self.chosen = dict(counts), chosen

    def options(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def changes(self, layer: str) -> bool:
        return layer in self.counts

    def start(self, layer: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"values": torch.zeros(self.counts[layer])}

    def fixed(self, layer: str) -> dict[str, torch.Tensor]:
        if self.chosen is None:
            return {"index": torch.zeros(self.counts[layer], dtype=torch.int32)}
        return {"index": self.chosen[layer]}

    def effective(self, weight: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        flat = weight.flatten().clone()
        return flat.index_add_(0, tensors["index"], tensors["values"]).view_as(weight)

    def gradients(
        self, weight: torch.Tensor, tensors: Tensors, gradient: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {"values": gradient.flatten().index_select(0, tensors["index"])}


@dataclass(frozen=True)
class SparseDelta(AdapterRecovery):
    """Training of few surviving weights, the same ones throughout.

    SPEFT (arXiv 2412.13488), which finds the gradient as good a score as any, and a choice for all steps as good as one
    that changes. Only the values, their gradients and their moments are kept: 12 bytes each, and 4 for the position.
    Deviations: only surviving weights are candidates, so that zeros stay; the gradient of a layer's weight exists for
    one layer at a time, where the authors' code keeps a dense copy of each weight for the backward pass; the scores'
    gradient is of the loss that is trained; the best of all layers are merged layer by layer instead of sorted as one
    list. The learning rate is ours, for about one million tokens: theirs (1e-5 to 2e-5) are for millions of samples of
    instructions. Choosing takes a float32 gradient of every layer, once.

    Args:
        values: how many weights are trained: at most 1 is a share of the surviving ones, above that a count.
        score: ``gradient``: |g|; ``saliency``: |W g|; ``magnitude``: |W|, which takes no gradients.
        by_layer: choose the same share in each layer, instead of the best of all layers.
        score_tokens: tokens whose mean gradient chooses.
        learning_rate: the highest one; see TrainingOptions for the others.
        norms: also train the norms and the biases of the layers.
    """

    name = "sparse_delta"

    values: float = 0.05
    score: str = "gradient"
    by_layer: bool = False
    score_tokens: int = 16384
    learning_rate: float = 1e-3
    norms: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise RecipeError(
                f"{self.name}: score {self.score!r} is unknown", hint=f"use {', '.join(SCORES)}"
            )
        check_positive(self.name, values=self.values, score_tokens=self.score_tokens)

    def check_layers(self, masks: Masks) -> None:
        if not any(self._by_layer(masks).values()) if self.by_layer else self._count(masks) < 1:
            raise RecipeError(f"{self.name}: values = {self.values} trains no weight", hint="give more")

    def _count(self, masks: Masks) -> int:
        """Return how many weights are trained."""
        surviving = sum(out * width - masks.zeros(name) for name, (out, width) in masks.shapes.items())
        if self.values > surviving:
            raise RecipeError(
                f"{self.name}: values = {self.values:,.0f}, but {surviving:,} weights survive",
                hint="give at most as many, or use full",
            )
        return int(self.values * surviving) if self.values <= 1 else int(self.values)

    def _by_layer(self, masks: Masks) -> dict[str, int]:
        """Return how many weights of each layer are trained with ``by_layer``."""
        surviving = {n: o * i - masks.zeros(n) for n, (o, i) in masks.shapes.items()}
        share = self._count(masks) / sum(surviving.values())
        return {name: int(share * left) for name, left in surviving.items()}

    def change(self, inputs: RecoveryInputs) -> ChosenWeights:
        """Return the change, whose weights are chosen by their scores on the first tokens of the data."""
        weights = Weights(inputs.model)
        gradients = self._gradients(inputs) if self.score != "magnitude" else {}

        def scores() -> Iterator[tuple[str, torch.Tensor]]:
            for name in inputs.masks:
                weight = weights[name].float()
                score = weight if self.score == "magnitude" else gradients[name]
                if self.score == "saliency":
                    score = score * weight
                yield name, score.abs().masked_fill(weight == 0, -1.0).flatten()

        if self.by_layer:
            counts = self._by_layer(inputs.masks)
            chosen = {n: best(s, counts[n]) for n, s in scores()}
        else:
            chosen = best_of_all(scores(), self._count(inputs.masks))
        chosen = {name: positions for name, positions in chosen.items() if len(positions)}
        return ChosenWeights({name: len(positions) for name, positions in chosen.items()}, chosen)

    def tokens_before(self, inputs: RecoveryInputs) -> int:
        passes = BACKWARD + bool(self.share_of_kl(inputs))  # and the dense model's forward pass
        return 0 if self.score == "magnitude" else passes * self._scored(inputs).tokens

    def _scored(self, inputs: RecoveryInputs) -> CalibrationSet:
        """Return the first ``score_tokens`` tokens of the data."""
        length = max(map(len, inputs.data.samples))
        return CalibrationSet(inputs.data.samples[: max(1, self.score_tokens // length)], "scores")

    def _gradients(self, inputs: RecoveryInputs) -> dict[str, torch.Tensor]:
        """Return by layer the mean gradient of the loss, float32[O, I], on the first ``score_tokens`` tokens."""
        data = self._scored(inputs)
        found: dict[str, torch.Tensor] = {}

        def add(name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
            gradient = (dy.T @ x).float()
            found[name] = found[name].add_(gradient) if name in found else gradient

        with (
            self.objective(inputs) as objective,
            activation_gradients(inputs.model, tuple(inputs.masks), add),
        ):
            batches = tuple(data.batches(inputs.batch_tokens))
            for done, ids in enumerate(batches, 1):
                objective.loss(inputs.model, {"input_ids": ids.to(objective.device)}).backward()
                inputs.progress("choose weights", done, len(batches))
        return found


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ascending positions of the highest scores, int32 where it holds them."""
    positions = scores.topk(count).indices.sort().values
    return positions.int() if scores.numel() <= 2**31 else positions


def best_of_all(layers: Iterable[tuple[str, torch.Tensor]], count: int) -> dict[str, torch.Tensor]:
    """Return by layer the positions of the highest scores of all layers.

    The best so far are merged with each layer, so that at most ``count`` and one layer's scores are held.
    """
    names: list[str] = []
    kept = torch.empty(0)
    where = torch.empty(0, dtype=torch.int64)
    which = torch.empty(0, dtype=torch.int32)
    for name, scores in layers:
        names.append(name)
        kept = torch.cat([kept.to(scores.device), scores])
        where = torch.cat([where.to(scores.device), torch.arange(len(scores), device=scores.device)])
        number = torch.full((len(scores),), len(names) - 1, dtype=torch.int32, device=scores.device)
        which = torch.cat([which.to(scores.device), number])
        if len(kept) > count:
            kept, order = kept.topk(count)
            where, which = where[order], which[order]
    return {name: where[which == i].sort().values.int() for i, name in enumerate(names)}
