"""The options of a run, as they are written in a recipe line, a command or a Python call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from msp_plugin.errors import RecipeError, nearest, shown
from msp_plugin.plan.menus import DEFAULT_LEVELS, DEFAULT_QUANTUM, parse_menu
from msp_plugin.runtime.files import expanded


class Options(BaseModel):
    """The options of mixed sparsity. A component is its name, or {name: ..., option: ...}.

    Args:
        sparsity: share of zeros among the prunable weights, in [0, 1). Not needed with ``allocation``.
        method: the pruner: sparsegpt, wanda, magnitude, or one that a plugin registers.
        levels: the menu: "dense", "N:M" with N kept of M, "N:M in 2:4", shares of zeros such as "0.7", widths such as
            "3/4 wide" or "3/4 wide 2:4", "dropped"; or the name of a menu, "default", "servable" (every level of it but
            dense runs on 2:4 kernels), "width", "depth" or "mixed".
        targets, ignore: which linears of the decoder blocks are pruned (see prunable_layers).
        granularity: what shares a level: ``layer``, nothing; ``unit``, the layers that inference fuses; ``half``,
            those of a block's attention or MLP; ``block``, all layers of a decoder block. Default: ``half`` where
            the menu holds widths or ``dropped``; else ``layer``, but ``unit`` where all levels run on 2:4 kernels, which take
            fused layers all or none.
        form: of `msp export --to`, which the result is sure to allow: ``sparse24``, ``bitmask``, ``small``, ``uniform``, or
            a plugin's. It gives levels and granularity their defaults, and refuses others that might not fit.
        quantum: where the menu holds widths, the channels of an MLP that stay are a multiple of it.
        bounds: least and most sparsity of the layers that a pattern matches, {pattern: [low, high]}.
        protect: patterns of layers that stay dense. Unlike ignored layers they count in the budget, so that the
            others get sparser instead. A unit obeys the bounds and protections of all its layers.
        allocator: chooses a level per unit: search, uniform, or any other of `msp plugins`.
        estimators: options of sensitivity estimators, by their name.
        allocation: path of a finished allocation.json; then nothing is searched, and options of layers, levels and
            search are refused, because the file has decided them.
        seed: of every random choice.
        cache: directory of all measurements; default $MSP_CACHE or ~/.cache/msp_plugin.
    """

    model_config = ConfigDict(extra="forbid")

    sparsity: float | str | None = None
    method: str | dict[str, Any] = "sparsegpt"
    levels: list[Any] = list(DEFAULT_LEVELS)
    targets: list[str] = ["Linear"]
    ignore: list[str] = []
    granularity: str | None = None
    form: str | None = None
    quantum: int = Field(DEFAULT_QUANTUM, ge=1)
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
            if given == "":  # a variable of the shell that is not set
                raise RecipeError(
                    "allocation is empty", hint="name an allocation.json, or leave it out to search"
                )
            if isinstance(given, str) and given:  # absolute: recipe.yaml may be run from elsewhere
                data["allocation"] = str(Path.cwd() / expanded(given))
            for key in ("targets", "ignore", "levels", "protect"):
                if isinstance(data.get(key), str):
                    data[key] = _parts(data[key])
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


def _parts(text: str) -> list[str]:
    """Return the parts of a list that is written with commas; those in brackets belong to regular expressions."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
