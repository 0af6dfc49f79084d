"""The files beside a checkpoint: allocation.json and run.json (sidecars, because llm-compressor
restores the source's config.json when it saves)."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp_plugin.allocate import Outcome
from msp_plugin.checkpoint.recount import PruneStats
from msp_plugin.files import write_json, write_text
from msp_plugin.identity import versions
from msp_plugin.plan.allocation import ALLOCATION_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUN_FILE = "run.json"
RUN_SCHEMA = "msp_plugin/run"
RUN_VERSION = 1


def run_record(outcome: Outcome, stats: PruneStats, seed: int) -> dict[str, Any]:
    """Return the contents of run.json that the pruning itself knows.

    ``schema``, ``version``; ``sparsity`` {target, planned, achieved: shares of zeros; weights, zeros,
    planned_zeros, extra_zeros: counts over the prunable layers, extra ones were zero before or have a dead
    input; exact: planned equals target}; ``perplexity``
    {dense, uniform, mixed}: filled by the commands that measure them, null otherwise; ``search``
    {allocator, forward_tokens, evaluations, seconds, total_seconds, loss, uniform_loss, curve}, empty
    if a finished allocation was given; ``seed``; ``versions``; ``python``.
    """
    budget = outcome.allocation.budget
    return {
        "schema": RUN_SCHEMA,
        "version": RUN_VERSION,
        "sparsity": {
            "target": float(budget.target),
            "planned": float(budget.sparsity),
            "achieved": stats.sparsity,
            "exact": budget.exact,
            "weights": stats.total_weights,
            "zeros": stats.total_zeros,
            "planned_zeros": budget.zeros,
            "extra_zeros": stats.total_zeros - budget.zeros,
        },
        "perplexity": {"dense": None, "uniform": None, "mixed": None},
        "search": outcome.search,
        "seed": seed,
        "versions": versions(),
        "python": platform.python_version(),
    }


def write_files(directory: Path, outcome: Outcome, record: dict[str, Any]) -> None:
    """Write allocation.json and run.json into a checkpoint's directory."""
    write_text(directory / ALLOCATION_FILE, outcome.allocation.to_json())
    write_json(directory / RUN_FILE, record)


def attach_files(model: PreTrainedModel, outcome: Outcome, stats: PruneStats, seed: int) -> None:
    """Make ``model.save_pretrained`` write the files too."""
    save = model.save_pretrained
    record = run_record(outcome, stats, seed)

    def save_with_files(save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        save(save_directory, *args, **kwargs)
        write_files(Path(save_directory), outcome, record)

    save_with_files._overridden = True  # llm-compressor's mark for "already wrapped"
    model.save_pretrained = save_with_files
