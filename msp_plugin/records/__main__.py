"""Print this room's README: ``python -m msp_plugin.records > msp_plugin/records/README.md``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from msp_plugin.records.base import Part, Record
from msp_plugin.records.comparison import CompareRecord
from msp_plugin.records.evaluation import EvalRecord
from msp_plugin.records.run import RunRecord

RECORDS: tuple[type[Record], ...] = (RunRecord, CompareRecord, EvalRecord)
HEAD = """\
# Records

The JSON files that describe a run, a comparison and an evaluation. One pydantic class writes and reads each of them,
and this page is printed from the classes: `python -m msp_plugin.records`.

Every key is written. An empty list, or null where the tables allow it, means that nothing was measured; infinity and
NaN are written as null. A reader refuses null elsewhere and a value of another type, treats a missing key as empty or
null, and keeps keys that it does not know, so a new key needs no new version. Only what identifies a part, such as the
`name` of a stage, may not be missing. A file of a newer version is refused, a file of an older version is converted. In
Python, `RunRecord.read(path)` of `msp_plugin.records.run` reads run.json; `.comparison` and `.evaluation` hold the
other two classes.
"""


def readme() -> str:
    """Return the README: a section for each file, then a table for each class that they share."""
    parts: dict[str, dict[str, Any]] = {}
    text = [HEAD]
    for record in RECORDS:
        schema = _schema(record)
        for name, part in schema.pop("$defs", {}).items():
            parts.setdefault(name, part)
        text.append(
            f"## {record.FILE}\n\n{schema['description']} `schema` is `{record.SCHEMA}`, "
            f"`version` is {record.VERSION}.\n\n{_table(schema)}"
        )
    text.append("## Parts\n")
    text += [f"### {name}\n\n{part['description']}\n\n{_table(part)}" for name, part in sorted(parts.items())]
    return "\n".join(text)


def _schema(part: type[Part]) -> dict[str, Any]:
    """Return a class as JSON Schema."""
    return part.model_json_schema(mode="serialization")


def _table(schema: Mapping[str, Any]) -> str:
    """Return the keys of an object as a table in Markdown."""
    rows = [
        f"| `{key}` | {_type(value)} | {_cell(value['description'])} |"
        for key, value in schema["properties"].items()
    ]
    return "\n".join(["| key | value | meaning |", "|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def _type(schema: Mapping[str, Any]) -> str:
    """Return the type of a value in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        names = dict.fromkeys(_type(option) for option in schema["anyOf"])
        if "number" in names:
            names.pop("integer", None)
        return " or ".join(names)
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(_type(item) for item in schema['prefixItems'])}]"
        return f"list of {_type(schema['items'])}"
    if "additionalProperties" in schema and "properties" not in schema:
        values = schema["additionalProperties"]
        return "object" if values is True else f"object of {_type(values)}"
    return str(schema.get("type", "any value"))


if __name__ == "__main__":
    sys.stdout.write(readme())
