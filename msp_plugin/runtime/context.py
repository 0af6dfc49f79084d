"""How a run goes: what all of its steps share."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.progress import StepProgress, no_progress
from msp_plugin.runtime.ranks import ALONE, Ranks


@dataclass(frozen=True)
class RunContext:
    """How a run goes.

    Args:
        fresh: measure anew what the cache holds of this run.
        progress: told of each step and how far it is.
        ranks: the processes that share the work.
    """

    fresh: bool = False
    progress: StepProgress = no_progress
    ranks: Ranks = ALONE
