"""Patterns that name modules: in targets, ignore, bounds and protect."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

import torch

from msp_plugin.errors import RecipeError, nearest


def matches(pattern: str, name: str, module: torch.nn.Module) -> bool:
    """Return True if a pattern names a module.

    A pattern is a module's name, a name ending (``q_proj``), a class name, a shell pattern with ``*``, or
    ``re:`` and a regular expression that is matched from the start of the name.

    Raises:
        RecipeError: the regular expression is not valid.
    """
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise RecipeError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    if "*" in pattern:
        return fnmatch.fnmatchcase(name, pattern)
    classes = {cls.__name__ for cls in type(module).__mro__ if cls.__module__ != "builtins"}
    return pattern == name or name.endswith("." + pattern) or pattern in classes - {"Module", "object"}


def check_patterns(model: torch.nn.Module, kind: str, patterns: Iterable[str]) -> None:
    """Raise unless each pattern matches a linear or an embedding; ``kind`` names the option.

    One of ``ignore`` may as well match modules with parameters and without linears, such as norms or a router, which are
    not pruned anyway.

    Raises:
        RecipeError: a pattern matches nothing, or only modules that hold others.
    """
    named = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        matched = [module for name, module in named.items() if matches(pattern, name, module)]
        if any(isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) for module in matched):
            continue
        if kind == "ignore" and any(_is_never_pruned(module) for module in matched):
            continue
        if matched:
            raise RecipeError(
                f"{kind} {pattern!r} matches {type(matched[0]).__name__} modules, but no linear",
                hint=f"for the linears inside write {_inside(pattern)}",
            )
        leaves = {n.rpartition(".")[2] for n, m in named.items() if isinstance(m, torch.nn.Linear)}
        raise RecipeError(
            f"{kind} {pattern!r} matches no module of {type(model).__name__}",
            hint=nearest(pattern, leaves | {"Linear"}),
        )


def _is_never_pruned(module: torch.nn.Module) -> bool:
    """Return True if a module has parameters, and no linear among its parts."""
    linear = any(isinstance(part, torch.nn.Linear) for part in module.modules())
    return not linear and next(module.parameters(), None) is not None


def _inside(pattern: str) -> str:
    """Return a pattern for what is inside of the modules that one matches."""
    if pattern.startswith("re:"):
        return f'"re:(?:{pattern[3:].replace("$", "")})[.].*"'
    if "*" in pattern:
        return f'"{pattern}.*"'
    return f'"*{pattern}.*", or "re:.*{pattern}[.].*"'
