"""Resolve options: build the components, parse the levels and check everything that the options alone show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from msp_plugin.allocators.base import Allocator
from msp_plugin.allocators.uniform import Uniform
from msp_plugin.checkpoint.export import Exporter
from msp_plugin.data.search_text import SearchText
from msp_plugin.errors import OutputError, RecipeError, nearest, shown
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.bounds import Bounds, parse_bounds
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.levels import Level
from msp_plugin.plan.menus import DEFAULT_QUANTUM, has_widths, parse_menu
from msp_plugin.plan.units import GRANULARITIES
from msp_plugin.plugins.manager import Plugins
from msp_plugin.pruning.base import Pruner
from msp_plugin.runtime.files import check_writable, expanded
from msp_plugin.search.options import Options


@dataclass(frozen=True)
class ResolvedOptions:
    """Options with their components built, checked as far as possible without a model."""

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
    quantum: int
    #: Writes the form that the result is to allow; None if none was asked for.
    form: Exporter | None
    #: The options as the user gave them, for recipe.yaml.
    spelled: Options

    def uniform(self) -> ResolvedOptions:
        """Return the baseline: uniform sparsity over the same layers and levels."""
        baseline = replace(self, allocator=Uniform(), estimators={}, given=None)
        if self.given is None:
            return baseline
        provenance = self.given.provenance
        menu = parse_menu(list(provenance.get("levels") or [level.name for level in self.menu]))
        bounds = parse_bounds(provenance.get("bounds", {}), provenance.get("protect", ()), menu)
        layers = tuple(layer.name for layer in self.given.table.layers)
        return replace(
            baseline,
            sparsity=self.given.budget.sparsity,
            menu=bounds.menu(menu),
            bounds=bounds,
            targets=layers,
            ignore=(),
            granularity=provenance.get("granularity", self.granularity),
            quantum=provenance.get("quantum", self.quantum),
        )

    @property
    def search_text(self) -> SearchText:
        """The text that the search sets aside. A default may be less where the text is short; what the user set may not."""
        if self.given is not None:
            return SearchText()
        allocator = self.allocator
        asked = allocator.asked_for
        return SearchText(
            allocator.held_out_tokens,
            allocator.stopping_tokens,
            fit_search="tokens" not in asked,
            fit_holdout="holdout" not in asked,
        )

    @property
    def is_uniform(self) -> bool:
        """True if the result is the uniform allocation, without a search."""
        return self.given is None and self.allocator.name == "uniform"

    @property
    def needs_data(self) -> bool:
        """True if calibration text is needed: by the allocation, or by the method."""
        return self.allocation_needs_data or self.pruner.needs_data

    @property
    def allocation_needs_data(self) -> bool:
        """True if the allocator needs the level database, or an estimator that it reads needs text."""
        if self.given is not None:
            return False
        return self.allocator.needs_database or any(e.needs_data for e in self.estimators.values())


#: Options that a finished allocation has decided.
_DECIDED = (
    "levels",
    "targets",
    "ignore",
    "granularity",
    "form",
    "quantum",
    "bounds",
    "protect",
    "allocator",
    "estimators",
)


def _plain(value: Any) -> Any:
    """Return a component without options as its name; anything else unchanged."""
    return value["name"] if isinstance(value, Mapping) and value.keys() == {"name"} else value


def _for_form(options: Options, form: Exporter | None) -> Options:
    """Return the options, where levels and granularity that nobody gave are a form's."""
    if form is None:
        return options
    levels = options.levels if "levels" in options.model_fields_set else [form.menu]
    granularity = options.granularity or form.granularity
    return options.model_copy(update={"levels": levels, "granularity": granularity})


def _target(options: Options, given: Allocation | None) -> tuple[Fraction, tuple[Level, ...]]:
    """Return (sparsity, menu) of the options or of the finished allocation.

    Raises:
        RecipeError: the sparsity is missing, or an option contradicts the allocation.
    """
    if given is None:
        if options.sparsity is None:
            raise RecipeError("sparsity is missing", hint="say e.g. sparsity: 0.75, or give an allocation")
        return parse_sparsity(options.sparsity), parse_menu(options.levels)
    idle = [key for key in _DECIDED if _plain(getattr(options, key)) != Options.model_fields[key].default]
    if idle:
        raise RecipeError(
            f"{', '.join(idle)} would have no effect: {options.allocation} has decided the level of each layer",
            hint="leave that out, or leave the allocation out and search again",
        )
    if options.sparsity is not None and parse_sparsity(options.sparsity) != given.target:
        raise RecipeError(
            f"sparsity {shown(options.sparsity)} contradicts {options.allocation}, made for {given.target}",
            hint="leave sparsity out, or search a new allocation",
        )
    return given.target, tuple(dict.fromkeys(given.levels))


