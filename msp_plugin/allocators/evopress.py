"""EvoPress: a (1 + lambda) evolutionary search from uniform, with few samples first.

Shape legend: U units, K levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator, Choice, TrueLoss
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem


@dataclass(frozen=True)
class EvoPress(Allocator):
    """EvoPress (arXiv 2410.14649, algorithm 1 and section 3.2; code IST-DASLab/EvoPress).

    One parent, at first uniform. Each generation draws ``offspring`` mutants and keeps the best of them in
    stages, ``survivors`` of them, each stage on more tokens; the samples of a stage are drawn anew and are
    the same for all; the parent takes part in the last stage. No crossover. A mutant differs by
    min(U{1..m}, U{1..m}) swaps: one unit a level sparser, another denser by the same count of weights. The
    defaults are the authors'.

    Deviations: (1) the authors' levels remove an equal count of weights in every layer, so that a swap is one
    level up and one down; here the level that is denser by exactly the same count is looked up, and a pair
    without one is drawn anew; in a menu whose levels are not equally far apart, a third unit makes up the
    difference. (2) Rows are units, not layers. (3) A stage asks for at most the search text
    that there is. (4) Where uniform is not in the menu, the parent is the nearest mixture on the budget.
    (5) Equal mutants are measured once, not drawn anew, so that a small model may measure fewer.

    Args:
        tokens_per_selection: forward tokens of one candidate in each stage.
        max_swaps: m, most swaps of a mutation.
        max_tokens: most forward tokens, beside those that measure the result; 0 sets no limit. The
            generation that it does not allow is left out.
        tokens: held-out calibration tokens, the text that the stages draw from.
    """

    name = "evopress"
    needs_database = True
    measures = True

    generations: int = 400
    offspring: int = 64
    survivors: tuple[int, ...] = (8, 2, 1)
    tokens_per_selection: tuple[int, ...] = (2048, 16384, 65536)
    max_swaps: int = 3
    max_tokens: int = 0
    tokens: int = 65536

    def __post_init__(self) -> None:
        for option, least in (
            ("generations", 0),
            ("offspring", 1),
            ("max_swaps", 1),
            ("max_tokens", 0),
            ("tokens", 1),
        ):
            if getattr(self, option) < least:
                raise RecipeError(f"evopress: {option} = {getattr(self, option)} must be at least {least}")
        stages, falling = len(self.survivors), (self.offspring, *self.survivors)
        if (
            stages != len(self.tokens_per_selection)
            or not stages
            or self.survivors[-1] != 1
            or sorted(falling, reverse=True) != list(falling)
            or min(self.tokens_per_selection) < 1
        ):
            raise RecipeError(
                f"evopress: survivors {self.survivors} and tokens_per_selection "
                f"{self.tokens_per_selection} are no ladder",
                hint="give both the same length; survivors fall from offspring to 1",
            )

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        rng = np.random.default_rng(inputs.seed)
        problem, loss = inputs.problem, inputs.loss
        parent = problem.uniform()
        uniform_loss = loss(parent)
        curve, evaluations = [(loss.forward_tokens, uniform_loss)], 1
        incumbents = [(loss.forward_tokens, parent)]
        least, ended = 0, f"after all of its {self.generations} generations"
        for generation in range(self.generations):
            inputs.progress(generation, self.generations)
            began = loss.forward_tokens
            if self.max_tokens and began + max(least, sum(loss.lengths)) > self.max_tokens:
                ended = "because its budget is spent"
                break
            loss.set_incumbent(parent)
            mutants = [swapped(problem, parent, self.max_swaps, rng) for _ in range(self.offspring)]
            alive = list(dict.fromkeys(mutants))
            for stage, (count, tokens) in enumerate(
                zip(self.survivors, self.tokens_per_selection, strict=True), 1
            ):
                if stage == len(self.survivors) and parent not in alive:
                    alive.insert(0, parent)  # first, so that its activations are there for the others
                samples = _draw(loss, tokens, rng)
                scores = {choice: loss(choice, samples) for choice in alive}
                evaluations += len(alive)
                alive = sorted(alive, key=lambda c: (scores[c], c))[:count]
            least = loss.forward_tokens - began
            if alive[0] != parent and np.isfinite(scores[alive[0]]):
                parent = alive[0]
                curve.append((loss.forward_tokens, scores[parent]))
                incumbents.append((loss.forward_tokens, parent))
        inputs.progress(self.generations, self.generations)
        final = loss(parent)
        if not np.isfinite(final):
            raise NumericsError("no candidate has a finite loss", hint="try dtype float32")
        curve.append((loss.forward_tokens, final))
        return AllocationResult(
            parent, final, uniform_loss, evaluations + 1, tuple(curve), incumbents=tuple(incumbents),
            ended=ended,
        )  # fmt: skip


def swapped(problem: AllocationProblem, parent: Choice, most: int, rng: np.random.Generator) -> Choice:
    """Return the parent after min(U{1..most}, U{1..most}) swaps of equal counts of weights.

    The parent itself where no swap is possible.
    """
    choice = list(parent)
    swaps = 1 + int(min(rng.integers(0, most, 2)))
    for _ in range(swaps if len(choice) > 1 else 0):
        for _attempt in range(64):
            a, b = (int(u) for u in rng.choice(len(choice), 2, replace=False))
            moves = _swap(problem, choice, a, b)
            if moves is None and _uneven(problem):
                moves = _swap_of_three(problem, choice, a, b, rng)
            if moves is not None:
                for unit, level in moves:
                    choice[unit] = level
                break
    return tuple(choice)


Moves = tuple[tuple[int, int], ...]


def _uneven(problem: AllocationProblem) -> bool:
    """True if the levels of the menu are not equally far apart."""
    kept = np.unique(problem.kept[0])
    return len(kept) > 2 and len(np.unique(np.diff(kept))) > 1


def _next(problem: AllocationProblem, choice: list[int], unit: int, denser: bool) -> tuple[int, int] | None:
    """Return (level, change of kept weights) one step denser or sparser; None if there is none."""
    kept, allowed = problem.kept[unit], problem.allowed
    change = kept - kept[choice[unit]]
    steps = [
        (abs(int(change[k])), k)
        for k in range(len(kept))
        if (change[k] > 0 if denser else change[k] < 0) and (allowed is None or allowed[unit, k])
    ]
    return None if not steps else (min(steps)[1], int(change[min(steps)[1]]))


def _swap(problem: AllocationProblem, choice: list[int], a: int, b: int) -> Moves | None:
    """Return new levels: a one level sparser, b denser by the same count; None if there is no such pair."""
    sparser, allowed = _next(problem, choice, a, denser=False), problem.allowed
    if sparser is None:
        return None
    match = np.flatnonzero(problem.kept[b] == problem.kept[b, choice[b]] - sparser[1])
    match = [k for k in match if allowed is None or allowed[b, k]]
    return ((a, sparser[0]), (b, int(match[0]))) if match else None


def _swap_of_three(
    problem: AllocationProblem, choice: list[int], a: int, b: int, rng: np.random.Generator
) -> Moves | None:
    """Return a one level sparser, b one denser, and a third unit one level, so that the counts agree."""
    sparser, denser = _next(problem, choice, a, denser=False), _next(problem, choice, b, denser=True)
    if sparser is None or denser is None:
        return None
    over = sparser[1] + denser[1]  # weights that a and b together keep more than before
    for c in rng.permutation(len(choice)):
        third = _next(problem, choice, int(c), denser=over < 0)
        if c not in (a, b) and third is not None and third[1] == -over:
            return (a, sparser[0]), (b, denser[0]), (int(c), third[0])
    return None


def _draw(loss: TrueLoss, tokens: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Return the numbers of random samples with at least ``tokens`` tokens, or all."""
    order = rng.permutation(len(loss.lengths))
    total = np.cumsum([loss.lengths[i] for i in order])
    return tuple(int(i) for i in np.sort(order[: int(np.searchsorted(total, tokens)) + 1]))
