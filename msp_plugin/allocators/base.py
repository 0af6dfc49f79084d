"""What an allocator is: the inputs it may read and the result it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from msp_plugin.plan.budget import AllocationProblem

Choice = tuple[int, ...]


class TrueLoss(Protocol):
    """The measured loss of a choice on held-out text, nats per token (KL) or log-perplexity."""

    #: Tokens put through the model so far.
    forward_tokens: int

    def __call__(self, choice: Choice) -> float: ...


@dataclass(frozen=True)
class AllocationInputs:
    """Everything that an allocator may look at.

    Args:
        problem: units, levels and budget.
        sensitivities: by estimator name, float64[U].
        weight_error: float64[U, K], squared Frobenius change of the weight under the method.
        output_error: float64[U, K], mean squared change of the layers' outputs per token.
        loss: measures a choice; None if the allocator does not need it.
        seed: of every random choice.
        progress: called with (done, total).
    """

    problem: AllocationProblem
    sensitivities: Mapping[str, np.ndarray]
    weight_error: np.ndarray | None
    output_error: np.ndarray | None
    loss: TrueLoss | None
    seed: int
    progress: Callable[[int, int], None]


@dataclass(frozen=True)
class AllocationResult:
    """The choice, its measured loss, and the loss of uniform, if they were measured.

    ``curve`` holds (forward tokens, best loss so far) whenever the best loss improved.
    """

    choice: Choice
    loss: float | None = None
    uniform_loss: float | None = None
    evaluations: int = 0
    curve: tuple[tuple[int, float], ...] = field(default=())


class Allocator(ABC):
    """An allocator. Subclasses are frozen dataclasses whose fields are recipe options."""

    name: ClassVar[str]
    #: Names of the estimators whose numbers it reads.
    sensitivities: ClassVar[tuple[str, ...]] = ()
    #: True if it needs the level database, for its errors or to measure candidates.
    needs_database: ClassVar[bool] = False
    #: True if it measures candidates. It then has the options ``tokens`` (held-out calibration tokens
    #: that measure one) and, unless it is always KL, ``loss`` (``kl`` or ``perplexity``).
    measures: ClassVar[bool] = False

    @property
    def held_out_tokens(self) -> int:
        """How many calibration tokens are held out to measure candidates; 0 if none are measured."""
        return self.tokens if self.measures else 0

    @property
    def objective(self) -> str:
        """What is measured: ``kl`` or ``perplexity``."""
        return getattr(self, "loss", "kl")

    @abstractmethod
    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        """Return a choice that keeps exactly ``inputs.problem.budget.kept`` weights."""
