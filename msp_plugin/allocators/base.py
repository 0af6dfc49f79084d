"""The interface of allocators: the inputs that one may read, and its result.

Shape legend: U units, K levels.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Protocol

import numpy as np

from msp_plugin.errors import PluginError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.progress import NotedProgress

Choice = tuple[int, ...]

#: Forward passes that the move gradients of one sample count as: one forward pass, and two backward passes of
#: two each (the gradients of the activations, and those of the weights).
MOVE_GRADIENT_PASSES = 5


class TrueLoss(Protocol):
    """The measured loss of a choice on held-out text, nats per token (KL) or log-perplexity.

    The model's weights are those of the level database. Samples are numbered from 0, so that candidates
    can be compared on the same few of them.
    """

    #: Tokens put through the model so far, whether or not activations were reused.
    forward_tokens: int
    #: Tokens of each sample, in the order of their numbers.
    lengths: tuple[int, ...]

    def __call__(self, choice: Choice, samples: Sequence[int] | None = None) -> float:
        """Return the mean loss over the samples (default: all); ``inf`` if it is not a number."""

    def move_gradients(
        self, choice: Choice, samples: Sequence[int], reach: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return how the loss changes when one unit of ``choice`` moves by up to ``reach`` levels in cost.

        (first_order, curvature_samples), each float64[S, U, K] for S samples, NaN for the present level and
        beyond reach. The mean of the first-order changes and half the mean square of the curvature samples are
        the change to second order, nats per token; both add up over units before the square is taken. One
        forward and two backward passes a sample, counted as MOVE_GRADIENT_PASSES. ``seed`` draws the labels of
        the curvature samples.
        """

    def set_incumbent(self, choice: Choice) -> None:
        """Hold the activations of ``choice`` from its next measurement on.

        A candidate whose first blocks are those of ``choice`` is then run from the first that differs.
        """


class SpentError(Exception):
    """A budget in forward tokens does not allow the next measurement."""


@dataclass(frozen=True)
class AllocationInputs:
    """Everything that an allocator may look at.

    Args:
        problem: units, levels and budget.
        sensitivities: by estimator name, float64[U]; those that the allocator asked for.
        errors: by name, float64[U, K], those that the allocator asked for. ``weight``: squared Frobenius
            change of the weight under the method; ``output``: mean squared change of the layers' outputs
            per token; ``fisher``: the change of the weight, squared and weighted with the diagonal of
            the Fisher information, 1/2 sum_i F_ii (w_i - w_i(level))^2, nats per token; ``kfac``: the squared
            change of each output, weighted with the Fisher information of that output, nats per token, and
            ``fisher`` where the method gives no errors by row; ``kl``: the KL divergence from the dense model
            with this unit alone pruned, nats per token.
        loss: measures a choice; None if the allocator does not need it.
        seed: of every random choice.
        progress: called with (done, total), and where it helps with a note, e.g. "round 3, loss 0.2163, -0.0041".
        holdout: measures a choice on text that the search never optimises, to know when to stop; None
            if the allocator asks for none.
        estimate: ``estimate(name, choice)`` returns float64[U], the sensitivity of that name measured on
            the model as pruned by ``choice``; None unless the allocator says ``remeasures``.
        clock: returns seconds. Where several ranks run the allocator, it is the same on all of them, which
            their own clocks are not; all must ask it equally often.
    """

    problem: AllocationProblem
    sensitivities: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]
    loss: TrueLoss | None
    seed: int
    progress: NotedProgress
    holdout: TrueLoss | None = None
    estimate: Callable[[str, Choice], np.ndarray] | None = None
    clock: Callable[[], float] = time.monotonic

    @property
    def true_loss(self) -> TrueLoss:
        """Return ``loss``.

        Raises:
            PluginError: there is none, because the allocator does not say ``measures``.
        """
        if self.loss is None:
            raise PluginError(
                "the allocator reads a loss that it did not ask for", hint="set measures = True in its class"
            )
        return self.loss

    def remeasured(self, name: str, choice: Choice) -> np.ndarray:
        """Return float64[U], the sensitivity of that name on the model as pruned by ``choice``.

        Raises:
            PluginError: the allocator does not say ``remeasures``.
        """
        if self.estimate is None:
            raise PluginError(
                "the allocator measures sensitivities that it did not ask for",
                hint="set remeasures = True in its class",
            )
        return self.estimate(name, choice)

    def measure(self, choice: Choice, *, max_tokens: int = 0) -> float:
        """Return ``loss`` of a choice, if that stays within ``max_tokens`` forward tokens; 0 sets no limit.

        Raises:
            SpentError: it does not; nothing was measured.
        """
        loss = self.true_loss
        if max_tokens and loss.forward_tokens + sum(loss.lengths) > max_tokens:
            raise SpentError
        return loss(choice)


