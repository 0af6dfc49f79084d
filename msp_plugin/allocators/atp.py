"""ATP: the sparsity rises from block to block by a constant."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator, Choice
from msp_plugin.allocators.profile import blocks_of, check_within, nearest_choice
from msp_plugin.errors import NumericsError, RecipeError


@dataclass(frozen=True)
class ATP(Allocator):
    """An arithmetic progression of sparsities over the blocks (arXiv 2502.14770; wzhuang-xmu/ATP).

    Block i of L has the sparsity S - b (L - 1) / 2 + b i. The common difference b is the best of a grid from
    ``step`` to min(2S, 2 (1 - S)) / (L - 1), above which a sparsity would leave [0, 1].

    Deviations: b is chosen on held-out calibration text, where the authors use the test set. b = 0, the
    uniform allocation, is measured too, so that the result is never worse than uniform on that text. Blocks
    without prunable layers do not count in L. Of several b with the same levels only the least is measured.
    The exact budget, see allocators/profile.py.

    Args:
        step: of the grid of b, at least 1e-6.
        max_tokens: most forward tokens: as many values of b as they allow, spread over the grid; 0 measures
            all.
        loss: ``perplexity`` (its logarithm), as in the paper, or ``kl`` to the dense model; nats per token.
        tokens: held-out calibration tokens that measure a candidate.
    """

    name = "atp"
    seeded = False
    needs_database = True
    measures = True

    step: float = 0.002
    max_tokens: int = 0
    loss: str = "perplexity"
    tokens: int = 16384

    def __post_init__(self) -> None:
        check_within("atp", "step", self.step, 1e-6, 2)
        if self.tokens < 1 or self.max_tokens < 0:
            raise RecipeError(
                f"atp: tokens = {self.tokens}, max_tokens = {self.max_tokens}", hint="give at least 1 and 0"
            )
        if self.loss not in ("kl", "perplexity"):
            raise RecipeError(f"atp: loss {self.loss!r} is unknown", hint="use kl or perplexity")

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        problem, loss = inputs.problem, inputs.true_loss
        positions, weights = blocks_of(problem.table)
        candidates: dict[Choice, float] = {problem.uniform(): 0.0}
        for b in differences(float(problem.target), len(weights), self.step):
            sparsity = progression(float(problem.target), len(weights), b)
            candidates.setdefault(nearest_choice(problem, 1 - sparsity[positions]).choice, b)
        candidates = self._within_budget(candidates, sum(loss.lengths) if self.max_tokens else 1)
        scores: dict[Choice, float] = {}
        curve: list[tuple[int, float]] = []
        for done, choice in enumerate(candidates, 1):
            scores[choice] = loss(choice)
            if scores[choice] < min((point[1] for point in curve), default=np.inf):
                curve.append((loss.forward_tokens, scores[choice]))
            inputs.progress(done, len(candidates))
        uniform, best = next(iter(scores)), min(scores, key=scores.__getitem__)  # of equal losses the least b
        if not np.isfinite(scores[best]):
            raise NumericsError(
                f"none of {len(scores)} candidates has a finite loss", hint="try dtype float32"
            )
        note = f"common difference {candidates[best]:g} of {len(candidates)} that differ in their levels"
        return AllocationResult(best, scores[best], scores[uniform], len(scores), tuple(curve), notes=(note,))

    def _within_budget(self, candidates: dict[Choice, float], tokens: int) -> dict[Choice, float]:
        """Return the candidates, uniform first, that ``max_tokens`` allows to measure at ``tokens`` each."""
        most = max(1, self.max_tokens // tokens) if self.max_tokens else len(candidates)
        if len(candidates) <= most:
            return candidates
        choices = list(candidates)
        kept = {0, *(round(i * (len(choices) - 1) / max(most - 1, 1)) for i in range(most))}
        return {choices[i]: candidates[choices[i]] for i in sorted(kept)[:most]}


def differences(target: float, blocks: int, step: float) -> list[float]:
    """Return the grid of b > 0, ascending; it is empty for a single block."""
    if blocks < 2:
        return []
    most = min(2 * target, 2 * (1 - target)) / (blocks - 1)
    return [i * step for i in range(1, math.floor(most / step + 1e-9) + 1)]


def progression(target: float, blocks: int, b: float) -> np.ndarray:
    """Return the sparsity of each block, float64[L], whose mean is the target."""
    return target - b * (blocks - 1) / 2 + b * np.arange(blocks)
