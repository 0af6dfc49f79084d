"""Our own search: gradients at the incumbent propose, an exact solver combines, the true loss accepts.

Shape legend: U units, K levels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator, Choice
from msp_plugin.allocators.local_model import LocalModel
from msp_plugin.allocators.msp import fisher_seeds
from msp_plugin.errors import NumericsError, RecipeError

log = logging.getLogger(__name__)

#: Forward passes that the slopes of a token cost: one, and two backward passes that count as two each.
SLOPES_COST = 5
#: Most of the search text that slopes are taken from in one round: they cost five forward passes a token,
#: and their means run over several rounds anyway.
MOST_SLOPES = 0.5
#: Forward tokens of a search by default: for each unit, and at least, as those of a small model cost little.
TOKENS_PER_UNIT, LEAST_TOKENS = 2048, 2**19
#: Rounds whose mean gain is what the next one promises.
GAIN_ROUNDS = 3


@dataclass(frozen=True)
class Search(Allocator):
    """Search around an incumbent on the true loss; the default.

    It starts from the best of several cheap allocations: uniform, the exact minima of additive surrogates
    (Fisher-weighted and output error, the weight error by the Fisher trace), and rankings by the Fisher
    trace. Each round measures by gradients what a move of any unit by one or two levels would do to the loss of
    the incumbent (slopes.py: the linear term, and the Gauss-Newton curvature), averages that with what the last
    rounds found for units that did not move since, and solves the allocation exactly for this additive model
    with a price on every unit that moves. Falling prices give proposals from two moves to many: the fewer units
    move, the better the sum predicts, because moves of several units interact. The proposals are measured on a
    few samples, against the incumbent on the same ones, and the best on all; it becomes the incumbent only if
    its measured loss is lower.

    If none is, the model errs, and mostly by an amount for each move, which gradients do not see. So the moves
    of the refused proposals are measured alone; what that finds beyond the gradients' prediction is added to theirs
    until their units move, and what follows is proposed as well. What proposals did beyond their prediction is
    charged to their moves, so that the next ones avoid moves that disappointed; and where the model sees too
    few ways to gain, it is also solved with costs drawn from their standard errors.

    Each incumbent is measured on hold-out text that no proposal was measured on, and the choice returned is
    the one with the lowest mean loss over search text and hold-out: the hold-out refuses what only fits the
    search text, and both together are less noisy than either. Each round in which that mean does not fall
    doubles the samples of the next one's slopes (up to half of them) and first measurements; once proposals are
    measured on all, ``patience`` such rounds end the search. It also ends when the next round promises less than
    ``least_gain`` of what was won over uniform so far (the mean gain of the last ``GAIN_ROUNDS`` rounds is what the
    next one promises), and before the measurement that its budget does not allow; only uniform is measured in any
    case. The result says which it was.

    The method is ours. What it rests on: EvoPress (arXiv 2410.14649) for the level database, the true KL
    and few samples first; the Gauss-Newton curvature of KL from sampled labels (Martens, arXiv 1412.1193);
    HIGGS (arXiv 2411.17525) for exact allocation by an additive model of the loss; Thompson sampling
    (Russo et al., arXiv 1707.02038) for what to try where the model is uncertain.

    Args:
        rounds: most rounds.
        patience: rounds on all samples without improvement after which the search ends. More than one seldom
            finds more: integration/results/search.md has the figures.
        least_gain: share of the gain over uniform that a round must promise for the search to go on; 0 ends it by
            ``patience`` and budget alone.
        max_tokens: most forward tokens of the search, beside those that measure uniform; None: TOKENS_PER_UNIT for
            each unit of the model, LEAST_TOKENS at least; 0 sets no limit. A backward pass counts as two forward passes.
        seconds: of the search, after which nothing more is measured; 0 sets no limit. With a limit in seconds,
            equal runs may differ. Neither limit counts the sensitivities and the level database.
        seeds: allocations that the search may start from.
        screen: share of the search text that slopes are taken from and proposals are first measured on,
            at the start.
        reach: most levels that a unit moves in one round.
        proposals: most proposals of one round, and as many after moves were measured alone.
        probes: most moves that are measured alone in a round whose proposals were no better.
        decay: weight of what earlier rounds found of a unit's slopes, per round.
        loss: ``kl`` (to the dense model, nats per token) or ``perplexity`` (its logarithm).
        tokens: held-out calibration tokens that measure candidates.
        holdout: further held-out tokens, which judge incumbents with the others and tell when to stop.
    """

    name = "search"
    sensitivities = ("fisher",)
    errors = ("weight", "output", "fisher")
    needs_database = True
    measures = True

    rounds: int = 30
    patience: int = 1
    least_gain: float = 0.02
    max_tokens: int | None = None
    seconds: float = 0.0
    seeds: int = 10
    screen: float = 0.25
    reach: int = 2
    proposals: int = 5
    probes: int = 12
    decay: float = 0.7
    loss: str = "kl"
    tokens: int = 16384
    holdout: int = 8192

    def __post_init__(self) -> None:
        for option, least in (
            ("rounds", 0), ("patience", 1), ("least_gain", 0), ("seconds", 0), ("seeds", 1), ("reach", 1),
            ("proposals", 1), ("probes", 0), ("tokens", 1), ("holdout", 1),
        ):  # fmt: skip
            if not getattr(self, option) >= least:
                raise RecipeError(f"search: {option} = {getattr(self, option)} must be at least {least}")
        if self.max_tokens is not None and not self.max_tokens >= 0:
            raise RecipeError(f"search: max_tokens = {self.max_tokens} must be at least 0")
        if not 0 < self.screen <= 1 or not 0 <= self.decay <= 1:
            raise RecipeError(
                f"search: screen = {self.screen}, decay = {self.decay}",
                hint="screen is in (0, 1], decay in [0, 1]",
            )
        if self.loss not in ("kl", "perplexity"):
            raise RecipeError(f"search: loss {self.loss!r} is unknown", hint="use kl or perplexity")

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        state = _State(self, inputs)
        try:
            state.start(list(_seeds(inputs, self.seeds)))
            share, idle = self.screen, 0
            while state.goes_on(idle):
                state.report()
                state.rounds += 1
                state.round(share)
                if state.check():
                    idle = 0
                else:
                    idle, share = idle + (share == 1), min(1.0, 2 * share)
        except _SpentError:
            state.end_early()
        inputs.progress(100, 100, state.note())
        return state.result()


class _SpentError(Exception):
    """The budget does not allow the next measurement."""


@dataclass
class _State:
    """The incumbent, what is known of it, and what was measured on the way."""

    options: Search
    inputs: AllocationInputs
    incumbent: Choice = ()
    scores: dict[Choice, float] = field(default_factory=dict)
    screened: dict[tuple[Choice, tuple[int, ...]], float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    holdout: dict[Choice, float] = field(default_factory=dict)
    holdout_curve: list[tuple[int, float]] = field(default_factory=list)
    predictions: list[tuple[float, float]] = field(default_factory=list)
    best: Choice = ()
    incumbents: list[tuple[int, Choice]] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    rounds: int = 0
    probed: int = 0
    ended: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.began = self.inputs.clock() if self.options.seconds else 0.0
        self.rng = np.random.default_rng(self.inputs.seed)
        problem = self.inputs.problem
        self.local = LocalModel(len(problem.table), len(problem.menu), self.options.decay)

    @property
    def forward_tokens(self) -> int:
        return self.inputs.loss.forward_tokens + (
            self.inputs.holdout.forward_tokens if self.inputs.holdout else 0
        )

    @property
    def limit(self) -> int:
        """Most forward tokens; 0 is no limit."""
        if self.options.max_tokens is not None:
            return self.options.max_tokens
        return max(LEAST_TOKENS, TOKENS_PER_UNIT * len(self.inputs.problem.table))

    def report(self) -> None:
        """Say how far the search is: the larger share of its rounds and of its budget in tokens, in percent."""
        share = self.rounds / max(self.options.rounds, 1)
        if self.limit:
            share = max(share, self.forward_tokens / self.limit)
        self.inputs.progress(min(99, int(100 * share)), 100, self.note())

    def afford(self, tokens: int) -> None:
        """Raise _SpentError if a measurement of so many forward tokens is beyond the budget in tokens or seconds."""
        limit, seconds = self.limit, self.options.seconds
        if limit and self.forward_tokens + tokens > limit:
            raise _SpentError
        if seconds and self.inputs.clock() - self.began >= seconds:
            raise _SpentError

    def full(self, choice: Choice, *, free: bool = False) -> float:
        """Return the loss on the whole search text; a new best becomes a point of the curve."""
        if choice not in self.scores:
            if not free:
                self.afford(sum(self.inputs.loss.lengths))
            best = min(self.scores.values(), default=np.inf)
            self.scores[choice] = self.inputs.loss(choice)
            if self.scores[choice] < best:
                self.curve.append((self.forward_tokens, self.scores[choice]))
        return self.scores[choice]

    def few(self, choice: Choice, samples: tuple[int, ...]) -> float:
        """Return the loss on some samples."""
        if len(samples) == len(self.inputs.loss.lengths):
            return self.full(choice)
        if (choice, samples) not in self.screened:
            self.afford(self.tokens(samples))
            self.screened[choice, samples] = self.inputs.loss(choice, samples)
        return self.screened[choice, samples]

    def tokens(self, samples: tuple[int, ...]) -> int:
        return sum(self.inputs.loss.lengths[i] for i in samples)

    def draw(self, share: float) -> tuple[int, ...]:
        """Return the numbers of a random share of the samples, sorted."""
        count = len(self.inputs.loss.lengths)
        take = max(1, min(count, round(share * count)))
        return tuple(int(i) for i in np.sort(self.rng.choice(count, take, replace=False)))

    def start(self, seeds: Sequence[Choice]) -> None:
        """Measure the seeds on a few samples and the best two, and uniform, on all."""
        samples = self.draw(self.options.screen / 2)
        order = sorted(range(len(seeds)), key=lambda i: (self.few(seeds[i], samples), i))
        for i in sorted({0, *order[:2]}):
            self.full(seeds[i])
        self.incumbent = min(self.scores, key=lambda c: (self.scores[c], c))
        if not np.isfinite(self.scores[self.incumbent]):
            raise NumericsError(f"none of {len(seeds)} seeds has a finite loss", hint="try dtype float32")
        self.best = seeds[0]
        self._hold(self.best)
        self.incumbents.append((self.forward_tokens, self.best))
        self.check()

    def round(self, share: float) -> None:
        """Propose around the incumbent; the best proposal takes its place if its loss is lower.

        If none is, moves of the proposals are measured alone, and what follows from that is proposed.
        """
        inputs = self.inputs
        samples = self.draw(min(share, MOST_SLOPES))
        self.afford(SLOPES_COST * self.tokens(samples))
        self.local.add(self.incumbent, *inputs.loss.slopes(
            self.incumbent, samples, self.options.reach, int(self.rng.integers(2**31))
        ))  # fmt: skip
        samples = self.draw(share)
        inputs.loss.keep(self.incumbent)
        if (refused := self._try(samples)) and self.options.probes:
            self._probe(refused, samples)
            self._try(samples)

    def _try(self, samples: tuple[int, ...]) -> list[Choice]:
        """Measure proposals; return them if the incumbent stays, none if the best one takes its place."""
        now, base = self.full(self.incumbent), self.few(self.incumbent, samples)
        proposals = dict(self._proposals(samples))
        ranked = sorted(proposals, key=lambda c: (self.few(c, samples), c))
        for choice in [c for c in ranked[:2] if self.few(c, samples) < base]:
            loss = self.full(choice)
            self.predictions.append((proposals[choice], loss - now))
            if loss < now:
                self.incumbent = choice
                return []
        for choice in proposals:
            whole = choice in self.scores
            self.local.learn(choice, self.scores[choice] - now if whole else self.few(choice, samples) - base)
        return list(proposals)

    def _probe(self, proposals: Sequence[Choice], samples: tuple[int, ...]) -> None:
        """Measure moves of the proposals alone, off the budget; those of the proposals with few moves first."""
        here, base = self.incumbent, self.few(self.incumbent, samples)
        moves = dict.fromkeys(
            (u, k) for c in proposals for u, k in enumerate(c) if k != here[u] and not self.local.alone[u, k]
        )
        for u, k in list(moves)[: self.options.probes]:
            self.afford(self.tokens(samples))
            self.local.learn_alone((u, k), self.inputs.loss((*here[:u], k, *here[u + 1 :]), samples) - base)
            self.probed += 1

    def _proposals(self, samples: tuple[int, ...]) -> Iterator[tuple[Choice, float]]:
        """Yield distinct new choices with their predicted change: from few moves to many, then as drawn."""
        problem, rows = self.inputs.problem, np.arange(len(self.incumbent))
        cost = self.local.cost()
        moved = np.arange(len(problem.menu))[None, :] != np.array(self.incumbent)[:, None]
        seen = set(self.scores) | {choice for choice, on in self.screened if on == samples}
        found = 0
        top = -float(cost[np.isfinite(cost)].min())
        falling = (cost + top / 1.5**n * moved for n in range(24))
        for prices in chain(falling, self._drawn(cost, top * moved)):
            choice = problem.solve(prices)
            if choice not in seen:
                seen.add(choice)
                found += 1
                yield choice, float(cost[rows, list(choice)].sum())
            if found == self.options.proposals:
                return

    def _drawn(self, cost: np.ndarray, price: np.ndarray) -> Iterator[np.ndarray]:
        """Yield costs float64[U, K] with noise of their standard errors, each at a random price."""
        rows = np.arange(len(self.incumbent))
        for _ in range(8 * self.options.proposals):
            drawn = cost + self.rng.standard_normal(cost.shape) * self.local.deviation()
            drawn[rows, list(self.incumbent)] = 0.0
            yield drawn + 10 ** -self.rng.uniform(0, 1.5) * price

    def _hold(self, choice: Choice, *, free: bool = False) -> float:
        """Return the loss on the hold-out, on the search text where there is none."""
        if choice not in self.holdout:
            measure = self.inputs.holdout
            if measure and not free:
                self.afford(sum(measure.lengths))
            self.holdout[choice] = measure(choice) if measure else self.full(choice)
            self.holdout_curve.append((self.forward_tokens, self.holdout[choice]))
        return self.holdout[choice]

    def _judge(self, choice: Choice) -> tuple[float, float]:
        """Return the mean loss per token over search text and hold-out, then that over search text alone.

        The second decides where the first cannot: where no choice has a finite loss on the hold-out.
        """
        search, hold = self.full(choice), self._hold(choice)
        tokens = sum(self.inputs.loss.lengths)
        held = sum(self.inputs.holdout.lengths) if self.inputs.holdout else 0
        mean = (search * tokens + hold * held) / (tokens + held) if np.isfinite(hold) else np.inf
        return mean, search

    def check(self) -> bool:
        """Measure the incumbent on the hold-out; return True if it is the best so far."""
        self._hold(self.incumbent)
        if better := self._judge(self.incumbent) < self._judge(self.best):
            self.best = self.incumbent
            self.incumbents.append((self.forward_tokens, self.best))
        self.judged.append(self._judge(self.best)[0])
        return better

    def goes_on(self, idle: int) -> bool:
        """Return True if another round is worth its cost; say why if not.

        Args:
            idle: rounds on all samples without improvement.
        """
        options = self.options
        if self.rounds >= options.rounds:
            why = f"after all of its {options.rounds} rounds"
        elif idle >= options.patience:
            why = f"after {self.rounds} rounds: no proposal was better"
        elif self._promise() < options.least_gain:
            why = (
                f"after {self.rounds} rounds: the next one promises {100 * self._promise():.1f} % of what was won, "
                f"less than least_gain = {options.least_gain:g}"
            )
        else:
            return True
        self.ended = why
        return False

    def _promise(self) -> float:
        """Return the gain that the next round promises as a share of what was won over uniform; inf if nobody knows."""
        if len(self.judged) <= GAIN_ROUNDS:
            return np.inf
        won, last = self.judged_uniform() - self.judged[-1], self.judged[-1 - GAIN_ROUNDS] - self.judged[-1]
        # rounds that gained nothing are counted by patience
        return last / GAIN_ROUNDS / won if won > 0 < last and np.isfinite(won) else np.inf

    def judged_uniform(self) -> float:
        """Return the mean loss of uniform over search text and hold-out."""
        return self._judge(next(iter(self.holdout)))[0]

    def note(self) -> str:
        """Return how far the search is: round, loss of the best choice, and what that is below uniform's."""
        if not self.judged:
            return ""
        best = self.judged[-1]
        return f"round {self.rounds}, loss {best:.4f}, uniform {self.judged_uniform():.4f}"

    def end_early(self) -> None:
        """Note that the budget ended the search; uniform is measured if that has not been done."""
        self.ended = f"in round {self.rounds}: its budget is spent"
        said = f"its budget ended the search in round {self.rounds}"
        log.info(said)
        if not self.rounds:
            said = "its budget ended the search among its seeds, before the first round"
            uniform = self.inputs.problem.uniform()
            self.full(uniform, free=True)
            self._hold(uniform, free=True)
            if not self.incumbents:
                self.best = uniform
                self.incumbents.append((self.forward_tokens, self.best))
            if self.best == uniform:
                log.warning("%s: uniform is returned; give max_tokens or seconds more", said)
        self.notes = (said,) if self.options.max_tokens or self.options.seconds else ()

    def result(self) -> AllocationResult:
        uniform = next(iter(self.holdout))
        return AllocationResult(
            self.best, self.scores[self.best], self.scores[uniform], len(self.scores) + len(self.screened) + self.probed,
            tuple(self.curve), tuple(self.holdout_curve), tuple(self.predictions),
            self.notes, tuple(self.incumbents), self.ended,
        )  # fmt: skip


def _seeds(inputs: AllocationInputs, count: int) -> Iterator[Choice]:
    """Yield distinct choices: uniform, the minima of the additive surrogates, and Fisher rankings."""
    problem, seen = inputs.problem, set()
    candidates = [problem.uniform()]
    candidates += [problem.solve(inputs.errors[name]) for name in ("fisher", "output")]
    candidates += fisher_seeds(inputs, count, 0.25, np.random.default_rng(inputs.seed))
    for choice in candidates:
        if choice not in seen and len(seen) < count:
            seen.add(choice)
            yield choice
