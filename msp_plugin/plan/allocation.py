"""Allocation: one level per unit, and its file allocation.json (``Allocation.to_dict`` gives the schema)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from msp_plugin.errors import RecipeError, VerificationError, shown
from msp_plugin.plan.budget import AllocationProblem, Budget
from msp_plugin.plan.fractions import parse_fraction
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import Groups, Layer, Unit, UnitTable
from msp_plugin.runtime.documents import parse_json
from msp_plugin.runtime.files import expanded

#: The file's name beside a checkpoint.
ALLOCATION_FILE = "allocation.json"
SCHEMA = "msp_plugin/allocation"
VERSION = 1
#: Entries of the provenance that a uniform baseline follows, and their types; lists hold texts.
_BASELINE = {"levels": list, "bounds": dict, "protect": list, "granularity": str, "quantum": int}


@dataclass(frozen=True)
class Allocation:
    """One level per unit of a model.

    Args:
        table: the units, in the model's order.
        levels: one per unit, in the same order.
        target: the asked share of zeros.
        sensitivities: by estimator name, one float per unit (may be empty).
        provenance: origin of the allocation: model, calibration, method, allocator, versions. JSON values
            without times or paths of this machine, so that equal runs give equal bytes.
        stored: by layer, its name in the checkpoint's files; only layers with another name there.
    """

    table: UnitTable
    levels: tuple[Level, ...]
    target: Fraction
    sensitivities: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def budget(self) -> Budget:
        """The target, and the exact counts of weights and of kept weights."""
        kept = sum(level.kept(unit) for unit, level in zip(self.table, self.levels, strict=True))
        return Budget(self.target, self.table.weights, kept)

    @property
    def by_layer(self) -> dict[str, Level]:
        """The level of every layer by its module name."""
        return {
            layer.name: level
            for unit, level in zip(self.table, self.levels, strict=True)
            for layer in unit.layers
        }

    def as_stored(self) -> Allocation:
        """Return the same allocation with every layer under its name in the checkpoint's files."""
        units = tuple(
            replace(
                unit,
                name=self.stored.get(unit.name, unit.name),
                layers=tuple(replace(a, name=self.stored.get(a.name, a.name)) for a in unit.layers),
            )
            for unit in self.table
        )
        return replace(self, table=UnitTable(units), stored={})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form.

        ``schema``, ``version``; ``budget`` {target, weights, kept, zeros, sparsity}; ``units``, a list in the
        model's order of {name, block, level, weights, zeros, sensitivity: {estimator: value}, layers: [{name,
        shape: [out, in]}]}, and where the menu had widths ``groups`` {count, quantum, columns: names of the layers
        whose groups are columns}; ``provenance``; ``stored`` {layer: its name in the checkpoint's files}, only if
        a name differs there. ``target`` is an exact fraction such as "3/4".
        """
        budget = self.budget
        units = []
        for i, (unit, level) in enumerate(zip(self.table, self.levels, strict=True)):
            units.append(
                {
                    "name": unit.name,
                    "block": unit.block,
                    "level": level.name,
                    "weights": unit.weights,
                    "zeros": unit.weights - level.kept(unit),
                    "sensitivity": {name: values[i] for name, values in self.sensitivities.items()},
                    "layers": [
                        {"name": a.name, "shape": [a.out_features, a.in_features]} for a in unit.layers
                    ],
                    **({} if unit.groups is None else {"groups": _groups_record(unit, unit.groups)}),
                }
            )
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "budget": {
                "target": str(self.target),
                "weights": budget.weights,
                "kept": budget.kept,
                "zeros": budget.zeros,
                "sparsity": float(budget.sparsity),
            },
            "units": units,
            "provenance": dict(self.provenance),
            **({"stored": dict(self.stored)} if self.stored else {}),
        }

    def to_json(self) -> str:
        """Return the file's text; equal allocations give equal bytes."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, data: Any, source: str = "allocation") -> Allocation:
        """Return the allocation of a JSON document that ``to_dict`` wrote.

        Args:
            source: the file's name, for errors.

        Raises:
            RecipeError: the document is not an allocation, has another version, or contradicts itself.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise RecipeError(f"{source} is not an allocation file", hint=f'expected schema "{SCHEMA}"')
        if data.get("version") != VERSION:
            raise RecipeError(
                f"{source} has version {shown(data.get('version'))}, this package reads {VERSION}",
                hint="update msp_plugin",
            )
        try:
            allocation = _read(data, source)
            kept = _typed(data["budget"]["kept"], int, "kept")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RecipeError(f"{source} is damaged: {type(error).__name__}: {error}") from None
        places = allocation.as_stored().by_layer
        if set(allocation.stored) - set(allocation.by_layer) or len(places) < len(allocation.by_layer):
            raise RecipeError(f"{source} is damaged: stored names other layers, or two layers have one place")
        if allocation.budget.kept != kept:
            raise RecipeError(
                f"{source}: its levels keep {allocation.budget.kept:,} weights, its budget says {kept:,}",
                hint="the file was edited; set budget.kept to match, or make the allocation anew",
            )
        return allocation

    @classmethod
    def read(cls, path: str | Path) -> Allocation:
        """Return the allocation in a file.

        Raises:
            RecipeError: the file is missing or unreadable, or does not hold an allocation.
        """
        path = expanded(path)
        try:
            data = parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"no allocation file at {path}") from None
        except (OSError, ValueError) as error:
            raise RecipeError(f"cannot read {path} as JSON: {error}") from None
        return cls.from_dict(data, str(path))

    def check_matches(self, table: UnitTable) -> None:
        """Raise unless every layer of this allocation is in ``table`` with the same shape.

        Raises:
            VerificationError: layers are missing or have another shape; the message names the first.
        """
        known = set(table.layers)
        odd = [f"{a.name} [{a.out_features}, {a.in_features}]" for a in self.table.layers if a not in known]
        if odd:
            raise VerificationError(
                f"the allocation is for another model: {len(odd)} of its {len(self.table.layers)} layers "
                f"are not in this one, e.g. {'; '.join(odd[:3])}",
                hint="use the model that it was made for, or allocate anew",
            )


def _read(data: dict[str, Any], source: str) -> Allocation:
    """Return the allocation of a document of the right schema and version.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: a value is missing, or of a wrong type
            or size.
        RecipeError: units are there twice, or a level does not fit its unit.
    """
    units, levels = [], []
    names: set[str] = set()
    sensitivities: dict[str, list[float]] = {}
    for entry in data["units"]:
        unit = _read_unit(entry)
        own = [layer.name for layer in unit.layers]
        own = own if unit.name in own else [unit.name, *own]
        if len(set(own)) < len(own) or names & set(own) or unit.weights != entry["weights"]:
            raise RecipeError(f"{source}: unit {shown(unit.name)} is there twice or miscounted")
        names.update(own)
        units.append(unit)
        levels.append(_read_level(entry["level"], unit, source))
        for name, value in entry.get("sensitivity", {}).items():
            sensitivities.setdefault(name, []).append(_typed(value, float, "sensitivity"))
    if not units or any(len(values) != len(units) for values in sensitivities.values()):
        raise ValueError("it has no units, or a sensitivity for some of them only")
    target = parse_fraction(data["budget"]["target"])
    if not 0 <= target < 1:
        raise ValueError(f"target {target} is outside [0, 1)")
    provenance, stored = data.get("provenance", {}), data.get("stored", {})
    if not isinstance(provenance, dict):
        raise TypeError("its provenance is no mapping")
    for key, kind in _BASELINE.items():
        value = _typed(provenance.get(key, kind()), kind, key)
        if kind is list:
            for name in value:
                _typed(name, str, key)
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored.values()):
        raise TypeError("stored is no mapping from layers to names in files")
    return Allocation(
        UnitTable(tuple(units)),
        tuple(levels),
        target,
        {name: tuple(values) for name, values in sensitivities.items()},
        provenance,
        stored,
    )


def _groups_record(unit: Unit, groups: Groups) -> dict[str, Any]:
    """Return ``groups`` of a unit."""
    columns = [layer.name for layer in unit.layers if not layer.inner]
    return {"count": groups.count, "quantum": groups.quantum, "columns": columns}


def _read_groups(record: dict[str, Any], layers: list[Layer]) -> list[Layer]:
    """Return the layers of a unit with the groups that its entry gives.

    Raises:
        KeyError, TypeError, ValueError: a value is missing, or of a wrong type or size.
    """
    count, quantum = (_typed(record[key], int, key) for key in ("count", "quantum"))
    columns = _typed(record["columns"], list, "columns")
    grouped = []
    for layer in layers:
        inner = layer.name not in columns
        length = layer.out_features if inner else layer.in_features
        if min(count, quantum) < 1 or count % quantum or length % count:
            raise ValueError(f"{shown(layer.name)} does not split into {count} groups in steps of {quantum}")
        grouped.append(replace(layer, groups=Groups(count, quantum), inner=inner))
    return grouped


def _read_unit(entry: dict[str, Any]) -> Unit:
    """Return the unit of an entry of ``units``.

    Raises:
        KeyError, TypeError, ValueError: a value is missing, or of a wrong type or size.
    """
    layers = []
    for layer in entry["layers"]:
        name, (rows, columns) = _typed(layer["name"], str, "name"), _typed(layer["shape"], list, "shape")
        if min(_typed(length, int, "shape") for length in (rows, columns)) < 1:
            raise ValueError(f"layer {shown(name)} has the shape {shown(layer['shape'])}")
        layers.append(Layer(name, rows, columns))
    block = _typed(entry["block"], int, "block")
    if block < 0 or not layers:
        raise ValueError(f"unit {shown(entry['name'])} has block = {block} and {len(layers)} layers")
    if "groups" in entry:
        layers = _read_groups(_typed(entry["groups"], dict, "groups"), layers)
    return Unit(_typed(entry["name"], str, "name"), block, tuple(layers))


def _read_level(text: object, unit: Unit, source: str) -> Level:
    """Return the level of a unit.

    Raises:
        RecipeError: the text is not a level, or the level does not fit the unit.
    """
    where = f"{source}: unit {shown(unit.name)}"
    try:
        level = Level.parse(text)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from None
    if why := level.misfit(unit):
        raise RecipeError(f"{where}: level {level.name} {why}", hint="the file was edited; allocate anew")
    return level


def _typed(value: Any, kind: type, what: str) -> Any:
    """Return a value as the type ``kind``; an int is a float too, a bool is neither.

    Raises:
        TypeError: the value has another type.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(f"{what} is {shown(value)}, expected {kind.__name__}")
    return kind(value)


def make_allocation(
    problem: AllocationProblem,
    choice: tuple[int, ...],
    sensitivities: Mapping[str, tuple[float, ...]] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Allocation:
    """Return the allocation of a choice of levels, int[U].

    Raises:
        VerificationError: the choice misses the budget or takes a forbidden level, which is a bug of the
            allocator.
    """
    if problem.total_kept(choice) != problem.budget.kept:
        raise VerificationError(
            f"the allocator returned {problem.total_kept(choice):,} kept weights, "
            f"the budget is {problem.budget.kept:,}",
            hint="this is a bug of the allocator",
        )
    odd = np.flatnonzero(~problem.may[np.arange(len(choice)), list(choice)])
    if len(odd):
        raise VerificationError(
            f"the allocator took {problem.menu[choice[odd[0]]]} for {problem.table[int(odd[0])].name}, "
            "which its bounds forbid",
            hint="this is a bug of the allocator",
        )
    levels = tuple(problem.menu[k] for k in choice)
    return Allocation(problem.table, levels, problem.target, sensitivities or {}, provenance or {})
