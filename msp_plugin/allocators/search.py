"""Our own search: gradients at the incumbent propose, an exact solver combines, the measured loss accepts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from msp_plugin.allocators.base import (
    MOVE_GRADIENT_PASSES,
    AllocationInputs,
    AllocationResult,
    Allocator,
    Choice,
    SpentError,
)
from msp_plugin.allocators.budgeted_losses import BudgetedLosses
from msp_plugin.allocators.local_model import LocalModel
from msp_plugin.allocators.proposals import make_proposals, make_seeds
from msp_plugin.allocators.selection import Selection
from msp_plugin.errors import NumericsError, RecipeError

log = logging.getLogger(__name__)

#: Most of the search text that move gradients are taken from in one round: they cost five forward passes a token,
#: and their means run over several rounds anyway.
MOST_GRADIENTS = 0.5
#: Forward tokens of a search by default: for each unit, and the least number of passes over search text and hold-out,
#: of which the seeds alone take about three.
TOKENS_PER_UNIT, LEAST_READINGS = 2048, 16


@dataclass(frozen=True)
class Search(Allocator):
    """Search around an incumbent on the measured loss; the default.

    The start is the best of several cheap allocations: uniform, the exact minima of two additive surrogates (the
    K-FAC error, the weight error by the Fisher trace), and rankings by the Fisher trace.

    A round measures by gradients what a move of any unit by one or two levels does to the loss of the incumbent
    (TrueLoss.move_gradients: the first-order change, and the Gauss-Newton curvature), and averages that with the
    last rounds' gradients of units that did not move since. It solves the allocation exactly for this additive
    model with a price on every unit that moves. Falling prices give proposals from two moves to many: the fewer
    units move, the better the sum predicts, because moves of several units interact. The proposals are measured
    on a few samples, against the incumbent on the same ones, and the best on all samples. The best becomes the
    incumbent only if its measured loss is lower.

    If none is, the model errs, mostly by an amount for each move, which gradients do not see. So single moves of
    the refused proposals are measured. Their errors of prediction correct the model until their units move, and
    new proposals are measured. The errors of the proposals are charged to their moves, so that the next ones
    avoid moves that disappointed; where the model sees too few ways to gain, it is also solved with costs drawn
    from their standard errors.

    Each incumbent is measured on hold-out text that no proposal was measured on. The result is the incumbent with
    the lowest mean loss over search text and hold-out: the hold-out refuses what only fits the search text, and
    both together are less noisy than either. Each round in which that mean does not fall doubles the samples of
    the next one's gradients (up to half of them) and first measurements; once proposals are measured on all,
    ``patience`` such rounds end the search. It also ends when the next round promises less than ``least_gain`` of
    the gain over uniform so far, and before a measurement that its budget does not allow; only uniform is measured
    in any case. ``ended`` of the result says which it was.

    The method is ours. It rests on EvoPress (arXiv 2410.14649): level database, true KL, few samples first; on
    the Gauss-Newton curvature of KL from sampled labels (Martens, arXiv 1412.1193); on HIGGS (arXiv 2411.17525):
    exact allocation by an additive model of the loss; on Thompson sampling (Russo et al., arXiv 1707.02038).

    Args:
        rounds: most rounds.
        patience: rounds on all samples without improvement after which the search ends. More than one seldom
            finds more: integration/results/search.md has the figures.
        least_gain: share of the gain over uniform that a round must promise for the search to go on; 0 ends it by
            ``patience`` and budget alone.
        max_tokens: most forward tokens of the search, beside those that measure uniform; None: TOKENS_PER_UNIT for
            each unit of the model, at least LEAST_READINGS passes over search text and hold-out; 0 sets no limit. A
            backward pass counts as two forward passes.
        seconds: of the search, after which nothing more is measured; 0 sets no limit. With a limit in seconds,
            equal runs may differ. Neither limit counts the sensitivities and the level database.
        seeds: allocations that the search may start from.
        screen: share of the search text that gradients are taken from and proposals are first measured on, at first.
        reach: most levels that a unit moves in one round, counted in the order of what it keeps at them.
        proposals: most proposals of one round, and as many after single moves were measured.
        probes: most single moves that are measured in a round whose proposals were no better.
        decay: weight of earlier rounds' gradients of a unit, per round.
        loss: ``kl`` (to the dense model, nats per token) or ``perplexity`` (its logarithm).
        tokens: held-out calibration tokens that measure candidates.
        holdout: further held-out tokens, which judge incumbents with the others and tell when to stop.
    """

    name = "search"
    sensitivities = ("fisher",)
    errors = ("weight", "kfac")
    needs_database = True
    measures = True

    rounds: int = 30
    patience: int = 1
    least_gain: float = 0.02
    max_tokens: int | None = None
    seconds: float = 0.0
    seeds: int = 8
    screen: float = 0.25
    reach: int = 2
    proposals: int = 5
    probes: int = 12
    decay: float = 0.7
    loss: str = "kl"
    tokens: int = 16384
    holdout: int = 8192

    def __post_init__(self) -> None:
        options = dict.fromkeys(("rounds", "least_gain", "seconds", "probes"), 0)
        options |= dict.fromkeys(("patience", "seeds", "reach", "proposals", "tokens", "holdout"), 1)
        for option, least in options.items():
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
            state.start(list(make_seeds(inputs, self.seeds)))
            share, idle = self.screen, 0
            while state.goes_on(idle):
                state.run_round(share)
                if state.selection.update(state.incumbent):
                    idle = 0
                else:
                    idle, share = idle + (share == 1), min(1.0, 2 * share)
        except SpentError:
            state.end_early()
        inputs.progress(100, 100, state.note())
        return state.result()

    def token_limit(self, units: int) -> int:
        """Return the most forward tokens of a search over so many units; 0 is no limit."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max(TOKENS_PER_UNIT * units, LEAST_READINGS * (self.tokens + self.holdout))


