"""Find plugins, check them, and build the components that a recipe names."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy
from pydantic import TypeAdapter, ValidationError

from msp_plugin.errors import MSPError, PluginError, RecipeError, nearest, shown
from msp_plugin.plugins import hookspecs

if TYPE_CHECKING:
    from msp_plugin.formats.base import PackedFormat

log = logging.getLogger(__name__)

#: The kinds of components, and the word for one of each.
KINDS = {
    "estimators": "estimator",
    "allocators": "allocator",
    "pruners": "pruner",
    "recoveries": "recovery",
    "formats": "format",
    "exporters": "exporter",
    "checks": "check",
}
#: The hooks that register a kind, where they are more than ``msp_register_`` and its name.
HOOKS = {"pruners": ("msp_register_pruners", STRUCTURED := "msp_register_structured_pruners")}
BUILTIN = "msp_plugin.plugins.builtin"


@dataclass(frozen=True)
class Component:
    """A registered class and the plugin that registered it."""

    kind: str
    cls: Any
    owner: str

    @property
    def name(self) -> str:
        """The name that recipes use."""
        return str(self.cls.name)

    @property
    def options(self) -> dict[str, str]:
        """Option name to its default, as text."""
        return {
            f.name: "required" if f.default is dataclasses.MISSING else repr(f.default)
            for f in dataclasses.fields(self.cls)
        }

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (inspect.getdoc(self.cls) or "").split("\n")[0]


class Plugins:
    """All plugins of this environment, with what they register.

    Args:
        extra: further plugin objects by name, as tests use them.
        entry_points: False to leave out installed plugins.

    Raises:
        PluginError: a plugin cannot be imported, misspells a hook, or two register one name.
    """

    def __init__(self, extra: Mapping[str, object] | None = None, *, entry_points: bool = True):
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.owners: dict[int, str] = {}
        self._add(importlib.import_module(BUILTIN), BUILTIN)
        if entry_points:
            for name, plugin, owner in _installed():
                self._add(plugin, owner, name)
        for name, plugin in (extra or {}).items():
            self._add(plugin, name)
        self._check_pending()
        self.components = {kind: self._collect(kind) for kind in KINDS}

    @property
    def hook(self) -> Any:
        """The pluggy hook relay."""
        return self.manager.hook

    @property
    def formats(self) -> list[PackedFormat]:
        """The formats of packed weights, as checkpoints are read with them, by name."""
        return [self.components["formats"][name].cls() for name in sorted(self.components["formats"])]

    def tell(self, event: str, **about: Any) -> None:
        """Call the observers of an event, e.g. ``msp_run_finished``; a bug in one is only logged."""
        for observer in reversed(getattr(self.hook, event).get_hookimpls()):  # pluggy's own order
            try:
                observer.function(**{name: about[name] for name in observer.argnames})
            except MSPError:  # raised for the user to see
                raise
            except Exception as error:
                owner = self.owners[id(observer.plugin)]
                log.warning("plugin %s: %s() raised %s: %s", owner, event, type(error).__name__, error)

    def _add(self, plugin: object, owner: str, name: str | None = None) -> None:
        """Register a plugin's hooks under a name; the owner is named in errors."""
        for attribute in dir(plugin):
            impl = getattr(getattr(plugin, attribute, None), f"{hookspecs.PROJECT}_impl", None)
            if impl is None:
                continue
            for parameter in inspect.signature(getattr(plugin, attribute)).parameters.values():
                if parameter.default is not inspect.Parameter.empty:
                    raise PluginError(
                        f"plugin {owner}: {attribute}() gives its parameter {parameter.name!r} a default",
                        hint="pluggy never fills such a parameter: remove the default",
                    )
        try:
            self.manager.register(plugin, name=name or owner)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {owner}: {error}") from None
        except ValueError as error:
            raise PluginError(
                f"two plugins are called {name or owner!r}: {error}", hint="uninstall or rename one"
            ) from None
        self.owners[id(plugin)] = owner

    def _check_pending(self) -> None:
        """Raise if a plugin implements a hook that does not exist."""
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            known = [n for n in dir(hookspecs) if n.startswith("msp_")]
            wrong = str(error).split("'")[1] if "'" in str(error) else str(error)
            owner = self.owners.get(id(getattr(error, "plugin", None)), "unknown")
            raise PluginError(
                f"plugin {owner} implements a hook {wrong!r} that does not exist",
                hint=nearest(wrong, known),
            ) from None

    def _collect(self, kind: str) -> dict[str, Component]:
        """Return the components of a kind by name."""
        components: dict[str, Component] = {}
        hooks = HOOKS.get(kind, (f"msp_register_{kind}",))
        impls = [(impl, hook) for hook in hooks for impl in getattr(self.hook, hook).get_hookimpls()]
        for impl, hook in sorted(impls, key=lambda found: self.owners[id(found[0].plugin)]):
            owner = self.owners[id(impl.plugin)]
            try:
                classes = impl.function()
            except Exception as error:
                raise PluginError(
                    f"plugin {owner}: {hook}() raised {type(error).__name__}: {error}"
                ) from error
            for cls in classes or ():
                component = _checked(cls, kind, owner)
                if hook == STRUCTURED:
                    _check_structured(cls, owner)
                if component.name in components:
                    raise PluginError(
                        f"two plugins register {kind} called {component.name!r}: "
                        f"{components[component.name].owner} and {owner}",
                        hint="uninstall one, or block it with MSP_BLOCK_PLUGINS=NAME",
                    )
                components[component.name] = component
        return components

    def options(self, kind: str, name: str) -> dict[str, str]:
        """Return the options of a component and their defaults.

        Raises:
            RecipeError: there is no such component.
        """
        known = self.components[kind]
        if name not in known:
            raise RecipeError(f"there is no {KINDS[kind]} called {shown(name)}", hint=nearest(name, known))
        return known[name].options

    def build(self, kind: str, spec: object) -> Any:
        """Return the component that a recipe names, with its options checked.

        Args:
            kind: one of KINDS.
            spec: a name, or a mapping with ``name`` and options.

        Raises:
            RecipeError: unknown name or option, or an option of the wrong type.
        """
        known, one = self.components[kind], KINDS[kind]
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise RecipeError(
                f"{one} {shown(spec)} has no name",
                hint=f"write a name or {{name: ..., option: ...}}; known: {', '.join(sorted(known))}",
            )
        options = {key: value for key, value in spec.items() if key != "name"}
        name = spec["name"]
        fields = self.options(kind, name)
        cls = known[name].cls
        for option in options:
            if option not in fields:
                raise RecipeError(
                    f"{one} {name!r} has no option {shown(option)}", hint=nearest(str(option), fields)
                )
        for option, value in options.items():
            _check_finite(f"{one} {name!r}: option {option}", value)
            if isinstance(value, int) and value.bit_length() > 63:
                raise RecipeError(f"{one} {name!r}: option {option} = {shown(value)} is beyond every count")
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for option, value in options.items():
            if isinstance(value, bool) and type(defaults[option]) in (int, float):
                raise RecipeError(f"{one} {name!r}: option {option} = {value}, expected a number")
            if isinstance(defaults[option], tuple) and not isinstance(value, list | tuple):
                options[option] = (value,)
        try:
            component = TypeAdapter(cls).validate_python(options)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecipeError(
                f"{one} {name!r}: option {where} = {shown(first['input'])}: {first['msg']}"
            ) from None
        for option in options:  # once more: "nan" in quotes has become a number
            _check_finite(f"{one} {name!r}: option {option}", getattr(component, option))
        return component


