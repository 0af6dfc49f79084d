"""Policy gradient: learn how likely each level of each unit is, from losses of random choices alone.

Shape legend: U units, K levels, M choices of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator, Choice
from msp_plugin.allocators.evopress import draw_samples
from msp_plugin.allocators.profile import finite_scores
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem

#: Keeps the step finite where a level is certain or impossible (the authors' 1e-7).
EPSILON = 1e-7
#: Weights by which the mean of a projected policy may miss the budget, in those of the largest unit.
TOLERANCE = 1e-10


@dataclass(frozen=True)
class PolicyGradient(Allocator):
    """Bypass back-propagation (arXiv 2406.10576; code ethanygao/backprop-free_LLM_pruning): forward passes only.

    Each unit has a probability for each level, float64[U, K]. A step draws M choices, measures them on the same samples, and
    moves the probabilities towards the levels of choices that were better than a moving average of the losses: for each
    level by the sum over the choices, divided by M - 1, of (loss - average) * (drawn - p) / sqrt(p (1 - p)), where ``drawn`` is 1 for the level that was
    drawn, with a rate that falls to zero as a cosine. Then it takes the nearest probabilities (Euclidean) under which
    a choice keeps the budget's weights on average. The result is the most probable choice on the exact budget.

    With ``dense`` and ``dropped`` the steps are the authors' on keep probabilities. Deviations: (1) any menu: a
    distribution over levels instead of a probability to be kept. (2) One projection onto the budget in weights, where the
    authors have two, of heads and of channels, each by count, and no equality. (3) The result is rounded by the exact
    solver, where theirs takes ties beyond the count. (4) They start from Wanda scores of heads and channels; here the
    start is a softmax of the standardised sensitivity ``start`` times the share that a level keeps. (5) KL to the dense
    model by default, where they take the language model's loss (``perplexity``). Their rate, M, average and
    1,024 tokens for each choice of a step, whole samples at least; their 15,000 steps are 31 million tokens.

    Args:
        steps: of the probabilities, fewer if ``max_tokens`` does not allow so many.
        choices: M, choices of a step, at least 2.
        rate: of the first step.
        window: of the moving average, in steps.
        tokens_per_step: tokens that each choice of a step is measured on.
        start: the estimator that the first probabilities come from; an empty text: equal ones, moved onto the budget,
            also for models whose attentions and MLPs ``block_influence`` does not know.
        max_tokens: most forward tokens, with those that measure uniform and the result; 0 sets no limit.
        loss: ``kl`` (to the dense model, nats per token) or ``perplexity`` (its logarithm).
        tokens: held-out calibration tokens, the text that steps draw from.
    """

    name = "policy_gradient"
    needs_database = True
    measures = True

    steps: int = 15000
    choices: int = 2
    rate: float = 2e-3
    window: int = 5
    tokens_per_step: int = 1024
    start: str = "block_influence"
    max_tokens: int = 0
    loss: str = "kl"
    tokens: int = 65536

    def __post_init__(self) -> None:
        for option, least in (
            ("steps", 0), ("choices", 2), ("window", 1), ("tokens_per_step", 1), ("max_tokens", 0), ("tokens", 1),
        ):  # fmt: skip
            if getattr(self, option) < least:
                raise RecipeError(
                    f"policy_gradient: {option} = {getattr(self, option)} must be at least {least}"
                )
        if not self.rate > 0:
            raise RecipeError(f"policy_gradient: rate = {self.rate} must be above 0")
        if self.loss not in ("kl", "perplexity"):
            raise RecipeError(f"policy_gradient: loss {self.loss!r} is unknown", hint="use kl or perplexity")

    @property
    def sensitivities(self) -> tuple[str, ...]:  # type: ignore[override] # a class attribute that may be a property
        return (self.start,) if self.start else ()

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        problem, loss = inputs.problem, inputs.true_loss
        rng = np.random.default_rng(inputs.seed)
        uniform = problem.uniform()
        uniform_loss = loss(uniform)
        curve, average, measured = [(loss.forward_tokens, uniform_loss)], np.nan, 1
        steps, whole, ended = self.steps, sum(loss.lengths), ""
        if self.max_tokens:
            length = whole / len(loss.lengths)
            drawn_tokens = min(math.ceil(self.tokens_per_step / length) * length, whole)
            steps = min(steps, int(max(0, self.max_tokens - 2 * whole) / (self.choices * drawn_tokens)))
        policy = self._start(inputs)
        for step in range(steps):
            samples = draw_samples(loss, self.tokens_per_step, rng)
            cost = self.choices * sum(loss.lengths[i] for i in samples)
            if self.max_tokens and loss.forward_tokens + cost + whole > self.max_tokens:
                ended = f"its budget is spent after {step} steps"
                break
            drawn = [draw_choice(policy, rng) for _ in range(self.choices)]
            losses = np.array([loss(choice, samples) for choice in drawn])
            measured += len(drawn)
            finite = np.flatnonzero(
                np.isfinite(losses)
            )  # like the authors, without choices whose loss overflows
            if len(finite) >= 2:
                mean = losses[finite].mean()
                average = mean if np.isnan(average) else average + (mean - average) / self.window
                gradient = loss_gradient(policy, [drawn[i] for i in finite], losses[finite] - average)
                rate = self.rate / 2 * (1 + np.cos(np.pi * step / steps))
                policy = on_budget(problem, policy - rate * gradient)
            inputs.progress(step + 1, steps, f"loss of a drawn choice {average:.4f}")
        choice = problem.solve(-np.log(np.maximum(policy, EPSILON)))
        found = loss(choice)
        if not np.isfinite(found):
            raise NumericsError("the most probable choice has no finite loss", hint="try dtype float32")
        curve.append((loss.forward_tokens, found))
        return AllocationResult(
            choice, found, uniform_loss, measured + 1, tuple(curve),
            incumbents=((curve[0][0], uniform), (loss.forward_tokens, choice)),
            ended=ended or f"after {steps} steps",
        )  # fmt: skip

    def _start(self, inputs: AllocationInputs) -> np.ndarray:
        """Return the first probabilities, float64[U, K]."""
        problem, table = inputs.problem, inputs.problem.table
        score = np.zeros(len(table))
        if self.start:
            score = finite_scores(table, self.start, inputs.sensitivities[self.start])
            score = (score - score.mean()) / (score.std() or 1.0)
        share = problem.kept / np.array([unit.weights for unit in table])[:, None]
        odds = np.exp(score[:, None] * share)
        return on_budget(problem, odds / odds.sum(axis=1, keepdims=True))


def on_budget(problem: AllocationProblem, values: np.ndarray) -> np.ndarray:
    """Return the probabilities, float64[U, K], nearest to some values, that keep the budget's weights on average.

    The nearest in the Euclidean sense are those of ``values - price * kept`` nearest to distributions, for the price
    that meets the budget.
    """
    cost = problem.kept / problem.kept.max()
    goal = problem.budget.kept / problem.kept.max()

    def nearest(price: float) -> np.ndarray:
        return _distributions(np.where(problem.may, values - price * cost, -np.inf))

    def over(price: float) -> float:
        return float((nearest(price) * cost).sum() - goal)  # falls with the price, piecewise linear

    low, high = -1.0, 1.0
    while over(low) < 0 and low > -1e12:
        low *= 2
    while over(high) > 0 and high < 1e12:
        high *= 2
    return nearest(_zero(over, low, high))


def _zero(falling: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function between ``low`` and ``high`` is zero, by false position (Illinois)."""
    above, below, side, at = falling(low), falling(high), 0, low
    for _ in range(100):
        if above <= 0 or below >= 0:  # no more than rounding is left
            return low if above <= 0 else high
        at = (low * below - high * above) / (below - above)
        value = falling(at)
        if abs(value) < TOLERANCE:
            return at
        if value > 0:
            low, above, below, side = at, value, below / 2 if side > 0 else below, 1
        else:
            high, below, above, side = at, value, above / 2 if side < 0 else above, -1
    return at


