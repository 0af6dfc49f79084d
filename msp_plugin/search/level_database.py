"""Open the level database of a model, method and text by its identity, and build what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import BATCH_TOKENS, build_database, check_space
from msp_plugin.database.store import LevelDatabase
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import UnitTable
from msp_plugin.progress import StepProgress, no_progress
from msp_plugin.pruning.base import Pruner
from msp_plugin.runtime.files import cache_directory
from msp_plugin.runtime.ranks import ALONE, Ranks
from msp_plugin.search.keys import database_identity
from msp_plugin.search.recorded import locked_for_all


def open_database(
    model_id: str,
    data: CalibrationSet,
    pruner: Pruner,
    menu: tuple[Level, ...],
    cache: str | None,
    *,
    prefix: Mapping[str, str] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    device: str = "cpu",
    table: UnitTable | None = None,
) -> LevelDatabase:
    """Return the level database of a model, samples, method and levels, whether it is built or not.

    Args:
        model_id: the model's fingerprint.
        cache: the cache directory; None is the default one.
        prefix, batch_tokens: see build_database.
        device: the kind of device that measures, such as ``cpu``.
        table: see database_identity.
    """
    identity = database_identity(
        model_id,
        data,
        pruner,
        prefix=prefix,
        batch_tokens=batch_tokens,
        device=device,
        table=table,
    )
    return LevelDatabase(cache_directory(cache), identity, menu)


def complete_database(
    database: LevelDatabase,
    model: torch.nn.Module,
    table: UnitTable,
    pruner: Pruner,
    data: CalibrationSet,
    *,
    prefix: Mapping[str, str] | None,
    batch_tokens: int,
    fresh: bool = False,
    renewed: set[Path],
    progress: StepProgress = no_progress,
    ranks: Ranks = ALONE,
) -> None:
    """Build what is missing of a level database; waits for another process that builds it.

    Args:
        prefix, batch_tokens: see build_database.
        fresh: build it all again, unless its path is in ``renewed``; then add the path there.

    Raises:
        MSPError: see build_database and check_space.
    """

    def prepare() -> None:
        if fresh and database.path not in renewed:
            renewed.add(database.path)
            database.renew()
        database.tidy()
        check_space(database, model, table)

    with locked_for_all(database.lock, "it builds the level database", ranks):
        ranks.on_rank_zero(prepare)
        build_database(
            database,
            model,
            table,
            pruner,
            data,
            prefix=prefix,
            batch_tokens=batch_tokens,
            progress=partial(progress, "level database"),
            ranks=ranks,
        )