def _granularity(options: Options, menu: Sequence[Level]) -> str:
    """Return the granularity of the options; without one, the default for the menu (see Options).

    Raises:
        RecipeError: it is unknown, or too fine for a level of the menu.
    """
    if options.granularity is None:
        served = all(level.is_dense or level.servable for level in menu)
        whole = any(level.narrows for level in menu)
        return "half" if whole else "unit" if served else "layer"
    if options.granularity not in GRANULARITIES:
        raise RecipeError(
            f"granularity {shown(options.granularity)} is unknown",
            hint=nearest(options.granularity, GRANULARITIES),
        )
    for level in menu:
        if options.granularity not in level.granularities:
            fitting = " or ".join(level.granularities)
            raise RecipeError(
                f"level {level} is for granularity {fitting}, not for granularity {options.granularity}",
                hint=f"use granularity {fitting}, or leave {level} out of levels",
            )
    return options.granularity


def resolve(options: Options, plugins: Plugins) -> ResolvedOptions:
    """Return the options resolved: components built, levels and fractions parsed, everything checked.

    Raises:
        RecipeError: a name, option or level is unknown, sparsity or bounds are out of range, the method cannot make a
            level, or the allocation file is missing, damaged or contradicts another option.
        HostError: the method's host is not installed.
    """
    if options.cache is not None:
        try:
            check_writable(expanded(options.cache))
        except OutputError as error:
            raise OutputError(
                f"no cache can be made at {options.cache}: {error.message}",
                hint="give another one, or set MSP_CACHE",
            ) from None
    pruner = plugins.build("pruners", options.method)
    allocator = plugins.build("allocators", options.allocator)
    given = Allocation.read(options.allocation) if options.allocation else None
    form = None
    if options.form is not None and given is None:
        form = plugins.build("exporters", options.form)
        options = _for_form(options, form)
    sparsity, menu = _target(options, given)
    granularity = _granularity(options, menu)
    bounds = parse_bounds(options.bounds, options.protect, menu)
    if form is not None:
        form.check_menu(bounds.menu(menu), granularity)
    if options.quantum != DEFAULT_QUANTUM and not has_widths(menu):
        raise RecipeError(
            f"quantum = {options.quantum} would have no effect: no level is a width",
            hint="leave it out, or name a width, e.g. levels: width",
        )
    pruner.version()  # raises if its host is missing
    pruner.check_menu(menu)
    known = plugins.components["estimators"]
    for name in options.estimators:
        if name not in known:
            raise RecipeError(f"there is no estimator called {shown(name)}", hint=nearest(name, known))
    built = {
        name: plugins.build("estimators", {"name": name, **options.estimators.get(name, {})})
        for name in {*allocator.estimators, *options.estimators}
    }
    if odd := sorted(name for name, estimator in built.items() if estimator.name != name):
        raise RecipeError(
            f"estimators: the options of {odd[0]} name {built[odd[0]].name}", hint="leave name out of them"
        )
    if idle := sorted(set(options.estimators) - set(allocator.estimators)):
        raise RecipeError(
            f"options of {', '.join(idle)} would have no effect: allocator {allocator.name!r} does not read it",
            hint=f"it reads {', '.join(allocator.estimators) or 'no estimator'}",
        )
    estimators = {name: built[name] for name in allocator.estimators}
    return ResolvedOptions(
        sparsity,
        pruner,
        bounds.menu(menu),
        tuple(options.targets),
        tuple(options.ignore),
        allocator,
        estimators,
        given,
        options.seed,
        options.cache,
        granularity,
        bounds,
        options.quantum,
        form,
        Options(**options.model_dump(include=set(Options.model_fields))),
    )
