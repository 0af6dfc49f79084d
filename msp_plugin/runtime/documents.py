"""Parse JSON and YAML from outside: records, recipes, lm-eval tasks, and values on the command line."""

from __future__ import annotations

import json
from typing import Any

import yaml

from msp_plugin.errors import shown

#: The deepest nesting that is read. Our own files have seven levels, a model's config about as many.
DEEPEST = 64


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not JSON, has a key twice in one object, or is nested deeper than DEEPEST
            levels.
    """
    try:
        data = json.loads(text, object_pairs_hook=_without_repeated_keys)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    check_depth(data)
    return data


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return the value of a YAML text; ``loader`` may know further tags.

    Raises:
        ValueError: the text is not YAML, a value does not fit its tag, or it is nested deeper than DEEPEST
            levels.
    """
    try:
        data = yaml.load(text, Loader=loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError, ValueError) as error:
        # PyYAML's constructors raise these for values such as "!!bool maybe".
        raise ValueError(f"a value does not fit its tag: {type(error).__name__}: {error}") from None
    check_depth(data)
    return data


def check_depth(data: object) -> None:
    """Raise unless a document is nested at most DEEPEST levels deep.

    Raises:
        ValueError: the document is deeper, or contains itself by a YAML alias.
    """
    level = [data]
    for _ in range(DEEPEST + 1):
        collections = {id(value): value for value in level if isinstance(value, dict | list | tuple | set)}
        level = [part for value in collections.values() for part in _parts(value)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _parts(value: Any) -> list[object]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs; Python itself would silently keep the last of two equal keys."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {shown(key)} is there twice in one object")
        result[key] = value
    return result