def _distributions(values: np.ndarray) -> np.ndarray:
    """Return the distributions nearest to each row, float64[U, K] (Duchi et al., ICML 2008, figure 1); -inf gets 0."""
    falling = -np.sort(-values, axis=1)
    sums = np.where(np.isfinite(falling), falling, 0.0).cumsum(axis=1) - 1
    count = np.arange(1, values.shape[1] + 1)
    last = (falling * count > sums).sum(axis=1) - 1
    rows = np.arange(len(values))
    shift = sums[rows, last] / count[last]
    nearest: np.ndarray = np.maximum(values - shift[:, None], 0.0)
    return nearest


def draw_choice(policy: np.ndarray, rng: np.random.Generator) -> Choice:
    """Return a random choice, int[U], each unit's level by its own probabilities."""
    upper = policy.cumsum(axis=1)
    levels = (rng.random(len(policy))[:, None] * upper[:, -1:] >= upper).sum(axis=1)
    return tuple(int(k) for k in np.minimum(levels, policy.shape[1] - 1))


def loss_gradient(policy: np.ndarray, drawn: list[Choice], beyond: np.ndarray) -> np.ndarray:
    """Return the gradient, float64[U, K], of the expected loss, divided by the deviation of each level's being drawn.

    Args:
        drawn: choices of a step.
        beyond: float64[M], their losses minus the average.
    """
    levels = np.arange(policy.shape[1])
    deviation = np.sqrt((policy + EPSILON) * (1 - policy + EPSILON))
    total = sum(
        part * ((np.array(choice)[:, None] == levels) - policy)
        for choice, part in zip(drawn, beyond, strict=True)
    )
    gradient: np.ndarray = total / deviation / (len(drawn) - 1)
    return gradient
