"""Menus: the levels that an allocation chooses from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from msp_plugin.errors import RecipeError
from msp_plugin.plan.levels import Kind, Level

#: Eight steps of one eighth. With one M, the levels of every layer differ by multiples of one count of
#: weights, so that budgets are met exactly; 2:8 and 1:8 run on 2:4 kernels. The choice is ours: the paper's
#: levels are not published.
DEFAULT_LEVELS = ("dense", "7:8", "6:8", "5:8", "4:8", "3:8", "2:8", "1:8")

#: Channels that the widths of an MLP come in: matrix kernels work on tiles of 64 or more.
DEFAULT_QUANTUM = 64
#: Widths in the steps of the default levels.
WIDTHS = tuple(f"{share}/8 wide" for share in range(7, 0, -1))
#: Menus that have a name. 2:4 kernels run every level of ``servable`` except dense; the last three make a model
#: smaller, as ``msp export --to small`` writes it.
MENUS = {
    "default": DEFAULT_LEVELS,
    "servable": ("dense", "2:4", "3:8 in 2:4", "2:8", "1:8", "1:16"),
    "width": ("dense", *WIDTHS),
    "depth": ("dense", "dropped"),
    "mixed": ("dense", *WIDTHS, "dropped"),
}


def parse_menu(levels: Iterable[object]) -> tuple[Level, ...]:
    """Return the distinct levels of a menu, densest first; at equal sparsity the freer pattern first.

    Args:
        levels: levels, or names of MENUS, or one text of them with commas.

    Raises:
        RecipeError: the menu is empty, names a level twice, or holds a text that is not a level.
    """
    if isinstance(levels, str):
        levels = [part for part in levels.split(",") if part.strip()]
    menu, whole = [], []
    for text in levels:
        name = text.strip().lower() if isinstance(text, str) else None
        if name in MENUS:
            whole += [Level.parse(level) for level in MENUS[name]]
        else:
            menu.append(Level.parse(text))
    if not menu and not whole:
        raise RecipeError("the list of levels is empty", hint='give at least one, e.g. ["2:4"]')
    twice = sorted({level.name for level in menu if menu.count(level) > 1})
    if twice:
        raise RecipeError(f"levels named twice: {', '.join(twice)}", hint="name each level once")
    return tuple(sorted(dict.fromkeys([*menu, *whole]), key=_menu_order))


def _menu_order(level: Level) -> tuple[Fraction, int, int, str]:
    kind, period = (pattern.kind.value, pattern.m) if (pattern := level.pattern) else (len(Kind), 0)
    return level.sparsity, kind, -period, level.name


def has_widths(menu: Iterable[Level]) -> bool:
    """Return True if a level of the menu keeps some heads or channels of a unit."""
    return any(level.by_groups for level in menu)


def menu_names(menu: Sequence[Level]) -> list[str]:
    """Return the names of a menu in its order."""
    return [level.name for level in menu]
