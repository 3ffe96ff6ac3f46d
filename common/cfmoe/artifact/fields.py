"""Checked access to the fields of a JSON object: what is missing, of another type or out of bounds is a one-line error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cfmoe.errors import CFMoEError


class Fields:
    """A JSON object of the file `path`; `prefix` says where in the file it is."""

    def __init__(self, path: Path, value: Any, prefix: str = "") -> None:
        self.path = path
        self._prefix = prefix
        if not isinstance(value, dict):
            raise CFMoEError(f"{path}: {prefix.rstrip('.') or 'the file'} is not a JSON object; compile the model again")
        self._value: dict[str, Any] = value

    def wrong(self, name: str, what: str) -> CFMoEError:
        """The error that says what is wrong with field `name`."""
        return CFMoEError(f"{self.path}: {self._prefix}{name} {what}; copy the artifact again or compile the model again")

    def value(self, name: str) -> Any:
        if name not in self._value:
            raise self.wrong(name, "is missing")
        return self._value[name]

    def has(self, name: str) -> bool:
        return name in self._value

    def text(self, name: str) -> str:
        return self._text(name, self.value(name))

    def choice(self, name: str, choices: Sequence[str]) -> str:
        value = self.text(name)
        if value not in choices:
            raise self.wrong(name, f"is {value!r}, not one of {', '.join(choices)}")
        return value

    def hex(self, name: str, digits: int) -> str:
        return self._hex(name, self.value(name), digits)

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self._integer(name, self.value(name), low, high)

    def boolean(self, name: str) -> bool:
        value = self.value(name)
        if not isinstance(value, bool):
            raise self.wrong(name, f"is {value!r}, not true or false")
        return value

    def integer_list(self, name: str, low: int, high: int) -> list[int]:
        return [self._integer(f"{name}[{i}]", item, low, high) for i, item in enumerate(self._list(name))]

    def text_list(self, name: str) -> list[str]:
        return [self._text(f"{name}[{i}]", item) for i, item in enumerate(self._list(name))]

    def hex_table(self, name: str, digits: int) -> list[list[str]]:
        table = []
        for i, row in enumerate(self._list(name)):
            if not isinstance(row, list):
                raise self.wrong(f"{name}[{i}]", "is not a list")
            table.append([self._hex(f"{name}[{i}][{j}]", item, digits) for j, item in enumerate(row)])
        return table

    def object(self, name: str) -> Fields:
        return Fields(self.path, self.value(name), f"{self._prefix}{name}.")

    def object_list(self, name: str) -> list[Fields]:
        return [Fields(self.path, item, f"{self._prefix}{name}[{i}].") for i, item in enumerate(self._list(name))]

    def objects(self) -> Iterator[tuple[str, Fields]]:
        """The object's own entries, each an object."""
        for name in self._value:
            yield name, self.object(name)

    def texts(self) -> dict[str, str]:
        """The object's own entries, each a text."""
        return {name: self.text(name) for name in self._value}

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.wrong(name, f"is {value!r}, not a text")
        return value

    def _hex(self, name: str, value: Any, digits: int) -> str:
        if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
            raise self.wrong(name, f"is {value!r}, not {digits} lower-case hexadecimal digits")
        return value

    def _integer(self, name: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, f"is {value!r}, not an integer")
        if not low <= value <= high:
            bounds = str(low) if low == high else f"between {low} and {high}"
            raise self.wrong(name, f"is {value}, not {bounds}")
        return value

    def _list(self, name: str) -> list[Any]:
        value = self.value(name)
        if not isinstance(value, list):
            raise self.wrong(name, f"is {type(value).__name__}, not a list")
        return value
