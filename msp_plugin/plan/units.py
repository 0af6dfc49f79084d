"""Units: the rows of an allocation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One prunable linear: its module name and its weight's shape [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        """Count of weights, without the bias."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Unit:
    """One layer, the layers that inference fuses into one matrix, or a block; its layers share a level."""

    name: str
    block: int
    layers: tuple[Layer, ...]

    @property
    def weights(self) -> int:
        """Count of weights of all layers of the unit."""
        return sum(layer.weights for layer in self.layers)


@dataclass(frozen=True)
class UnitTable:
    """All units of a model in the model's own order."""

    units: tuple[Unit, ...]

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def __getitem__(self, index: int) -> Unit:
        return self.units[index]

    @property
    def names(self) -> tuple[str, ...]:
        """Unit names in order."""
        return tuple(unit.name for unit in self.units)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers of all units in order."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def weights(self) -> int:
        """Count of prunable weights."""
        return sum(unit.weights for unit in self.units)


#: Projections that inference engines fuse, and the name of the fused unit. vLLM loads them into one
#: matrix, so a format or kernel can only be chosen for all of them together.
FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}


#: What a unit may be: what inference fuses, each layer on its own, or a whole decoder block.
GRANULARITIES = ("unit", "layer", "block")


def group_layers(layers: Iterable[tuple[int, Layer]], granularity: str = "unit") -> UnitTable:
    """Return the units of ``(block, layer)`` pairs.

    With ``unit``, siblings that inference fuses share a level: a group is fused with the members that are
    there, so if the user ignores a layer, the others still share one. With ``layer`` each layer is a unit,
    with ``block`` all layers of a decoder block are one.
    """
    units: dict[str, list[Layer]] = {}
    blocks: dict[str, int] = {}
    for block, layer in layers:
        key = _unit_name(block, layer, granularity)
        units.setdefault(key, []).append(layer)
        blocks.setdefault(key, block)
    return UnitTable(
        tuple(
            Unit(name if len(members) > 1 else members[0].name, blocks[name], tuple(members))
            for name, members in units.items()
        )
    )


def _unit_name(block: int, layer: Layer, granularity: str) -> str:
    parent, _, leaf = layer.name.rpartition(".")
    if granularity == "layer":
        return layer.name
    if granularity == "block":
        head, number, _ = f".{layer.name}".partition(f".{block}.")
        return f"{head}{number}".strip(".") if number else f"block {block}"
    fused = next((name for parts, name in FUSED.items() if leaf in parts), leaf)
    return f"{parent}.{fused}" if parent else fused


def shared_inputs(table: UnitTable) -> tuple[Unit, ...]:
    """Return the layers of a table grouped by their input, whatever its granularity.

    The layers that inference fuses read the same tensor.
    """
    return group_layers((unit.block, layer) for unit in table for layer in unit.layers).units
