"""Losses and sensitivities whose values are kept in a journal, so that a stopped search continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msp_plugin.allocators.base import Choice, TrueLoss
from msp_plugin.runtime.digests import digest
from msp_plugin.runtime.journal import Journal, packed, unpacked
from msp_plugin.runtime.locks import locked
from msp_plugin.runtime.memory import free_cached
from msp_plugin.runtime.ranks import Ranks
from msp_plugin.search.keys import journal_identity

if TYPE_CHECKING:
    from msp_plugin.data.calibration import CalibrationSet


@contextmanager
def locked_for_all(path: Path, reason: str, ranks: Ranks) -> Iterator[None]:
    """Hold the lock file ``path`` for all ranks during the block, then return freed memory to the system.

    Args:
        reason: what a process that waits for the lock tells its user.
    """
    try:
        with locked(path, reason, wait=True) if ranks.rank == 0 else nullcontext():
            yield
    finally:
        free_cached()


@dataclass(frozen=True)
class Journals:
    """Opens the journals of a model's measurements.

    Args:
        device: the kind of device that measures.
        fresh: delete each journal that is not in ``renewed`` when it is opened, and add it there.
        ranks: of the run; rank 0 reads and writes the files.
    """

    device: str
    fresh: bool
    renewed: set[Path]
    ranks: Ranks

    @contextmanager
    def open(self, folder: Path, name: str, about: Mapping[str, Any]) -> Iterator[Journal]:
        """Yield the journal of the measurements that ``about`` identifies; waits for another process that has it."""
        identity = journal_identity(about, self.device)
        path = folder / f"{name}-{digest(identity)[:16]}.jsonl"
        with locked_for_all(
            path.with_suffix(".lock"), f"it measures {name} of this model and text", self.ranks
        ):
            if self.fresh and path not in self.renewed:
                self.renewed.add(path)
                self.ranks.on_rank_zero(lambda: path.unlink(missing_ok=True))
            with closing(Journal(path, identity, self.ranks)) as journal:
                yield journal


class Recorded:
    """Values in a journal with their cost: forward tokens of all, seconds of those measured by an earlier process."""

    def __init__(self, journal: Journal):
        self.forward_tokens = 0
        #: Seconds that an earlier process spent on the values that were read.
        self.saved_seconds = 0.0
        self._journal = journal
        self._mine: set[str] = set()

    def _get(self, key: str, measure: Callable[[], tuple[Any, int]]) -> Any:
        """Return the value of a key; if it is missing, ``measure`` returns (the value, its forward tokens)."""

        def measured() -> dict[str, Any]:
            self._get_ready()  # every process repeats this, so it does not count in the value's seconds
            began = time.monotonic()
            value, tokens = measure()
            self._mine.add(key)
            return {"value": value, "tokens": tokens, "seconds": round(time.monotonic() - began, 4)}

        record = self._journal.get(key, measured)
        self.forward_tokens += record["tokens"]
        if key not in self._mine:
            self._mine.add(key)
            self.saved_seconds += record["seconds"]
        return record["value"]

    def _get_ready(self) -> None:
        """Do what every process does before its first measurement."""


class RecordedLoss(Recorded):
    """A TrueLoss (see allocators.base) whose values are kept in a journal.

    Args:
        make: returns the loss that measures; called at the first missing value, so that the model is not touched before.
        data: the samples that it measures on.
        name: names the text in the journal's keys.
    """

    def __init__(self, make: Callable[[], TrueLoss], data: CalibrationSet, journal: Journal, name: str):
        super().__init__(journal)
        self.data, self.lengths = data, tuple(len(sample) for sample in data.samples)
        self._make, self._name = make, name
        self._loss: TrueLoss | None = None
        self._incumbent: Choice | None = None

    def __call__(self, choice: Choice, samples: Sequence[int] | None = None) -> float:
        key = f"{self._name} {_text(choice)} {'all' if samples is None else _text(samples)}"
        return float(self._get(key, lambda: self._measure(lambda loss: loss(choice, samples))))

    def move_gradients(
        self, choice: Choice, samples: Sequence[int], reach: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        key = f"{self._name} gradients {_text(choice)} {_text(samples)} {reach} {seed}"

        def measure(loss: TrueLoss) -> dict[str, Any]:
            return packed(np.stack(loss.move_gradients(choice, samples, reach, seed)))

        first_order, curvature_samples = unpacked(self._get(key, lambda: self._measure(measure)))
        return first_order, curvature_samples

    def set_incumbent(self, choice: Choice) -> None:
        self._incumbent = choice
        if self._loss is not None:
            self._loss.set_incumbent(choice)

    def _get_ready(self) -> None:
        self._ready_loss()

    def _ready_loss(self) -> TrueLoss:
        """Return the loss that measures, made when it is first needed."""
        if self._loss is None:
            self._loss = self._make()
            if self._incumbent is not None:
                self._loss.set_incumbent(self._incumbent)
        return self._loss

    def _measure(self, measure: Callable[[TrueLoss], Any]) -> tuple[Any, int]:
        loss = self._ready_loss()
        before = loss.forward_tokens
        value = measure(loss)
        return value, loss.forward_tokens - before


class RecordedEstimate(Recorded):
    """Sensitivities of pruned models (see allocators.base.AllocationInputs.estimate), kept in a journal.

    Args:
        measure: called with an estimator's name and a choice; returns (a number per unit, its forward tokens).
    """

    def __init__(self, measure: Callable[[str, Choice], tuple[Sequence[float], int]], journal: Journal):
        super().__init__(journal)
        self._measure = measure

    def __call__(self, name: str, choice: Choice) -> np.ndarray:
        def measure() -> tuple[dict[str, Any], int]:
            values, tokens = self._measure(name, choice)
            return packed(np.array(values)), tokens

        return unpacked(self._get(f"{name} {_text(choice)}", measure))


def _text(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