class _State:
    """A search between two rounds: its incumbent, its losses, its local model, and its selection of a result."""

    def __init__(self, options: Search, inputs: AllocationInputs):
        self.options, self.inputs = options, inputs
        units, levels = len(inputs.problem.table), len(inputs.problem.menu)
        self.losses = BudgetedLosses(inputs, options.token_limit(units), options.seconds, self.report)
        self.selection = Selection(self.losses)
        self.local = LocalModel(units, levels, options.decay)
        self.rng = np.random.default_rng(inputs.seed)
        self.incumbent: Choice = ()
        #: (predicted, measured) change of the loss by each proposal that was measured on all samples.
        self.predictions: list[tuple[float, float]] = []
        self.rounds = 0
        self.ended = ""
        self.notes: tuple[str, ...] = ()

    def start(self, seeds: Sequence[Choice]) -> None:
        """Measure the seeds on a few samples, and uniform and the best one on all."""
        losses, samples = self.losses, self.losses.draw_samples(self.options.screen / 2, self.rng)
        order = sorted(range(len(seeds)), key=lambda i: (losses.screening_loss(seeds[i], samples), i))
        for i in sorted({0, order[0]}):
            losses.search_loss(seeds[i])
        self.incumbent = min(losses.search, key=lambda c: (losses.search[c], c))
        if not np.isfinite(losses.search[self.incumbent]):
            raise NumericsError(f"none of {len(seeds)} seeds has a finite loss", hint="try dtype float32")
        self.selection.set_best(seeds[0])
        self.selection.update(self.incumbent)

    def run_round(self, share: float) -> None:
        """Propose around the incumbent; the best proposal takes its place if its loss is lower.

        If none is, single moves of the proposals are measured, and what follows from that is proposed.
        """
        self.rounds += 1
        self.report()
        loss = self.inputs.true_loss
        samples = self.losses.draw_samples(min(share, MOST_GRADIENTS), self.rng)
        self.losses.check_budget(self._least_tokens(samples, share))
        seed = int(self.rng.integers(2**31))
        self.local.add(
            self.incumbent, *loss.move_gradients(self.incumbent, samples, self.options.reach, seed)
        )
        self.report()
        samples = self.losses.draw_samples(share, self.rng)
        loss.set_incumbent(self.incumbent)
        if (refused := self._measure_proposals(samples)) and self.options.probes:
            self._measure_single_moves(refused, samples)
            self._measure_proposals(samples)

    def _least_tokens(self, samples: tuple[int, ...], share: float) -> int:
        """Return the forward tokens of a round whose first proposal takes the incumbent's place.

        With less nothing that a round finds could become the result.

        Args:
            samples: those of the gradients.
            share: of the search text that proposals are first measured on, beside the incumbent.
        """
        text, holdout = self.inputs.true_loss, self.inputs.holdout
        tokens = MOVE_GRADIENT_PASSES * self.losses.tokens(samples) + sum(text.lengths)
        tokens += round(share * sum(text.lengths)) if share < 1 else 0
        return tokens + (sum(holdout.lengths) if holdout else 0)

    def _measure_proposals(self, samples: tuple[int, ...]) -> list[Choice]:
        """Measure proposals; return them if the incumbent stays, none if the best one takes its place."""
        losses = self.losses
        now = losses.search_loss(self.incumbent)
        base = losses.screening_loss(self.incumbent, samples)
        known = set(losses.search) | {choice for choice, on in losses.screening if on == samples}
        proposals = dict(
            make_proposals(self.inputs.problem, self.local, known, self.options.proposals, self.rng)
        )
        ranked = sorted(proposals, key=lambda c: (losses.screening_loss(c, samples), c))
        for choice in [c for c in ranked[:2] if losses.screening_loss(c, samples) < base]:
            change = losses.search_loss(choice) - now
            self.predictions.append((proposals[choice], change))
            if losses.search[choice] < now:
                self.incumbent = choice
                return []
        for choice in proposals:
            if choice in losses.search:
                change = losses.search[choice] - now
            else:
                change = losses.screening_loss(choice, samples) - base
            self.local.correct_joint_move(choice, change)
        return list(proposals)

    def _measure_single_moves(self, proposals: Sequence[Choice], samples: tuple[int, ...]) -> None:
        """Measure moves of the proposals one at a time, those of the proposals with few moves first.

        A single move leaves the budget of weights, so that it is no proposal itself.
        """
        here, base = self.incumbent, self.losses.screening_loss(self.incumbent, samples)
        moves = dict.fromkeys(
            (u, k)
            for choice in proposals
            for u, k in enumerate(choice)
            if k != here[u] and not self.local.measured[u, k]
        )
        for u, k in list(moves)[: self.options.probes]:
            loss = self.losses.single_move_loss((*here[:u], k, *here[u + 1 :]), samples)
            self.local.correct_move((u, k), loss - base)

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
        elif (promise := self.selection.promised_gain()) < options.least_gain:
            why = (
                f"after {self.rounds} rounds: the next one promises {100 * promise:.1f} % of what was won, "
                f"less than least_gain = {options.least_gain:g}"
            )
        else:
            return True
        self.ended = why
        return False

    def report(self) -> None:
        """Report the larger share of the finished rounds and of the budget in tokens, in percent."""
        share, limit = max(0, self.rounds - 1) / max(self.options.rounds, 1), self.losses.max_tokens
        if limit:
            share = max(share, self.losses.forward_tokens / limit)
        self.inputs.progress(min(99, int(100 * share)), 100, self.note())

    def note(self) -> str:
        """Return the round, the selection losses of the best choice and of uniform, and the gain so far."""
        if not self.selection.history:
            best = min(self.losses.search.values(), default=None)
            return "start" if best is None else f"start, loss {best:.4f}"
        best, uniform = self.selection.history[-1], self.selection.uniform_loss
        return f"round {self.rounds}, loss {best:.4f}, uniform {uniform:.4f}, gain {uniform - best:.4f}"

    def end_early(self) -> None:
        """Note that the budget ended the search; measure uniform if that was not done."""
        self.ended = f"in round {self.rounds}: its budget is spent"
        note = f"its budget ended the search in round {self.rounds}"
        log.info(note)
        if not self.rounds:
            note = "its budget ended the search among its seeds, before the first round"
            uniform = self.inputs.problem.uniform()
            self.losses.search_loss(uniform, free=True)
            self.losses.holdout_loss(uniform, free=True)
            if not self.selection.incumbents:
                self.selection.set_best(uniform)
            with suppress(SpentError):  # there may be no more for its hold-out
                self.selection.update(min(self.losses.search, key=lambda c: (self.losses.search[c], c)))
            if self.selection.best == uniform:
                log.warning("%s: uniform is returned; give max_tokens or seconds more", note)
        self.notes = (note,) if self.options.max_tokens or self.options.seconds else ()

    def result(self) -> AllocationResult:
        losses, selection = self.losses, self.selection
        return AllocationResult(
            selection.best,
            losses.search[selection.best],
            losses.search[selection.uniform],
            losses.evaluations,
            tuple(losses.curve),
            tuple(losses.holdout_curve),
            tuple(self.predictions),
            self.notes,
            tuple(selection.incumbents),
            self.ended,
        )
