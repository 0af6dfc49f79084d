"""Errors of the units of a model at each level, as allocators read them.

Shape legend: U units, K levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from msp_plugin.allocators.base import TrueLoss
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import NumericsError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import DENSE, Level
from msp_plugin.plan.units import UnitTable
from msp_plugin.progress import Progress, silent
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.ranks import ALONE, Ranks
from msp_plugin.sensitivity.fisher_error import fisher_errors
from msp_plugin.sensitivity.kfac_error import kfac_errors

#: Names of the errors, see AllocationInputs.
ERRORS = ("weight", "output", "fisher", "kfac", "kl")


def fisher_unit_errors(
    model: torch.nn.Module,
    data: CalibrationSet,
    database: LevelDatabase,
    table: UnitTable,
    menu: Sequence[Level],
    *,
    journal: Journal | None = None,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """Return the Fisher-weighted error float64[U, K], nats per token, summed over the layers of a unit.

    Args:
        journal, ranks: see fisher_errors.

    Raises:
        NumericsError: it is not finite for a layer.
    """
    by_layer = fisher_errors(
        model,
        data,
        [layer.name for layer in table.layers],
        [level.name for level in menu if not level.is_dense],
        database.weight,
        progress=progress,
        journal=journal,
        ranks=ranks,
    )
    return _summed(by_layer, table, menu)


def kfac_unit_errors(
    model: torch.nn.Module,
    data: CalibrationSet,
    database: LevelDatabase,
    table: UnitTable,
    menu: Sequence[Level],
    *,
    journal: Journal | None = None,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """Return the K-FAC error float64[U, K], nats per token, summed over the layers of a unit.

    Args:
        database: holds row errors.
        journal, ranks: see kfac_errors.

    Raises:
        NumericsError: it is not finite for a layer.
    """
    by_layer = kfac_errors(
        model,
        data,
        [layer.name for layer in table.layers],
        [level.name for level in menu if not level.is_dense],
        database.row_errors,
        progress=progress,
        journal=journal,
        ranks=ranks,
    )
    return _summed(by_layer, table, menu)


def _summed(
    by_layer: Mapping[str, Mapping[str, float]], table: UnitTable, menu: Sequence[Level]
) -> np.ndarray:
    """Return float64[U, K], the errors of layers summed over each unit; a dense layer has none."""
    _check_finite(by_layer)
    return np.array(
        [
            [sum(by_layer[layer.name].get(level.name, 0.0) for layer in unit.layers) for level in menu]
            for unit in table
        ]
    )


def _check_finite(by_layer: Mapping[str, Mapping[str, float]]) -> None:
    bad = [name for name, errors in by_layer.items() if not all(map(math.isfinite, errors.values()))]
    if bad:
        raise NumericsError(
            f"the Fisher-weighted error is not finite for {len(bad)} layers, e.g. {bad[0]}",
            hint="the model's loss or activations overflow: try dtype float32",
        )


def replace_one_errors(problem: AllocationProblem, loss: TrueLoss, progress: Progress = silent) -> np.ndarray:
    """Return float64[U, K]: the loss with one unit pruned and all others dense.

    Args:
        problem: its menu holds ``dense``; its budget does not matter.
        loss: the KL divergence, nats per token, so that a dense unit has the error 0.
    """
    dense = (problem.menu.index(DENSE),) * len(problem.table)
    errors = np.zeros((len(problem.table), len(problem.menu)))
    loss.set_incumbent(dense)
    loss(dense)
    for u in range(len(problem.table)):
        progress(u + 1, len(problem.table))
        for k in range(len(problem.menu)):
            if k != dense[u]:
                errors[u, k] = loss((*dense[:u], k, *dense[u + 1 :]))
    return errors
