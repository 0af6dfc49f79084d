"""The grid of a comparison: its sparsities, methods, allocators and seeds, and how a command line writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msp_plugin.errors import RecipeError
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plugins.manager import Plugins
from msp_plugin.recovery.base import Recovery
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import ResolvedOptions, resolve


@dataclass(frozen=True)
class Grid:
    """The cells to compare: every allocator for every method and sparsity, and for every seed if it uses one.

    Args:
        methods: pruning methods, each a name or {name: ..., option: ...}.
        allocators: by label, an allocator's name or {name: ..., option: ...}.
        options: all other options of a recipe, such as levels, ignore and granularity.
        prune: prune to each allocation, block by block, as a run does; False measures only the level database's
            weights.
        recover: the name or {name: ..., option: ...} of a recovery of each pruned model; None for none.
    """

    sparsities: Sequence[str]
    methods: Sequence[str | dict[str, Any]]
    allocators: Mapping[str, str | dict[str, Any]]
    seeds: Sequence[int] = (0,)
    options: Mapping[str, Any] = field(default_factory=dict)
    prune: bool = True
    recover: str | Mapping[str, Any] | None = None

    def recovery(self, plugins: Plugins) -> Recovery | None:
        """Return the recovery method.

        Raises:
            RecipeError: an unknown name or option, nothing is pruned, or the method writes more than its result.
        """
        if self.recover is None:
            return None
        if not self.prune:
            raise RecipeError(
                "without pruning there is nothing to recover", hint="prune too, or leave out the recovery"
            )
        built: Recovery = plugins.build("recoveries", self.recover)
        if built.writes:
            raise RecipeError(
                f"each row of a comparison would write {built.writes[0]}",
                hint="recover a single run with `msp recover` to keep its adapter",
            )
        return built

    def plan(self, plugins: Plugins, method: Any, sparsity: str, allocator: Any) -> ResolvedOptions:
        """Return the plan of one cell, with the options of the estimators that its allocator reads.

        Raises:
            RecipeError: see search.resolve.
        """
        spelled = {**self.options, "method": method, "sparsity": sparsity, "allocator": allocator}
        if self.options.get("estimators"):
            read = plugins.build("allocators", allocator).estimators
            others = set(plugins.components["estimators"]) - set(read)
            # Unknown names stay, so that resolve refuses them.
            spelled["estimators"] = {
                name: options for name, options in self.options["estimators"].items() if name not in others
            }
        return resolve(Options.parse(spelled), plugins)

    def check(self, plugins: Plugins) -> list[ResolvedOptions]:
        """Return the plans of all cells, after all checks that need no model.

        Raises:
            RecipeError: a name or option is unknown, a sparsity or seed is out of range, or a list is empty or has an
                entry twice.
        """
        self.recovery(plugins)
        for axis in ("sparsities", "methods", "allocators", "seeds"):
            if not getattr(self, axis):
                raise RecipeError(f"there are no {axis} to compare", hint="name at least one")
        for key in {"seed", "allocation"} & set(self.options):
            raise RecipeError(f"a comparison has no option {key}", hint="give seeds or allocators instead")
        for seed in self.seeds:
            if seed < 0:
                raise RecipeError(f"seed = {seed}", hint="seeds are 0 or more")
        plans = [
            self.plan(plugins, method, sparsity, allocator)
            for method in self.methods
            for sparsity in self.sparsities
            for allocator in self.allocators.values()
        ]
        per_sparsity = len(self.allocators)
        per_method = per_sparsity * len(self.sparsities)
        _refuse_twice("sparsity", [plan.sparsity for plan in plans[:per_method:per_sparsity]])
        _refuse_twice("method", [plan.pruner.name for plan in plans[::per_method]])
        _refuse_twice("seed", self.seeds)
        read = {name for plan in plans for name in plan.allocator.estimators}
        if unread := sorted(set(self.options.get("estimators") or {}) - read):
            raise RecipeError(
                f"options of {', '.join(unread)}, which no allocator of this comparison reads",
                hint="leave them out, or compare an allocator that does (see `msp plugins`)",
            )
        return plans


def _refuse_twice(axis: str, values: Sequence[Any]) -> None:
    """Raise RecipeError if a value occurs twice, because its rows could not be told apart."""
    for value in values:
        if values.count(value) > 1:
            raise RecipeError(f"{axis} {value} is given twice", hint="give it once")


def parse_allocators(text: str) -> dict[str, str]:
    """Return the allocators in a comma list, names by label; an entry is its own label: ``name`` or ``name@label``.

    Raises:
        RecipeError: a label is given twice.
    """
    names: dict[str, str] = {}
    for label in filter(None, map(str.strip, text.split(","))):
        if label in names:
            raise RecipeError(f"{label!r} is given twice", hint="give them labels of their own: name@label")
        names[label] = label.partition("@")[0]
    return names


def parse_sparsities(text: str) -> list[str]:
    """Return the exact shares of zeros in a comma list, as fractions.

    Raises:
        RecipeError: see parse_sparsity.
    """
    return [str(parse_sparsity(part.strip())) for part in text.split(",") if part.strip()]
