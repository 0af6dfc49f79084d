"""EvoPress: a (1 + lambda) evolutionary search from uniform that measures most candidates on little text.

Shape legend: U units, K levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator, Choice, TrueLoss
from msp_plugin.allocators.msp import compensated
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem


@dataclass(frozen=True)
class EvoPress(Allocator):
    """EvoPress (arXiv 2410.14649, algorithm 1 and section 3.2; code IST-DASLab/EvoPress).

    One parent, at first uniform. Each generation draws ``offspring`` mutants, and selects among them in
    stages, each with more tokens and fewer survivors. The samples of a stage are drawn anew, and all
    candidates are measured on the same ones; the parent takes part in the last stage. No crossover. A mutant
    differs from the parent by min(U{1..m}, U{1..m}) swaps: one unit becomes a level sparser, another one
    denser by the same count of weights. The defaults are the authors'.

    Deviations: (1) The authors' levels remove an equal count of weights in every layer, so that a swap is one
    level up and one down. Here the level that is denser by exactly the same count is looked up; where there is none, as
    for a projection of an attention and one of an MLP, each goes one level, and as many other units as needed make up
    the difference, an exact solution at random prices. With ``dropped`` in the menu the authors swap attentions for
    attentions and MLPs for MLPs alone; here any two halves. (2) Rows are units, not layers. (3) A stage uses at most
    the whole search text. (4) Where no level has the target sparsity, the first parent is the mixture on the budget
    nearest to uniform. (5) Equal mutants are measured once instead of being replaced, so that fewer may be measured
    for a small model.

    Args:
        generations: most generations.
        offspring: mutants of a generation.
        survivors: candidates that are left after each stage.
        tokens_per_selection: forward tokens of one candidate in each stage.
        max_swaps: m, most swaps of a mutation.
        max_tokens: most forward tokens, beside those that measure the result; 0 sets no limit. A stage
            that could exceed it is not measured, and its generation changes nothing.
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
        problem, loss = inputs.problem, inputs.true_loss
        parent = problem.uniform()
        uniform_loss = loss(parent)
        curve, evaluations = [(loss.forward_tokens, uniform_loss)], 1
        incumbents = [(loss.forward_tokens, parent)]
        ended = f"after all of its {self.generations} generations"
        for generation in range(self.generations):
            report = partial(self._report, inputs, generation, f"loss {curve[-1][1]:.4f}")
            report()
            loss.set_incumbent(parent)
            best, best_loss, measured = self._generation(problem, loss, parent, rng, report)
            evaluations += measured
            if best is None:
                ended = f"because its budget is spent, after {generation} generations"
                break
            if best != parent and np.isfinite(best_loss):
                parent = best
                curve.append((loss.forward_tokens, best_loss))
                incumbents.append((loss.forward_tokens, parent))
        inputs.progress(self.generations, self.generations)
        final = loss(parent)
        if not np.isfinite(final):
            raise NumericsError("no candidate has a finite loss", hint="try dtype float32")
        curve.append((loss.forward_tokens, final))
        return AllocationResult(
            parent,
            final,
            uniform_loss,
            evaluations + 1,
            tuple(curve),
            incumbents=tuple(incumbents),
            ended=ended,
        )

    def _report(self, inputs: AllocationInputs, generation: int, note: str) -> None:
        """Report progress: the share of the generations that is done or of the budget that is spent, whichever is larger."""
        spent = inputs.true_loss.forward_tokens / self.max_tokens if self.max_tokens else 0.0
        done = min(self.generations, max(generation, int(spent * self.generations)))
        inputs.progress(done, self.generations, f"generation {generation + 1}, {note}")

    def _generation(
        self,
        problem: AllocationProblem,
        loss: TrueLoss,
        parent: Choice,
        rng: np.random.Generator,
        report: Callable[[], None],
    ) -> tuple[Choice | None, float, int]:
        """Return (best candidate, its loss on the last samples, count of measurements) of a generation.

        The candidate is None if the budget does not allow a stage.

        Args:
            report: called after each measurement.
        """
        mutants = [swapped(problem, parent, self.max_swaps, rng) for _ in range(self.offspring)]
        alive, scores, measured = list(dict.fromkeys(mutants)), dict[Choice, float](), 0
        stages = zip(self.survivors, self.tokens_per_selection, strict=True)
        for stage, (count, tokens) in enumerate(stages, 1):
            if stage == len(self.survivors) and parent not in alive:
                alive.insert(0, parent)  # first, so that the others reuse its activations
            samples = draw_samples(loss, tokens, rng)
            most = loss.forward_tokens + len(alive) * sum(loss.lengths[i] for i in samples)
            if self.max_tokens and most > self.max_tokens:
                return None, np.inf, measured
            scores = dict[Choice, float]()
            for choice in alive:
                scores[choice] = loss(choice, samples)
                report()
            measured += len(alive)
            alive = sorted(alive, key=lambda choice: (scores[choice], choice))[:count]
        return alive[0], scores[alive[0]], measured