def _check_finite(what: str, value: object) -> None:
    """Raise RecipeError if a value is a float that is not finite, or a tuple or list with one."""
    for each in value if isinstance(value, tuple | list) else (value,):
        if isinstance(each, float) and not math.isfinite(each):
            raise RecipeError(f"{what} = {each} is no finite number")


def spec_of(component: Any) -> dict[str, Any]:
    """Return the recipe form of a component: its name and every option's value."""
    return {"name": component.name, **dataclasses.asdict(component)}


def _checked(cls: object, kind: str, owner: str) -> Component:
    """Return the component of a class that a plugin registers; raise if it cannot be one."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise PluginError(
            f"plugin {owner} registers {cls!r} among the {kind}", hint="return frozen dataclasses"
        )
    if not isinstance(getattr(cls, "name", None), str):
        raise PluginError(
            f"plugin {owner}: {cls.__name__} has no name", hint='add a class attribute, name = "..."'
        )
    return Component(kind, cls, owner)


def _check_structured(cls: type, owner: str) -> None:
    """Raise PluginError if a class makes no widths."""
    from msp_plugin.pruning.structured import WidthPruner

    if not issubclass(cls, WidthPruner):
        raise PluginError(
            f"plugin {owner} registers {cls.__name__} among the structured pruners, and it makes no widths",
            hint="subclass msp_plugin.StructuredPruner, or register it with msp_register_pruners",
        )


def _installed() -> list[tuple[str, object, str]]:
    """Return (entry-point name, object, owner) of the installed plugins, sorted by name."""
    blocked = {n.strip() for n in os.environ.get("MSP_BLOCK_PLUGINS", "").split(",") if n.strip()}
    plugins = []
    for entry in importlib.metadata.entry_points(group=hookspecs.PROJECT):
        if entry.name in blocked:
            continue
        owner = f"{entry.name} ({entry.dist.name} {entry.dist.version})" if entry.dist else entry.name
        try:
            plugins.append((entry.name, entry.load(), owner))
        except Exception as error:
            raise PluginError(
                f"plugin {owner} cannot be imported: {type(error).__name__}: {error}",
                hint=f"repair or uninstall it, or block it with MSP_BLOCK_PLUGINS={entry.name}",
            ) from error
    return sorted(plugins, key=lambda item: (item[0], item[2]))
