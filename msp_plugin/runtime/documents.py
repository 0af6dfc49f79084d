"""What a JSON or YAML document from outside may hold, before anyone looks for a meaning in it.

Python's parsers are more liberal than what is done with their result: they keep the last of two equal keys, halves
of surrogate pairs that no file can hold, integers that no float can, and nesting that the next recursion fails on.
"""

from __future__ import annotations

import json
from typing import Any

from msp_plugin.errors import shown

#: The deepest nesting. Our own files have seven levels, a model's config about as many.
DEEPEST = 64
#: Values that aliases may expand a YAML document to.
MOST = 10**6


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: no JSON, a key twice in one object, or see ``check_document``.
    """
    try:
        data = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    check_document(data)
    return data


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} is there twice in one object")
    return found


def check_document(data: object) -> None:
    """Raise unless every value of a document can be walked, written again and counted with.

    Raises:
        ValueError: it is nested too deep (or contains itself), aliases expand it to too many values, or it holds an
            integer beyond float64 or half of a surrogate pair.
    """
    if _measure(data, DEEPEST, {})[0] > MOST and _has_aliases(data):
        raise ValueError(f"its aliases expand to more than {MOST:,} values")


def _measure(value: object, room: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return how many values a value is made of, each alias counted, and its levels; ``known`` is by identity."""
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, int) and value.bit_length() > 1023:
        raise ValueError(f"{shown(value)} is beyond every count")
    if not isinstance(value, dict | list | tuple | set):
        return 1, 0
    if room < known.get(id(value), (0, 1))[1]:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    if id(value) not in known:
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        parts = [_measure(part, room - 1, known) for part in inner]
        known[id(value)] = (
            1 + sum(size for size, _ in parts),
            1 + max((levels for _, levels in parts), default=0),
        )
    return known[id(value)]


def _has_aliases(data: object) -> bool:
    """Return True if a collection stands in more than one place."""
    seen: set[int] = set()
    left = [data]
    while left:
        value = left.pop()
        if isinstance(value, dict | list | tuple | set):
            if id(value) in seen:
                return True
            seen.add(id(value))
            left += [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return False


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{shown(text)} holds half of a surrogate pair, which is no character") from None
