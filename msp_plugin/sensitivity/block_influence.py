"""How much an attention or an MLP changes the hidden state that passes it.

Shape legend: B samples, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import RecipeError
from msp_plugin.models.offload import input_device
from msp_plugin.progress import Progress, silent
from msp_plugin.sensitivity.base import Estimator, half_of
from msp_plugin.structure.halves import Half, find_halves

#: From the hidden state before a half and behind it, float64[B, T, D] each, to the change of each token, [B, T].
METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cosine": lambda before, behind: 1 - torch.cosine_similarity(before, behind, dim=-1),
    "l1": lambda before, behind: (behind - before).abs().sum(-1) / before.abs().sum(-1),
    "l2": lambda before, behind: (behind - before).norm(dim=-1) / before.norm(dim=-1),
}


@dataclass(frozen=True)
class BlockInfluence(Estimator):
    """Mean over tokens of the change that a half makes to the hidden state (arXiv 2407.16286, section 3; ShortGPT).

    ``cosine`` is 1 - cos(x, x'), where x is the hidden state before the half and x' behind it; ``l1`` and ``l2`` are
    ||x' - x|| / ||x||. Each layer gets the number of its half, a whole block the sum of its two. One forward pass; sums
    are float64.

    Args:
        metric: ``cosine``, ``l1`` or ``l2``.
    """

    name = "block_influence"
    combine = "halves"

    metric: str = "cosine"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise RecipeError(
                f"block_influence: metric {self.metric!r} is unknown", hint=f"use {', '.join(METRICS)}"
            )

    @torch.no_grad()
    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        halves, change = find_halves(model), METRICS[self.metric]
        totals = {half.name: torch.zeros((), dtype=torch.float64) for half in halves}
        before: dict[str, torch.Tensor] = {}

        def enter(half: Half) -> Callable[..., None]:
            return lambda module, args: before.update({half.name: args[0].detach().double()})

        def leave(half: Half) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
                added = output[0] if isinstance(output, tuple) else output
                x = before.pop(half.name)
                totals[half.name] += change(x, x + added.double()).sum().cpu()

            return hook

        with ExitStack() as undo:
            for half in halves:
                first, *after = (model.get_submodule(norm) for norm in half.norms)
                undo.callback(first.register_forward_pre_hook(enter(half)).remove)
                last = after[-1] if after else model.get_submodule(half.name)
                undo.callback(last.register_forward_hook(leave(half)).remove)
            for done, sample in enumerate(data.samples, 1):
                model(sample[None].to(input_device(model)), use_cache=False)
                progress(done, len(data))
        found = {name: float(total) / data.tokens for name, total in totals.items()}
        return {layer: found[half_of(layer)] for layer in layers}
