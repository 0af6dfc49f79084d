"""The settings that all steps of a run share."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.progress import StepProgress, no_progress
from msp_plugin.runtime.ranks import ALONE, Ranks


@dataclass(frozen=True)
class RunContext:
    """The settings that all steps of a run share.

    Args:
        fresh: ignore this run's cached measurements and make them again.
        progress: told of each step and how far it is.
        ranks: the processes that share the work.
    """

    fresh: bool = False
    progress: StepProgress = no_progress
    ranks: Ranks = ALONE
