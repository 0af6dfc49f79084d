"""Units: the rows of an allocation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Groups:
    """How a layer of an attention or an MLP splits into equal parts that go one by one, through all layers of its half.

    An inner layer has a group's weights in rows, the last one in columns.

    Args:
        count: KV heads, each with its query heads; or channels.
        quantum: a width keeps a multiple of so many.
    """

    count: int
    quantum: int = 1


@dataclass(frozen=True)
class Layer:
    """One prunable linear: its module name and its weight's shape [out_features, in_features].

    Args:
        groups: known where the menu holds widths; it is no part of the layer's identity.
        inner: another layer ends its attention or MLP. What a level takes out of that changes the model through that last
            layer alone, and counts there. Known where a level narrows; it is no part of the layer's identity.
    """

    name: str
    out_features: int
    in_features: int
    groups: Groups | None = field(default=None, compare=False)
    inner: bool = field(default=False, compare=False)

    @property
    def weights(self) -> int:
        """Count of weights, without the bias."""
        return self.out_features * self.in_features

    @property
    def layers(self) -> tuple[Layer]:
        """The layer itself, so that it can stand for a unit that holds it alone."""
        return (self,)


@dataclass(frozen=True)
class Unit:
    """Layers that share a level: one layer, the layers that inference fuses, half a block, or a whole block.

    Args:
        block: the number of its decoder block.
    """

    name: str
    block: int
    layers: tuple[Layer, ...]

    @property
    def weights(self) -> int:
        """Count of weights of all layers of the unit."""
        return sum(layer.weights for layer in self.layers)

    @property
    def groups(self) -> Groups | None:
        """The groups of the unit's layers, as its first layer has them; None where they are not known."""
        return self.layers[0].groups


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


#: Projections that inference engines fuse, and the name of the fused unit. vLLM loads them into one matrix,
#: so that they can only have one format and one kernel.
FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}

#: A unit is a group that inference fuses, a single layer, half a decoder block (its attention or its MLP), or a
#: whole one.
GRANULARITIES = ("unit", "layer", "half", "block")


def group_layers(layers: Iterable[tuple[int, Layer]], granularity: str = "unit") -> UnitTable:
    """Return the units of ``(block, layer)`` pairs, in their order.

    Args:
        granularity: one of GRANULARITIES. With ``unit``, a group that inference fuses has the members that
            are given: if the user ignores one of its layers, the others still share a level. With ``half``, a
            unit is the layers of one child module of the block, such as ``self_attn`` or ``mlp``; the layers
            that are children themselves, as in OPT's MLP, are one unit with the block's name.
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
    """Return the name of the unit that a layer belongs to."""
    parent, _, leaf = layer.name.rpartition(".")
    if granularity == "layer":
        return layer.name
    if granularity in ("half", "block"):
        head, number, inside = f".{layer.name}".partition(f".{block}.")
        whole = f"{head}{number}".strip(".") if number else f"block {block}"
        child, inner, _ = inside.partition(".")
        return f"{whole}.{child}" if granularity == "half" and inner else whole
    fused = next((name for parts, name in FUSED.items() if leaf in parts), leaf)
    return f"{parent}.{fused}" if parent else fused


def pruned_together(table: UnitTable) -> tuple[Unit, ...]:
    """Return the units of a table, those whose layers share an input joined: no unit and no input is in two."""
    owners = {layer: unit for unit in table for layer in unit.layers}
    wider = (
        max(group, owners[group.layers[0]], key=lambda unit: len(unit.layers))
        for group in shared_inputs(table)
    )
    return tuple(dict.fromkeys(wider))


def shared_inputs(table: UnitTable) -> tuple[Unit, ...]:
    """Return the layers of a table, of any granularity, grouped by the input that they share.

    The layers that inference fuses read the same tensor.
    """
    return group_layers((unit.block, layer) for unit in table for layer in unit.layers).units