@dataclass(frozen=True)
class AllocationResult:
    """The choice, its measured loss, and the loss of uniform, if they were measured.

    Args:
        evaluations: candidates measured.
        curve: (forward tokens, loss) whenever the least loss so far fell, on the whole search text; of a search
            in stages, the parent's on the samples that it was chosen on.
        holdout: (forward tokens, hold-out loss of the incumbent) whenever it was measured.
        predictions: (predicted, measured) change of the loss, nats per token, of proposals that a
            surrogate made.
        incumbents: (forward tokens, choice) of each choice that would have been returned, had the allocator
            been stopped then, from the first.
        notes: what a reader of the result should know, e.g. constant scores.
        ended: why the allocator stopped where it did, e.g. "after 9 rounds: no proposal was better".
    """

    choice: Choice
    loss: float | None = None
    uniform_loss: float | None = None
    evaluations: int = 0
    curve: tuple[tuple[int, float], ...] = field(default=())
    holdout: tuple[tuple[int, float], ...] = field(default=())
    predictions: tuple[tuple[float, float], ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    incumbents: tuple[tuple[int, Choice], ...] = field(default=())
    ended: str = ""


class Allocator(ABC):
    """An allocator. Subclasses are frozen dataclasses whose fields are recipe options.

    The class attributes say what it reads; where that depends on an option, make it a property.
    """

    name: ClassVar[str]
    #: Names of the estimators whose numbers it reads.
    sensitivities: ClassVar[tuple[str, ...]] = ()
    #: Names of the errors that it reads: weight, output, fisher, kfac, kl. They come from the level database;
    #: ``kl`` is measured on ``tokens`` tokens, so that it wants ``measures`` too.
    errors: ClassVar[tuple[str, ...]] = ()
    #: True if it needs the level database, for its errors or to measure candidates.
    needs_database: ClassVar[bool] = False
    #: True if it measures candidates. It then has the options ``tokens`` (held-out calibration tokens
    #: that measure one) and, unless it is always KL, ``loss`` (``kl`` or ``perplexity``).
    measures: ClassVar[bool] = False
    #: True if it measures sensitivities anew on pruned models.
    remeasures: ClassVar[bool] = False
    #: False if its choice does not depend on the seed.
    seeded: ClassVar[bool] = True

    @property
    def estimators(self) -> tuple[str, ...]:
        """Names of the estimators that it reads; errors from gradients go by the options of ``fisher``."""
        gradients = {"fisher", "kfac"} & set(self.errors)
        return tuple(dict.fromkeys([*self.sensitivities, *(["fisher"] if gradients else [])]))

    @property
    def held_out_tokens(self) -> int:
        """How many calibration tokens are held out to measure candidates; 0 if none are measured."""
        return int(getattr(self, "tokens", 0)) if self.measures else 0

    @property
    def stopping_tokens(self) -> int:
        """How many more calibration tokens are held out to know when to stop; 0 if none are."""
        return getattr(self, "holdout", 0) if self.measures else 0

    @property
    def asked_for(self) -> tuple[str, ...]:
        """The options of ``tokens`` and ``holdout`` that a user has set: less text than that is an error."""
        options = {f.name: f.default for f in fields(self) if f.name in ("tokens", "holdout")}  # type: ignore[arg-type]  # a dataclass by contract
        return tuple(name for name, default in options.items() if getattr(self, name) != default)

    @property
    def objective(self) -> str:
        """What is measured: ``kl`` or ``perplexity``."""
        return getattr(self, "loss", "kl")

    @abstractmethod
    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        """Return a choice that keeps exactly ``inputs.problem.budget.kept`` weights."""
