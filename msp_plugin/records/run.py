"""What a run found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from msp_plugin.plan.allocation import Allocation


@dataclass(frozen=True)
class Outcome:
    """An allocation and what it cost to find. ``search`` holds the ``search`` part of run.json."""

    allocation: Allocation
    search: dict[str, Any] = field(default_factory=dict)
