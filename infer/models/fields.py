"""Typed reading of a JSON object, with errors that name the file, the field and its value. No torch here."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Fields:
    """The fields of a JSON object. A field that is null counts as absent. `read` collects the names asked for.

    Every method raises ValueError for a value of the wrong kind, and for an absent field without a default.
    """

    def __init__(self, file: Path, data: dict[str, Any], prefix: str = ""):
        self.file, self.data, self.prefix = file, data, prefix
        self.read: set[str] = set()
        self._sections: dict[str, Fields] = {}
        self._names: Mapping[str, str] = {}

    def renamed(self, **names: str) -> "Fields":
        """The same fields, some by other names: renamed(hidden_size="n_embd"). Errors have the file's names."""
        view = copy.copy(self)  # shares `read`, so that what is read through a view counts
        view._names = {**self._names, **names}
        return view

    def get(self, name: str) -> Any:
        """The raw value; None where it is absent or null."""
        name = self._names.get(name, name)
        self.read.add(name)
        return self.data.get(name)

    def refuse(self, name: str, *supported: Any) -> None:
        """Raises ValueError unless a field that nothing here implements is absent or has one of these values."""
        if (value := self.get(name)) is not None and value not in supported:
            raise self.error(name, f"is supported only as {' or '.join(map(repr, supported))}")

    def error(self, name: str, wanted: str) -> ValueError:
        """The error to raise for a field. wanted: "must be ..."."""
        name = self._names.get(name, name)
        value = self.data.get(name)
        state = "is missing; it " if value is None else f"is {value!r}; it "
        return ValueError(f"{self.file}: {self.prefix}{name} {state}{wanted}")

    def count(self, name: str, default: int | None = None) -> int:
        """An integer of at least 1, or the default."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "must be a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number over 0, or the default."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise self.error(name, "must be a positive number")
        return float(value)

    def number_or_null(self, name: str, default: float) -> float:
        """As number, for a field that is off, and 0, where it is null."""
        if self.get(name) is None and self._names.get(name, name) in self.data:
            return 0.0
        return self.number(name, default)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of so many finite numbers over 0."""
        value = self.get(name)
        good = isinstance(value, list) and len(value) == length
        if not good or any(type(v) not in (int, float) or not 0 < v < math.inf for v in value):
            raise self.error(name, f"must be a list of {length} positive numbers")
        return tuple(map(float, value))

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        value = self.get(name)
        if value is None:
            return default
        if value not in choices:
            raise self.error(name, f"must be one of {', '.join(choices)}")
        return value

    def section(self, name: str) -> "Fields":
        """A nested object; an empty one where it is absent. The same object each time."""
        if name not in self._sections:
            value = self.get(name)
            if value is not None and not isinstance(value, dict):
                raise self.error(name, "must be an object")
            self._sections[name] = Fields(self.file, value or {}, f"{self.prefix}{name}.")
        return self._sections[name]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError that names the file."""
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; --model must be a Hugging Face checkpoint directory") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(data).__name__}")
    return data
