"""MSP: an evolutionary search seeded from the trace of the Fisher information.

Shape legend: U units, K levels, S the target share of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator, Choice, SpentError
from msp_plugin.errors import BudgetError, NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem


@dataclass(frozen=True)
class MSP(Allocator):
    """Fisher-seeded evolutionary search (arXiv 2503.11164; a reconstruction).

    The paper publishes the principle: the Fisher trace ranks the layers and seeds the population, crossover
    and mutation keep the sparsity, the fittest survive. Ours, because they are not published: population,
    rates and fitness. The fitness is the measured loss of the model with the candidate's weights from the
    level database. Uniform is always measured, so that the result is never worse than uniform on the search
    text.

    Args:
        population: survivors of each generation, and size of the seed population.
        generations: rounds of offspring.
        offspring: candidates of a generation.
        amplitude: largest deviation of a unit's sparsity from the target in the Fisher seeds, in [0, 1].
        crossover: share of the offspring with two parents.
        max_moves: most units that a mutation moves directly, beside those that bring it back onto the budget.
        max_tokens: most forward tokens; 0 sets no limit.
        loss: ``kl`` (to the dense model, nats per token) or ``perplexity`` (its logarithm).
        tokens: held-out calibration tokens that measure a candidate.
    """

    name = "msp"
    sensitivities = ("fisher",)
    errors = ("weight",)
    needs_database = True
    measures = True

    population: int = 16
    generations: int = 40
    offspring: int = 16
    amplitude: float = 0.25
    crossover: float = 0.5
    max_moves: int = 3
    max_tokens: int = 0
    loss: str = "kl"
    tokens: int = 16384

    def __post_init__(self) -> None:
        for option, least in (
            ("population", 2),
            ("generations", 0),
            ("offspring", 1),
            ("max_moves", 1),
            ("max_tokens", 0),
            ("tokens", 1),
        ):
            if getattr(self, option) < least:
                raise RecipeError(f"msp: {option} = {getattr(self, option)} must be at least {least}")
        for option in ("amplitude", "crossover"):
            if not 0 <= getattr(self, option) <= 1:
                raise RecipeError(f"msp: {option} = {getattr(self, option)} is outside [0, 1]")
        if self.loss not in ("kl", "perplexity"):
            raise RecipeError(f"msp: loss {self.loss!r} is unknown", hint="use kl or perplexity")

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        total = self.population + self.generations * self.offspring
        if self.max_tokens:
            total = min(total, max(1, self.max_tokens // sum(inputs.true_loss.lengths)))
        measured = _Measured(inputs, self.max_tokens, total)
        ended = f"after all of its {self.generations} generations"
        try:
            self._evolve(inputs, measured)
        except SpentError:
            ended = "because its budget is spent"
            inputs.progress(total, total)
        scores = measured.scores
        best = _fittest(scores, 1)[0]
        if not np.isfinite(scores[best]):
            raise NumericsError(
                f"none of {len(scores)} candidates has a finite loss", hint="try dtype float32"
            )
        uniform = inputs.problem.uniform()
        return AllocationResult(
            best, scores[best], scores[uniform], len(scores), tuple(measured.curve), ended=ended
        )

    def _evolve(self, inputs: AllocationInputs, measured: _Measured) -> None:
        """Measure the seeds and all generations.

        Raises:
            SpentError: the budget does not allow the next measurement.
        """
        rng = np.random.default_rng(inputs.seed)
        for done, choice in enumerate(fisher_seeds(inputs, self.population, self.amplitude, rng), 1):
            measured.add(choice, done)
        weight = _relative(inputs.sensitivities["fisher"])
        for generation in range(self.generations):
            alive = _fittest(measured.scores, self.population)
            done = self.population + generation * self.offspring
            for child in range(1, self.offspring + 1):
                choice = self._child(inputs.problem, alive, measured.scores, weight, rng)
                measured.add(choice, done + child)

    def _child(
        self,
        problem: AllocationProblem,
        alive: list[Choice],
        seen: dict[Choice, float],
        weight: np.ndarray,
        rng: np.random.Generator,
    ) -> Choice:
        """Return an offspring, int[U]; one that was not measured before if eight attempts find one."""
        child = alive[0]
        for _ in range(8):
            first = alive[_rank(len(alive), rng)]
            if len(alive) > 1 and rng.random() < self.crossover:
                second = alive[_rank(len(alive), rng)]
                child = crossover(problem, first, second, weight, rng)
                if child in seen:
                    child = mutate(problem, child, self.max_moves, rng)
            else:
                child = mutate(problem, first, self.max_moves, rng)
            if child not in seen:
                break
        return child


class _Measured:
    """The measured losses of candidates.

    Attributes:
        scores: loss by choice.
        curve: (forward tokens, loss) whenever the least loss so far fell.
    """

    def __init__(self, inputs: AllocationInputs, max_tokens: int, total: int):
        self.inputs, self.max_tokens, self.total = inputs, max_tokens, total
        self.scores: dict[Choice, float] = {}
        self.curve: list[tuple[int, float]] = []

    def add(self, choice: Choice, done: int) -> None:
        """Measure a choice if it is new, the first one at any cost, and report ``done`` candidates.

        Raises:
            SpentError: the budget does not allow it.
        """
        if choice not in self.scores:
            best = min(self.scores.values(), default=np.inf)
            loss = self.inputs.measure(choice, max_tokens=self.max_tokens if self.scores else 0)
            self.scores[choice] = loss
            if loss < best:
                self.curve.append((self.inputs.true_loss.forward_tokens, loss))
        self.inputs.progress(min(done, self.total), self.total)


def fisher_seeds(
    inputs: AllocationInputs, count: int, amplitude: float, rng: np.random.Generator
) -> list[Choice]:
    """Return up to ``count`` distinct choices on the budget: uniform, then seeds from the Fisher trace.

    Two of them minimise an additive surrogate exactly: the Fisher trace per weight times the squared change
    of the weight under the method, 1/2 tr(F_u)/n_u ||W - W(level)||^2, and the same with the rank instead of
    the trace. The others rank the units by trace or by trace per weight, map the rank linearly onto densities
    in [1 - S - a, 1 - S + a] for several a, add noise, and take the nearest choice on the budget.
    """
    problem = inputs.problem
    sizes = np.array([unit.weights for unit in problem.table], dtype=np.float64)
    trace = np.asarray(inputs.sensitivities["fisher"], dtype=np.float64)
    seeds = dict.fromkeys([problem.uniform()])
    if "weight" in inputs.errors:
        for weight in (_relative(trace / sizes), _relative(_centred_rank(trace / sizes) + 1.0)):
            seeds.setdefault(problem.solve(0.5 * weight[:, None] * inputs.errors["weight"]))
    price = _relative(trace)
    for attempt in range(20 * count):
        if len(seeds) >= count:
            break
        score = trace if attempt % 2 else trace / sizes
        a = amplitude * (1 + attempt // 2 % 4) / 4
        noise = rng.normal(0.0, 0.0 if attempt < 8 else a / 4, len(sizes))
        density = 1 - float(problem.target) + a * _centred_rank(score) + noise
        seeds.setdefault(problem.repair(density, price))
    return list(seeds)


def mutate(problem: AllocationProblem, parent: Choice, max_moves: int, rng: np.random.Generator) -> Choice:
    """Return the parent, int[U], with some units moved to the next level and others moved to stay on the budget.

    min(U{1..m}, U{1..m}) units are moved, as in EvoPress (arXiv 2410.14649, section 3.2). The units that
    compensate follow from an exact solution with random prices, so that units of unequal size can compensate
    for each other.
    """
    moves = 1 + min(rng.integers(0, max_moves, 2))
    target = np.array(parent)
    pinned = rng.choice(len(parent), size=min(int(moves), max(1, len(parent) - 1)), replace=False)
    for u in pinned:
        order, step = problem.by_cost[u], rng.choice([-1, 1])
        order = order[problem.may[u, order]]
        at = np.flatnonzero(order == target[u])[0]
        target[u] = order[np.clip(at + step, 0, len(order) - 1)]
    return compensated(problem, parent, {int(u): int(target[u]) for u in pinned}, rng)


def compensated(
    problem: AllocationProblem, parent: Choice, moves: Mapping[int, int], rng: np.random.Generator
) -> Choice:
    """Return the parent, int[U], after some moves and those of other units that keep the budget, at random prices.

    Args:
        moves: by unit its new level.
    """
    price = rng.exponential(1.0, len(parent))
    cost = price[:, None] * _steps(problem, parent)
    for u, level in moves.items():
        cost[u] = np.inf
        cost[u, level] = 0.0
    return _solve_or(problem, cost, parent)


def crossover(
    problem: AllocationProblem, a: Choice, b: Choice, weight: np.ndarray, rng: np.random.Generator
) -> Choice:
    """Return a uniform crossover, int[U], moved onto the budget mostly in the least sensitive units.

    Args:
        weight: float64[U], the price of moving each unit.
    """
    mixed = tuple(x if rng.random() < 0.5 else y for x, y in zip(a, b, strict=True))
    if problem.total_kept(mixed) == problem.budget.kept:
        return mixed
    return _solve_or(problem, weight[:, None] * _steps(problem, mixed), a)


def _steps(problem: AllocationProblem, choice: Choice) -> np.ndarray:
    """Return float64[U, K], the scaled squared difference in kept weights of each level and the chosen one.

    A level with another pattern and the same count costs 1e-12, so that no unit moves to it without a reason.
    """
    rows = np.arange(len(choice))
    current = problem.kept[rows, list(choice)]
    steps: np.ndarray = ((problem.kept - current[:, None]) / problem.kept.max()) ** 2 + 1e-12
    steps[rows, list(choice)] = 0.0
    return steps


def _solve_or(problem: AllocationProblem, cost: np.ndarray, otherwise: Choice) -> Choice:
    """Return the choice of least cost, or ``otherwise`` if none is on the budget."""
    try:
        return problem.solve(cost)
    except BudgetError:  # no choice with the pinned levels is on the budget
        return otherwise


def _fittest(scores: dict[Choice, float], count: int) -> list[Choice]:
    """Return the choices with the lowest losses, best first."""
    return sorted(scores, key=lambda choice: (scores[choice], choice))[:count]


def _rank(count: int, rng: np.random.Generator) -> int:
    """Return the rank of the winner of a tournament of two among ``count`` ranked survivors."""
    return int(min(rng.integers(0, count, 2)))


def _relative(values: np.ndarray) -> np.ndarray:
    """Return values float64[U] divided by their mean, at least 1e-3, so that no unit moves freely."""
    values = np.maximum(np.asarray(values, dtype=np.float64), 0.0)
    mean = values.mean()
    return np.ones_like(values) if mean == 0 else np.maximum(values / mean, 1e-3)


def _centred_rank(values: np.ndarray) -> np.ndarray:
    """Return the ranks of values float64[U], mapped onto [-1, 1]; equal values rank in their order."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return 2 * ranks / max(len(values) - 1, 1) - 1.0