def swapped(problem: AllocationProblem, parent: Choice, most: int, rng: np.random.Generator) -> Choice:
    """Return the parent after min(U{1..most}, U{1..most}) swaps of equal counts of weights, int[U].

    It is the parent itself if no swap is possible.
    """
    choice = list(parent)
    swaps = 1 + int(min(rng.integers(0, most, 2)))
    for _ in range(swaps if len(choice) > 1 else 0):
        for _attempt in range(64):
            a, b = (int(u) for u in rng.choice(len(choice), 2, replace=False))
            moves = _swap(problem, choice, a, b) or _swap_of_many(problem, choice, a, b, rng)
            if moves is not None:
                for unit, level in moves:
                    choice[unit] = level
                break
    return tuple(choice)


#: (unit, its new level) of each unit that moves.
Moves = tuple[tuple[int, int], ...]


def _next(problem: AllocationProblem, choice: list[int], unit: int, denser: bool) -> tuple[int, int] | None:
    """Return (level, change of kept weights) of a unit's next denser or sparser level, if any."""
    kept, may = problem.kept[unit], problem.may[unit]
    change = kept - kept[choice[unit]]
    steps = [
        (abs(int(change[k])), k)
        for k in range(len(kept))
        if may[k] and (change[k] > 0 if denser else change[k] < 0)
    ]
    return None if not steps else (min(steps)[1], int(change[min(steps)[1]]))


def _swap(problem: AllocationProblem, choice: list[int], a: int, b: int) -> Moves | None:
    """Return the moves of a to its next sparser level and of b to one as much denser, if any."""
    sparser = _next(problem, choice, a, denser=False)
    if sparser is None:
        return None
    equal = np.flatnonzero(problem.kept[b] == problem.kept[b, choice[b]] - sparser[1])
    denser = [int(k) for k in equal if problem.may[b, k]]
    return ((a, sparser[0]), (b, denser[0])) if denser else None


def _swap_of_many(
    problem: AllocationProblem, choice: list[int], a: int, b: int, rng: np.random.Generator
) -> Moves | None:
    """Return the moves of a by one level sparser, of b by one denser, and of the units that make up the difference.

    Where layers of unequal sizes trade, those are mostly several; None if there are none.
    """
    sparser, denser = _next(problem, choice, a, denser=False), _next(problem, choice, b, denser=True)
    if sparser is None or denser is None:
        return None
    swapped = compensated(problem, tuple(choice), {a: sparser[0], b: denser[0]}, rng)
    return tuple((u, k) for u, k in enumerate(swapped) if k != choice[u]) or None


def draw_samples(loss: TrueLoss, tokens: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Return sorted numbers of random samples with at least ``tokens`` tokens, or of all samples."""
    order = rng.permutation(len(loss.lengths))
    total = np.cumsum([loss.lengths[i] for i in order])
    return tuple(int(i) for i in np.sort(order[: int(np.searchsorted(total, tokens)) + 1]))
