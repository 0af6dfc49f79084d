"""The ``search`` part of run.json, and the log lines of an allocator's result."""

from __future__ import annotations

import logging

from msp_plugin.allocators.base import AllocationResult, Allocator
from msp_plugin.records.parts import SearchRecord
from msp_plugin.runtime.files import finite

log = logging.getLogger(__name__)


def search_record(
    allocator: Allocator,
    result: AllocationResult,
    forward_tokens: int,
    *,
    sensitivity_tokens: int,
    seconds: float,
    total_seconds: float,
) -> SearchRecord:
    """Return the findings and the cost of a search.

    Args:
        forward_tokens: of the losses and estimates that it used.
        sensitivity_tokens: forward tokens of the sensitivities and errors that it read.
        seconds, total_seconds: for the search alone, and with sensitivities and level database.
    """
    return SearchRecord(
        allocator=allocator.name,
        forward_tokens=forward_tokens,
        sensitivity_tokens=sensitivity_tokens,
        evaluations=result.evaluations,
        seconds=round(seconds, 3),
        total_seconds=round(total_seconds, 3),
        loss=finite(result.loss),
        uniform_loss=finite(result.uniform_loss),
        curve=result.curve,
        holdout=result.holdout,
        predictions=result.predictions,
        notes=result.notes,
        ended=result.ended,
    )


def log_result(allocator: Allocator, result: AllocationResult, seconds: float) -> None:
    """Log how many candidates an allocator measured, why it ended, and its notes."""
    log.info("%s: %d candidates, %.1f s", allocator.name, result.evaluations, seconds)
    if result.ended:
        log.info("%s ended %s", allocator.name, result.ended)
    for note in result.notes:
        log.warning("%s: %s", allocator.name, note)
