"""Comparisons: small searches, and the rows of a record."""

import types
from dataclasses import dataclass

from msp_plugin.allocators.base import AllocationResult, Allocator
from msp_plugin.errors import BudgetError
from msp_plugin.plugins.hookspecs import hookimpl

MSP = {"name": "msp", "population": 3, "generations": 1, "offspring": 2, "tokens": 40}
SEARCH = {"name": "search", "rounds": 2, "seeds": 3, "tokens": 40, "holdout": 20}


def by_name(*names):
    return {name: name for name in names}


def row_of(record, allocator):
    (row,) = (row for row in record["rows"] if row["allocator"] == allocator)
    return row


def allocators_plugin(*classes):
    module = types.ModuleType("plugin")
    module.msp_register_allocators = hookimpl(lambda: list(classes))
    module.msp_register_allocators.__name__ = "msp_register_allocators"
    return module


@dataclass(frozen=True)
class Raises(Allocator):
    """Fails as asked."""

    name = "raises"
    how: str = "our error"

    def allocate(self, inputs):
        if self.how == "our error":
            raise BudgetError("no way to the budget", hint="try another")
        if self.how == "bug":
            return AllocationResult((0,) * (1 // 0))
        return AllocationResult((0,) * len(inputs.problem.table))
