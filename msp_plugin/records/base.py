"""A record is a JSON file with a schema and a version, written and read by one class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from msp_plugin.errors import RecipeError, shown
from msp_plugin.runtime.documents import parse_json
from msp_plugin.runtime.files import finite_json, write_json

_DAMAGED = "restore the file from a copy, or remove it"


class Part(BaseModel):
    """A part of a record.

    Every key is written; null, where a key may be null, or an empty list means that nothing was measured. A missing key
    is read as its default, an unknown key is kept, and a value of the wrong type is an error.
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with null for infinity and NaN."""
        data: dict[str, Any] = finite_json(self.model_dump(mode="json"))
        return data


class Record(Part):
    """The contents of a file; ``schema`` and ``version`` are written with the fields."""

    #: The file's usual name, and what messages call it.
    FILE: ClassVar[str]
    TITLE: ClassVar[str]
    SCHEMA: ClassVar[str]
    VERSION: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        return {"schema": self.SCHEMA, "version": self.VERSION, **super().to_dict()}

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the record in a file.

        Raises:
            RecipeError: the file is missing or holds no JSON object, or see ``from_dict``.
        """
        return cls.from_dict(read_object(path), str(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any], name: str) -> Self:
        """Return the record with these contents; an older version is converted.

        Args:
            name: names the record in errors, such as its path.

        Raises:
            RecipeError: the schema is wrong, the version is newer, or a value has the wrong type.
        """
        if data.get("schema") != cls.SCHEMA:
            raise RecipeError(
                f"{name} is no {cls.TITLE}: its schema is {shown(data.get('schema'))}",
                hint=f'expected "{cls.SCHEMA}"',
            )
        version = data.get("version")
        if type(version) is not int or not 1 <= version <= cls.VERSION:
            known = " and ".join(str(number) for number in range(1, cls.VERSION + 1))
            raise RecipeError(
                f"{name} has version {shown(version)}, this package reads {known}", hint="update msp_plugin"
            )
        fields = {key: value for key, value in data.items() if key not in ("schema", "version")}
        try:
            return cls.model_validate(fields)._converted(version)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "its contents"
            raise RecipeError(f"{name} is damaged: {where}: {first['msg']}", hint=_DAMAGED) from None

    def _converted(self, version: int) -> Self:
        """Return the record converted from the file's ``version`` to the newest one."""
        return self


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        RecipeError: there is no such file, or no object in it.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is not a JSON object", hint="give run.json or compare.json")
    return data


def read_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        RecipeError: there is no such file, or no JSON in it.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"there is no {path}", hint="give a run's directory, a comparison's directory, or compare.json"
        ) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read {path} as JSON: {error}", hint=_DAMAGED) from None
