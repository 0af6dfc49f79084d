"""What a comparison is over: sparsities, methods, allocators and seeds, and how the command line names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msp_plugin.errors import RecipeError
from msp_plugin.plan.levels import parse_sparsity
from msp_plugin.plugins.manager import Plugins
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import Plan, resolve


@dataclass(frozen=True)
class Grid:
    """What is compared: every allocator for every method and sparsity, seeded ones with every seed.

    Args:
        allocators: by label, the name or {name: ..., option: ...} of an allocator.
        methods: names or {name: ..., option: ...} of pruning methods.
        options: all other options of a recipe, such as levels, ignore and granularity.
        prune: prune to each allocation as a run does, block by block with errors propagated; without it
            the test text is measured with the level database's weights only.
    """

    sparsities: Sequence[str]
    methods: Sequence[str | dict[str, Any]]
    allocators: Mapping[str, str | dict[str, Any]]
    seeds: Sequence[int] = (0,)
    options: Mapping[str, Any] = field(default_factory=dict)
    prune: bool = True

    def plan(self, plugins: Plugins, method: Any, sparsity: str, allocator: Any) -> Plan:
        """Return the plan of one cell; of the estimators' options it has those that the allocator reads.

        Raises:
            RecipeError: see options.resolve.
        """
        given = {**self.options, "method": method, "sparsity": sparsity, "allocator": allocator}
        if self.options.get("estimators"):
            reads, known = plugins.build("allocators", allocator).estimators, plugins.components["estimators"]
            given["estimators"] = {  # what nobody knows is left for resolve to refuse
                name: options for name, options in self.options["estimators"].items()
                if name in reads or name not in known
            }  # fmt: skip
        return resolve(Options.parse(given), plugins)

    def check(self, plugins: Plugins) -> list[Plan]:
        """Return the plans of all cells, after the checks that need no model.

        Raises:
            RecipeError: an unknown name or option, a sparsity or seed out of range, an empty list, or one
                that names a thing twice.
        """
        for what in ("sparsities", "methods", "allocators", "seeds"):
            if not getattr(self, what):
                raise RecipeError(f"there are no {what} to compare", hint="name at least one")
        for key in {"seed", "allocation"} & set(self.options):
            raise RecipeError(f"{key} is no option of a comparison", hint="seeds and allocators say it")
        for seed in self.seeds:
            if seed < 0:
                raise RecipeError(f"seed = {seed}", hint="seeds are 0 or more")
        plans = [
            self.plan(plugins, method, sparsity, allocator)
            for method in self.methods
            for sparsity in self.sparsities
            for allocator in self.allocators.values()
        ]
        each = len(self.allocators)
        _refuse_twice("sparsity", [plan.sparsity for plan in plans[: each * len(self.sparsities) : each]])
        _refuse_twice("method", [plan.pruner.name for plan in plans[:: each * len(self.sparsities)]])
        _refuse_twice("seed", self.seeds)
        read = {name for plan in plans for name in plan.allocator.estimators}
        if unread := sorted(set(self.options.get("estimators") or {}) - read):
            raise RecipeError(
                f"options of {', '.join(unread)}, which no allocator of this comparison reads",
                hint="leave them out, or compare an allocator that does (see `msp plugins`)",
            )
        return plans


def _refuse_twice(what: str, values: Sequence[Any]) -> None:
    for value in values:
        if values.count(value) > 1:  # its rows could not be told apart
            raise RecipeError(f"{what} {value} is given twice", hint="give it once")


def parse_allocators(text: str) -> dict[str, str]:
    """Return the allocators' names by label of a comma list; ``name@label`` sets one apart from another of its name.

    Raises:
        RecipeError: a label is given twice.
    """
    names: dict[str, str] = {}
    for label in filter(None, map(str.strip, text.split(","))):
        if label in names:
            raise RecipeError(f"{label!r} is given twice", hint="set them apart by labels: name@label")
        names[label] = label.partition("@")[0]
    return names


def parse_sparsities(text: str) -> list[str]:
    """Return the exact shares of zeros of a comma list.

    Raises:
        RecipeError: see parse_sparsity.
    """
    return [str(parse_sparsity(part.strip())) for part in text.split(",") if part.strip()]
