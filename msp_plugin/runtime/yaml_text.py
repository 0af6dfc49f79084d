"""YAML from outside: recipes, tasks of lm-eval, and values on the command line."""

from __future__ import annotations

from typing import Any

import yaml

from msp_plugin.runtime.documents import DEEPEST, check_document


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: it is no YAML, an explicit tag does not fit its value, or see ``check_document``.
    """
    try:
        data = yaml.load(text, Loader=loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
    ) as error:  # as in "!!bool maybe"
        raise ValueError(f"a value is not what it is tagged as: {type(error).__name__}: {error}") from None
    check_document(data)
    return data
