"""The options of a run, as a recipe writes them, and the components they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from msp_plugin.allocators.base import Allocator
from msp_plugin.errors import RecipeError, nearest, shown
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.bounds import Bounds, parse_bounds
from msp_plugin.plan.levels import DEFAULT_LEVELS, Level, parse_menu, parse_sparsity
from msp_plugin.plan.units import GRANULARITIES
from msp_plugin.plugins import Plugins
from msp_plugin.pruning.base import Pruner


class Options(BaseModel):
    """What a recipe may say about mixed sparsity. Components are names, or {name: ..., option: ...}.

    Args:
        sparsity: share of zeros among the prunable weights, in [0, 1). Not needed with ``allocation``.
        method: the pruner: sparsegpt, wanda, magnitude, or one that a plugin registers.
        levels: the menu: "dense", "N:M" with N kept of M, "N:M in 2:4", shares of zeros such as "0.7"; or
            the name of a menu, "default" or "servable" (every level of it but dense runs on 2:4 kernels).
        targets, ignore: which linears of the decoder blocks are pruned (see models.prunable_layers).
        granularity: what shares a level: ``unit``, the layers that inference fuses; ``layer``, nothing;
            ``block``, all layers of a decoder block.
        bounds: by pattern, the least and the most sparsity of the layers it matches, {pattern: [low, high]}.
        protect: patterns of layers that stay dense. Unlike ignored ones they count in the budget, so that
            the others make up for them. With bounds and protect, a unit takes those of all its layers.
        allocator: chooses a level per unit: search, uniform, or any other of `msp plugins`.
        estimators: overrides of the sensitivity estimators' options, by their name.
        allocation: path of a finished allocation.json; nothing is searched then, and what is said of layers, levels
            and the search is refused, because the file says it.
        seed: of every random choice.
        cache: directory of the level database; default $MSP_CACHE or ~/.cache/msp_plugin.
    """

    model_config = ConfigDict(extra="forbid")

    sparsity: float | str | None = None
    method: str | dict[str, Any] = "sparsegpt"
    levels: list[Any] = list(DEFAULT_LEVELS)
    targets: list[str] = ["Linear"]
    ignore: list[str] = []
    granularity: str = "unit"
    bounds: dict[str, Any] = {}
    protect: list[str] = []
    allocator: str | dict[str, Any] = "search"
    estimators: dict[str, dict[str, Any]] = {}
    allocation: str | None = None
    seed: int = Field(0, ge=0, lt=2**63)  # what torch's generators take
    cache: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise RecipeError(f"unknown key {shown(key)}", hint=nearest(key, cls.model_fields))
            data = dict(data)
            if isinstance(data.get("levels"), int | float):
                parse_menu([data["levels"]])  # an unquoted 2:4 is explained
                data["levels"] = [data["levels"]]
            given = data.get("allocation")
            if isinstance(given, str) and given and not given.startswith("~"):
                data["allocation"] = str(
                    Path.cwd() / given
                )  # recipe.yaml says it, and runs again from elsewhere
            for key in ("targets", "ignore", "levels", "protect"):
                if isinstance(data.get(key), str):
                    data[key] = [part.strip() for part in data[key].split(",") if part.strip()]
        return data

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Options:
        """Return the options of a mapping.

        Raises:
            RecipeError: an unknown key, or a value of the wrong type.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecipeError(f"{where} = {shown(first['input'])}: {first['msg']}") from None


