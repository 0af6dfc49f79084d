"""One step of a run: recover a sparse model in memory, check its zeros, and measure it before and after."""

from __future__ import annotations

import logging
import shutil
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.checkpoint.recount import recount_model
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import Text, load_split
from msp_plugin.errors import DataError, NumericsError
from msp_plugin.models.device import on_best_device
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.offload import offloaded_module
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plugins.manager import spec_of
from msp_plugin.records.run import DENSE, PRUNE, RECOVER, RecoveryRecord, StageRecord
from msp_plugin.recovery.base import Recovery, RecoveryInputs
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.record import Measured
from msp_plugin.recovery.shared import mean_kl, perplexity
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.digests import component_digest, versions
from msp_plugin.runtime.disk import writing
from msp_plugin.runtime.files import cache_directory, finite
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.memory import freed_memory_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: Options that say what is written beside the result, on which no state depends.
BESIDE = ("adapter", "report_to")
#: One sample in this many is hold-out: it measures the recovery and is not trained on.
HOLDOUT_SHARE = 8


@dataclass(frozen=True)
class RecoveryText:
    """The samples of a recovery; no two of them overlap in the text.

    Args:
        data: the samples to train on.
        holdout: measures the recovery while it runs.
        test: measures the models before and after; empty to measure nothing.
    """

    data: CalibrationSet
    holdout: CalibrationSet
    test: CalibrationSet

    @classmethod
    def of(cls, samples: CalibrationSet, test: CalibrationSet) -> RecoveryText:
        """Return the samples with the last ones as hold-out.

        Raises:
            DataError: there are fewer than two samples.
        """
        if len(samples) < 2:
            raise DataError(
                f"{samples.source} gives {len(samples)} sample, and a recovery needs one to learn from and another to judge it",
                hint="give more text, or shorter samples",
            )
        data, holdout = samples.cut(max(1, samples.tokens // HOLDOUT_SHARE))
        if not data:  # the first sample holds most of the tokens
            data, holdout = samples.cut(samples.tokens - len(samples.samples[0]))
        return cls(data, holdout, test)


def recovery_text(tokenizer: PreTrainedTokenizerBase, text: Text) -> RecoveryText:
    """Return the samples of a text for a recovery.

    Raises:
        DataError: see load_split and RecoveryText.of.
    """
    split = load_split(tokenizer, text)
    return RecoveryText.of(split.pruning, split.test)


@dataclass(frozen=True)
class RecoveryStep:
    """A recovery method, its samples, and the settings that it runs with."""

    recovery: Recovery
    samples: RecoveryText
    seed: int
    cache: str | None
    context: RunContext

    def identity(self, model: PreTrainedModel, original: str | None) -> dict[str, Any]:
        """Return everything that the state of a stopped recovery depends on, by names for messages.

        Args:
            original: fingerprint of the dense model, None without one.
        """
        return {
            "model": fingerprint(model),
            "original": original,
            "recovery": {k: v for k, v in spec_of(self.recovery).items() if k not in BESIDE},
            "code": component_digest(self.recovery),
            "text": [self.samples.data.fingerprint, self.samples.holdout.fingerprint],
            "test": self.samples.test.fingerprint,
            "seed": self.seed,
            "versions": versions(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }

    def references(
        self, model: PreTrainedModel, original: PreTrainedModel | None, journal: Journal
    ) -> dict[str, Measured]:
        """Return the measurements of the dense and the sparse model by stage; those in the journal are not repeated."""
        measured = {}
        if original is not None:
            measured[DENSE] = Measured(
                **journal.get(DENSE, lambda: vars(self.measure(DENSE, original, None)))
            )
        measured[PRUNE] = Measured(
            **journal.get("sparse", lambda: vars(self.measure("sparse", model, original)))
        )
        return measured

    def measure(self, name: str, model: PreTrainedModel, original: PreTrainedModel | None) -> Measured:
        """Return the measurements of a model on the test text."""
        test = self.samples.test
        if not test:
            return Measured()
        with freed_memory_kept(), on_best_device(model):
            progress = partial(self.context.progress, f"perplexity, {name}")
            value = self._finite(name, lambda: perplexity(model, test, self.context.ranks, progress=progress))
        return Measured(value, self.divergence(name, model, original))

    def divergence(self, name: str, model: PreTrainedModel, original: PreTrainedModel | None) -> float | None:
        """Return the KL divergence of a model from the original on the test text; None if one of the two is missing."""
        test = self.samples.test
        if not test or original is None:
            return None
        progress = partial(self.context.progress, f"KL, {name}")
        with freed_memory_kept(), on_best_device(model), on_best_device(original):
            ranks = self.context.ranks
            return self._finite(name, lambda: mean_kl(original, model, test, ranks, progress=progress))

    def _finite(self, name: str, measure: Callable[[], float]) -> float | None:
        """Return the measured value; None if the loss of a sparse model is not a number."""
        try:
            return finite(measure())
        except NumericsError:
            if name == DENSE:
                raise
            log.warning("the %s model's test loss is not a number", name)
            return None

    def run(
        self,
        model: PreTrainedModel,
        original: PreTrainedModel | None,
        masks: Masks,
        allocation: Allocation | None,
        key: str,
        until: ExitStack,
    ) -> StageRecord:
        """Change the surviving weights of a model in place, check its zeros, and return the stage with measurements.

        Args:
            key: digest of everything that the state of a stopped recovery depends on.
            until: the state is removed when this closes without an error: when the result is written.

        Raises:
            VerificationError: a zero was filled in, or a layer no longer has its level.
            MSPError: see the method.
        """
        recovery, start = self.recovery, time.monotonic()
        folder = self._folder(key, model, until)
        with ExitStack() as stack:
            stack.enter_context(freed_memory_kept())
            for each in (model, original):
                if each is not None:
                    stack.enter_context(on_best_device(each))
            result = recovery.recover(
                RecoveryInputs(
                    model,
                    masks,
                    self.samples.data,
                    self.samples.holdout,
                    original,
                    folder,
                    sensitivities(allocation),
                    self.seed,
                    progress=self.context.progress,
                    ranks=self.context.ranks,
                )
            )
        self.context.ranks.gather(lambda: None)  # all ranks are done with the folder
        seconds = round(time.monotonic() - start, 3)
        rounded = masks.check(model, f"recovery {recovery.name!r}")
        if rounded:
            log.warning(
                "%d weights of %d layers became zero by rounding, most in %s",
                sum(rounded.values()),
                len(rounded),
                max(rounded, key=lambda name: rounded[name]),
            )
        zeros = sum(masks.zeros(layer) for layer in masks) + sum(rounded.values())
        sparsity = zeros / sum(out * width for out, width in masks.shapes.values())
        if allocation is not None:
            counted = recount_model(model, allocation, exact=False, after=f"recovery {recovery.name!r}")
            sparsity = counted.sparsity
        measured = self.measure("recovered", model, original)
        return StageRecord(
            name=RECOVER,
            perplexity=measured.perplexity,
            kl=measured.kl,
            seconds=seconds,
            sparsity=sparsity,
            recovery=RecoveryRecord(
                method=spec_of(recovery),
                seed=self.seed,
                tokens=result.tokens,
                data=self.samples.data.record(),
                holdout=self.samples.holdout.record(),
                curve=result.curve,
                rounded=rounded,
                notes=result.notes,
            ),
        )

    def folder(self, key: str) -> Path:
        """Return the directory for the state of this recovery."""
        return states(self.cache) / key[:24]

    def _folder(self, key: str, model: PreTrainedModel, until: ExitStack) -> Path:
        """Make the directory for the state of this recovery; it is removed when ``until`` closes without an error.

        An offloaded model may read its changed weights there: it is removed with the model.
        """
        folder, ranks = self.folder(key), self.context.ranks

        def make() -> None:
            if self.context.fresh:
                shutil.rmtree(folder, ignore_errors=True)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)

        def remove(error: object, *_: object) -> None:
            if error is None and offloaded_module(model) is None:
                shutil.rmtree(folder, ignore_errors=True)
            elif error is None:
                weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)

        ranks.on_rank_zero(make)
        if ranks.rank == 0:
            until.push(remove)
        return folder


def states(cache: str | None) -> Path:
    """Return the directory in which each stopped recovery has one for its state."""
    return cache_directory(cache) / "recovery"


def sensitivities(allocation: Allocation | None) -> dict[str, float]:
    """Return each layer's sensitivity, that of its unit: the Fisher trace if the run has it, else its first estimator."""
    if allocation is None or not allocation.sensitivities:
        return {}
    known = allocation.sensitivities
    values = known["fisher"] if "fisher" in known else known[min(known)]
    pairs = zip(allocation.table, values, strict=True)
    return {layer.name: value for unit, value in pairs for layer in unit.layers}
