"""Export an allocation as a plain recipe of llm-compressor, for machines without this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import CARD_FILE, Exporter
from msp_plugin.checkpoint.manifest import Manifest, describe_files
from msp_plugin.errors import RecipeError
from msp_plugin.hosts.llm_compressor.methods import HostMethod, host_method
from msp_plugin.plan.allocation import ALLOCATION_FILE, Allocation
from msp_plugin.plan.levels import Pattern
from msp_plugin.plugins.manager import Plugins
from msp_plugin.progress import Progress
from msp_plugin.pruning.base import Pruner
from msp_plugin.records.run import RECIPE_FILE
from msp_plugin.runtime.digests import versions
from msp_plugin.runtime.files import write_text

_CARD = """# A mixed-sparsity allocation as a plain llm-compressor recipe

`recipe.yaml` prunes the model that `allocation.json` was made for, with one {modifier} for each level, which names its
layers one by one. It needs only llm-compressor:

```python
from llmcompressor import oneshot
oneshot(model=..., dataset=..., recipe="recipe.yaml", output_dir=..., pipeline="sequential")
```

llm-compressor runs one calibration pass for each modifier, densest level first, so a layer's statistics come from a
model whose denser levels are pruned already, wherever they are. `msp prune --allocation` prunes all levels in one pass,
block by block; the masks differ a little, the pattern of every layer is the same.

`mask_structure` counts the pruned weights: "6:8" there means 2:8 in `allocation.json`.
"""


@dataclass(frozen=True)
class PlainRecipe(Exporter):
    """recipe.yaml for llm-compressor alone: one modifier per level with exact layer names."""

    name = "recipe"

    def check(self, source: Checkpoint) -> None:
        plain_recipe(_allocation(source))

    def size(self, source: Checkpoint) -> int:
        return 2**20

    def write(self, source: Checkpoint, directory: Path, progress: Progress) -> Manifest:
        allocation = _allocation(source)
        recipe = plain_recipe(allocation)
        write_text(directory / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False, width=100))
        write_text(directory / ALLOCATION_FILE, allocation.to_json())
        write_text(directory / CARD_FILE, _CARD.format(modifier=_method(allocation)[1].modifier))
        progress(1, 1)
        files = describe_files([directory / RECIPE_FILE, directory / ALLOCATION_FILE])
        return Manifest(self.name, files, {}, versions=versions())


def plain_recipe(allocation: Allocation) -> dict[str, Any]:
    """Return the recipe of an allocation, a stage for each level, densest first.

    One stage for each level: of two modifiers of one class in a group, llm-compressor keeps only the last.

    Raises:
        RecipeError: the allocation names no method or one that llm-compressor has no modifier for, all its layers are
            dense, or the method cannot make one of its levels.
    """
    pruner, method = _method(allocation)
    layers: dict[Pattern, list[str]] = {}
    for layer, level in allocation.by_layer.items():
        method.check_modifier(level)
        if level.pattern and not level.is_dense:
            layers.setdefault(level.pattern, []).append(layer)
    if not layers:
        raise RecipeError("every layer of the allocation is dense", hint="there is nothing to prune")
    recipe = {}
    for level in sorted(layers, key=lambda level: (level.sparsity, level.m)):
        pruner.check_level(level)
        key = f"keep_{level.n}_of_{level.m}"
        arguments = {**method.modifier_arguments(level), "targets": layers[level]}
        recipe[f"{key}_stage"] = {f"{key}_modifiers": {method.modifier: arguments}}
    return recipe


def _allocation(source: Checkpoint) -> Allocation:
    if source.allocation is None:
        raise RecipeError(
            f"{source.path} has no {ALLOCATION_FILE}", hint="give the directory of a run of `msp prune`"
        )
    return Allocation.read(source.path / ALLOCATION_FILE)  # with the names of a model's modules


def _method(allocation: Allocation) -> tuple[Pruner, HostMethod]:
    """Return the method that an allocation was made with, and its modifier."""
    recorded = allocation.provenance.get("method")
    if not isinstance(recorded, dict) or "name" not in recorded:
        raise RecipeError("the allocation does not say which method pruned", hint="make it with `msp prune`")
    spec = {key: value for key, value in recorded.items() if key not in ("host", "version")}
    pruner = Plugins().build("pruners", spec)
    method = host_method(pruner)
    if method is None:
        raise RecipeError(
            f"llm-compressor has no modifier for method {pruner.name!r}",
            hint="use `msp prune --allocation` where this package is installed, or prune with sparsegpt or wanda",
        )
    return pruner, method