@dataclass(frozen=True)
class Plan:
    """Options that were checked as far as they can be without a model, with their components built."""

    sparsity: Fraction
    pruner: Pruner
    menu: tuple[Level, ...]
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    allocator: Allocator
    estimators: Mapping[str, Any]
    given: Allocation | None
    seed: int
    cache: str | None
    granularity: str
    bounds: Bounds

    @property
    def search_tokens(self) -> int:
        """Calibration tokens that are held out to measure candidates and to know when to stop."""
        if self.given is not None:
            return 0
        return self.allocator.held_out_tokens + self.allocator.stopping_tokens

    @property
    def fits(self) -> bool:
        """True if the search makes do with less text than ``search_tokens``, as nobody asked for just that."""
        return self.given is not None or not self.allocator.asks_for_text

    @property
    def is_uniform(self) -> bool:
        """True if the outcome is the uniform allocation without a search."""
        return self.given is None and self.allocator.name == "uniform"

    @property
    def needs_data(self) -> bool:
        """True if calibration text is needed: by the allocation, or by the method's statistics."""
        return self.allocation_needs_data or self.pruner.needs_statistics

    @property
    def allocation_needs_data(self) -> bool:
        """True if the allocator needs the level database, or an estimator that it reads needs text."""
        if self.given is not None:
            return False
        return self.allocator.needs_database or any(e.needs_data for e in self.estimators.values())


#: What a finished allocation has decided.
_DECIDED = ("levels", "targets", "ignore", "granularity", "bounds", "protect", "allocator", "estimators")


def _plain(value: Any) -> Any:
    """Return the short form of a component without options."""
    return value["name"] if isinstance(value, Mapping) and value.keys() == {"name"} else value


def _target(options: Options, given: Allocation | None) -> tuple[Fraction, tuple[Level, ...]]:
    """Return the asked sparsity and the menu, of the recipe or of a finished allocation."""
    if given is None:
        if options.sparsity is None:
            raise RecipeError("sparsity is missing", hint="say e.g. sparsity: 0.75, or give an allocation")
        return parse_sparsity(options.sparsity), parse_menu(options.levels)
    idle = [key for key in _DECIDED if _plain(getattr(options, key)) != Options.model_fields[key].default]
    if idle:
        raise RecipeError(
            f"{', '.join(idle)} would have no effect: {options.allocation} has decided the level of each layer",
            hint="leave that out, or leave the allocation out and allocate anew",
        )
    if options.sparsity is not None and parse_sparsity(options.sparsity) != given.target:
        raise RecipeError(
            f"sparsity {shown(options.sparsity)} contradicts {options.allocation}, made for {given.target}",
            hint="leave sparsity out, or allocate anew",
        )
    return given.target, tuple(dict.fromkeys(given.levels))


def resolve(options: Options, plugins: Plugins) -> Plan:
    """Return the plan of the options.

    Raises:
        RecipeError: an unknown name or option, a level that is none, a sparsity or bounds out of range, a
            method that cannot make a level, a missing or damaged allocation file, options that it contradicts.
    """
    pruner = plugins.build("pruners", options.method)
    allocator = plugins.build("allocators", options.allocator)
    given = Allocation.read(options.allocation) if options.allocation else None
    sparsity, menu = _target(options, given)
    if options.granularity not in GRANULARITIES:
        raise RecipeError(
            f"granularity {shown(options.granularity)} is unknown",
            hint=nearest(options.granularity, GRANULARITIES),
        )
    bounds = parse_bounds(options.bounds, options.protect, menu)
    pruner.version()  # raises if its host is missing
    for level in menu:
        if not level.is_dense:
            pruner.check_level(level)
    known = plugins.components["estimators"]
    for name in options.estimators:
        if name not in known:
            raise RecipeError(f"there is no estimator called {shown(name)}", hint=nearest(name, known))
    built = {
        name: plugins.build("estimators", {**options.estimators.get(name, {}), "name": name})
        for name in {*allocator.estimators, *options.estimators}
    }
    if idle := sorted(set(options.estimators) - set(allocator.estimators)):
        raise RecipeError(
            f"options of {', '.join(idle)} would have no effect: allocator {allocator.name!r} does not read it",
            hint=f"it reads {', '.join(allocator.estimators) or 'no estimator'}",
        )
    estimators = {name: built[name] for name in allocator.estimators}
    return Plan(
        sparsity, pruner, bounds.menu(menu), tuple(options.targets), tuple(options.ignore), allocator,
        estimators, given, options.seed, options.cache, options.granularity, bounds,
    )  # fmt: skip
