"""Checks of a checkpoint: their base class, their findings, and how several of them are run."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import MSPError
from msp_plugin.progress import StepProgress, no_progress
from msp_plugin.runtime.files import finite_json

log = logging.getLogger(__name__)

OK, FAIL, SKIP = "ok", "fail", "skip"


@dataclass(frozen=True)
class Finding:
    """One row of the table of results.

    Args:
        item: the part that was checked.
        state: ``ok``, ``fail`` or ``skip`` (not checked).
        found: the result; for ``skip``, the reason.
        expected: the right result; empty if there is nothing to compare with.
        details: further values, for programs.
    """

    item: str
    state: str
    found: str
    expected: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """The checkpoint to check, and the models and texts to compare it with.

    Args:
        checkpoint: the one to check.
        reference: the checkpoint that it must equal bit for bit, e.g. the run that it was exported from.
        original: source of the model before pruning, to measure what pruning costs.
        text: test samples for perplexity and KL.
        environment: the virtual environment with vLLM, or its ``vllm`` executable, to serve it.
        trust_remote_code: run the model repository's code.
    """

    checkpoint: Checkpoint
    reference: Checkpoint | None = None
    original: str | None = None
    text: CalibrationSet | None = None
    environment: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Check(ABC):
    """Proves one property of a checkpoint. Fields are the options of ``msp verify --set``.

    ``needs`` names fields of Subject; if one of them is None, the check is skipped.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, subject: Subject, progress: StepProgress) -> list[Finding]:
        """Return the findings. Any error becomes a failed finding."""


@dataclass(frozen=True)
class CheckResult:
    """The findings of one check and the seconds that it took."""

    check: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """True if nothing failed; a skipped check counts as passed."""
        return all(finding.state != FAIL for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "check": self.check,
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "findings": [finite_json(asdict(finding)) for finding in self.findings],
        }


#: What messages call the fields of Subject that a check may need.
OPTIONS = {
    "reference": "a reference",
    "original": "the original model",
    "text": "data (test text)",
    "environment": "vllm (an environment that serves)",
}


def missing_needs(check: Check, subject: Subject) -> list[str]:
    """Return what a check needs and the subject lacks, in words (see OPTIONS)."""
    return [OPTIONS[need] for need in check.needs if getattr(subject, need) is None]


def run_checks(
    subject: Subject, checks: Sequence[Check], progress: StepProgress = no_progress
) -> list[CheckResult]:
    """Return the result of every check in order; a failing check does not stop the others."""
    results = []
    for check in checks:
        began = time.monotonic()
        lacking = missing_needs(check, subject)
        if lacking:
            findings = [Finding(check.name, SKIP, f"not checked: give {', '.join(lacking)}")]
        else:
            try:
                findings = check.run(subject, progress)
            except MSPError as error:
                findings = [Finding(check.name, FAIL, str(error))]
            except Exception as error:  # e.g. a plugin's bug, or out of memory: keep the other findings
                log.info("check %s", check.name, exc_info=True)
                findings = [Finding(check.name, FAIL, f"the check broke: {type(error).__name__}: {error}")]
        result = CheckResult(check.name, tuple(findings), time.monotonic() - began)
        log.info("check %s: %s, %.1f s", check.name, "passed" if result.passed else "failed", result.seconds)
        results.append(result)
    return results
