"""Errors of a model's units at each level, as allocators read them.

Shape legend: U units, K levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from msp_plugin.allocators.base import TrueLoss
from msp_plugin.errors import NumericsError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import DENSE, Level
from msp_plugin.plan.units import UnitTable
from msp_plugin.progress import Progress, silent

#: Names of the errors, see AllocationInputs.
ERRORS = ("weight", "output", "fisher", "kfac", "kl")


def sum_over_units(
    by_layer: Mapping[str, Mapping[str, float]], title: str, table: UnitTable, menu: Sequence[Level]
) -> np.ndarray:
    """Return float64[U, K], the errors of layers summed over each unit; a dense layer has none.

    Args:
        by_layer: the error of each layer at each level that is not dense.
        title: names the error in messages.

    Raises:
        NumericsError: the error of a layer is not finite.
    """
    bad = [name for name, errors in by_layer.items() if not all(map(math.isfinite, errors.values()))]
    if bad:
        raise NumericsError(
            f"the {title} is not finite for {len(bad)} layers, e.g. {bad[0]}",
            hint="the model's loss or activations overflow: try dtype float32",
        )
    return np.array(
        [
            [sum(by_layer[layer.name].get(level.name, 0.0) for layer in unit.layers) for level in menu]
            for unit in table
        ]
    )


def replace_one_errors(problem: AllocationProblem, loss: TrueLoss, progress: Progress = silent) -> np.ndarray:
    """Return float64[U, K], the loss with one unit pruned and all others dense.

    Args:
        problem: its menu must have ``dense``; its budget does not matter.
        loss: the KL divergence, nats per token, so that a dense unit has the error 0.
    """
    dense = (problem.menu.index(DENSE),) * len(problem.table)
    errors = np.zeros((len(problem.table), len(problem.menu)))
    loss.set_incumbent(dense)
    loss(dense)
    for u in range(len(problem.table)):
        progress(u + 1, len(problem.table))
        for k in range(len(problem.menu)):
            if k != dense[u] and problem.may[u, k]:
                errors[u, k] = loss((*dense[:u], k, *dense[u + 1 :]))
    return errors
