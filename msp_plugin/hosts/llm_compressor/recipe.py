"""Read a recipe for llm-compressor, and refuse entries that it would silently ignore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from msp_plugin.errors import MSPError, RecipeError, nearest, shown
from msp_plugin.hosts.llm_compressor import HOST_KEYS
from msp_plugin.hosts.llm_compressor.methods import check_method
from msp_plugin.hosts.llm_compressor.register import register_modifier
from msp_plugin.plugins.manager import Plugins
from msp_plugin.runtime.documents import parse_yaml
from msp_plugin.runtime.files import expanded
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import ResolvedOptions, resolve

if TYPE_CHECKING:
    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier

OURS, RECOVERY = "MixedSparsityModifier", "RecoveryModifier"


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error; llm-compressor would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise RecipeError(
                    f"names {shown(key)} twice in one group (line {key_node.start_mark.line + 1})",
                    hint="llm-compressor would run the last one only: put the second into a group of its own",
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_recipe(source: str | Path) -> dict[str, Any]:
    """Return the recipe in a YAML or JSON file, or in a text of several lines.

    Raises:
        RecipeError: it is missing, unreadable, or without the three levels stage, group, modifier.
    """
    path = expanded(source) if "\n" not in str(source) else None
    name = "the recipe" if path is None else f"the recipe {path}"
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"there is no recipe at {path}") from None
        except (OSError, ValueError) as error:
            raise RecipeError(f"cannot read {name}: {error}") from None
    else:
        text = str(source)
    try:
        recipe: dict[str, Any] = parse_yaml(text, _Loader)
    except RecipeError as error:
        raise RecipeError(f"{name} {error.message}", hint=error.hint) from None
    except ValueError as error:
        raise RecipeError(f"{name} is not YAML: {error}") from None
    _check_levels(recipe, name)
    return recipe


_EXAMPLE = "sparsity_stage: {sparsity_modifiers: {MixedSparsityModifier: {sparsity: 0.75}}}"


def _check_levels(recipe: Any, name: str) -> None:
    """Raise RecipeError unless a recipe has the levels stage, group and modifier."""
    if not isinstance(recipe, dict) or not recipe:
        raise RecipeError(f"{name} is empty or no mapping", hint=f"write e.g. {_EXAMPLE}")
    stages = 0
    for stage, groups in recipe.items():
        if stage == "args":
            continue
        if not str(stage).endswith("_stage") or not isinstance(groups, dict):
            raise RecipeError(
                f"{name}: the key {shown(stage)} is not a stage: llm-compressor would ignore it in silence",
                hint=f"a recipe has three levels, x_stage, y_modifiers, ClassName: {_EXAMPLE}",
            )
        for group, modifiers in groups.items():
            if not str(group).endswith("_modifiers") or not isinstance(modifiers, dict):
                raise RecipeError(
                    f"{name}: {shown(group)} in {shown(stage)} is not a group of modifiers: llm-compressor would ignore it",
                    hint=f"its name must end in _modifiers and it must hold modifiers: {_EXAMPLE}",
                )
            for modifier, arguments in modifiers.items():
                if not isinstance(arguments, dict):
                    raise RecipeError(
                        f"{name}: modifier {shown(modifier)} has {shown(arguments)} for arguments",
                        hint="write a mapping, or {}",
                    )
        stages += 1
    if not stages:
        raise RecipeError(f"{name} has no stage", hint=f"write e.g. {_EXAMPLE}")


def our_line(recipe: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a recipe's MixedSparsityModifier; None if it has none.

    Raises:
        RecipeError: there is more than one.
    """
    lines = [
        modifiers[OURS]
        for stage, groups in recipe.items()
        if str(stage).endswith("_stage")
        for modifiers in groups.values()
        if OURS in modifiers
    ]
    if len(lines) > 1:
        raise RecipeError(
            f"the recipe holds {len(lines)} lines of {OURS}",
            hint="one line covers all layers: give it several levels, or an allocation",
        )
    return lines[0] if lines else None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: its stages, and the resolved options of its MixedSparsityModifier, or None without one.

    Modifiers keep state, so each run builds new ones from the stages.
    """

    steps: Mapping[str, Any]
    options: ResolvedOptions | None

    @classmethod
    def parse(cls, source: str | Path | Mapping[str, Any], plugins: Plugins) -> Recipe:
        """Return the recipe in a file, a text or a mapping, checked as far as possible without a model.

        Raises:
            RecipeError: see read_recipe, Options.parse, resolve and build.
            HostError: see check_method.
        """
        steps = dict(source) if isinstance(source, Mapping) else read_recipe(source)
        line = our_line(steps)
        options = None
        if line is not None:
            options = resolve(Options.parse({k: v for k, v in line.items() if k not in HOST_KEYS}), plugins)
            check_method(options.pruner)
        recipe = cls(steps, options)
        recipe.build(options)
        return recipe

    @property
    def mixes(self) -> bool:
        """True if the recipe has a MixedSparsityModifier and otherwise only RecoveryModifiers."""
        modifiers = [name for _, group in self._groups() for name in group]
        return [name for name in modifiers if name != RECOVERY] == [OURS]

    def build(self, options: ResolvedOptions | None) -> tuple[Any, MixedSparsityModifier | None]:
        """Return llm-compressor's own Recipe with new modifiers, and the MixedSparsityModifier among them.

        Args:
            options: the options of our modifier, which may differ from the recipe's for a uniform baseline.

        Raises:
            RecipeError: an unknown modifier, or arguments that a modifier refuses.
        """
        modifier_class = register_modifier()
        from llmcompressor.modifiers.factory import ModifierFactory
        from llmcompressor.recipe import Recipe as HostRecipe

        if not ModifierFactory._loaded:
            ModifierFactory.refresh()
        known = {
            *ModifierFactory._main_registry,
            *ModifierFactory._experimental_registry,
            *ModifierFactory._registered_registry,
        }
        ours: MixedSparsityModifier | None = None
        modifiers: list[Any] = []
        try:
            for group, entries in self._groups():
                for name, arguments in entries.items():
                    if name not in known:
                        raise RecipeError(f"there is no modifier {shown(name)}", hint=nearest(name, known))
                    arguments = {"group": group.removesuffix("_modifiers"), **arguments}
                    if name == OURS and options is not None:
                        theirs = {key: value for key, value in arguments.items() if key in HOST_KEYS}
                        modifiers.append(ours := modifier_class.of(options, theirs))
                        continue
                    modifiers.append(
                        ModifierFactory.create(
                            name, allow_registered=True, allow_experimental=True, **arguments
                        )
                    )
            stage = list(self._stages())[-1].removesuffix("_stage")
            return HostRecipe(args=self.steps.get("args", {}), stage=stage, modifiers=modifiers), ours
        except MSPError:
            raise
        except (ValueError, TypeError) as error:
            raise RecipeError(f"llm-compressor refuses the recipe: {error}") from error

    def _stages(self) -> Iterator[str]:
        return (str(key) for key in self.steps if str(key).endswith("_stage"))

    def _groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name of each group of modifiers, with the modifiers' arguments by name."""
        for stage in self._stages():
            yield from self.steps[stage].items()
