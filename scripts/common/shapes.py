"""JSON that others may have touched: read, and compared with the shape that its readers rely on.

    report = read_json(run / "report.json", Keys({"seconds": NUMBER}, {"versions": Map(TEXT)}))

A file of another shape is a RunError of one line that names the key.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from scripts.common.runs import RunError
from scripts.common.strict import printable

Plain = dict[str, Any]
LARGEST = 1e30  # of a number; whatever is drawn or multiplied with it stays a number
DEEPEST = 8


class ShapeError(ValueError):
    """Where a value has another shape, and which; one line."""


class Shape(Protocol):
    def check(self, value: Any, where: str) -> None:
        """Raises ShapeError. where: the keys that lead to the value."""


def _refuse(value: Any, where: str, wanted: str) -> NoReturn:
    kinds = {dict: "an object", list: "a list"}
    shown = kinds.get(type(value)) or printable(json.dumps(value), 40)
    raise ShapeError(f"{where or 'the whole'} is {shown}, not {wanted}")


@dataclass(frozen=True)
class Number:
    low: float = -LARGEST
    high: float = LARGEST
    whole: bool = False
    none: bool = False  # null will do

    def check(self, value: Any, where: str) -> None:
        if value is None and self.none:
            return
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            _refuse(value, where, "a whole number" if self.whole else "a number")
        if not self.low <= value <= self.high:
            _refuse(value, where, f"within {self.low:g}..{self.high:g}")


@dataclass(frozen=True)
class Text:
    none: bool = False
    choices: tuple[str, ...] = ()

    def check(self, value: Any, where: str) -> None:
        if value is None and self.none:
            return
        if not isinstance(value, str):
            _refuse(value, where, "text")
        if self.choices and value not in self.choices:
            _refuse(value, where, f"one of {', '.join(self.choices)}")


@dataclass(frozen=True)
class List:
    of: Shape
    length: int | None = None
    none: bool = False

    def check(self, value: Any, where: str) -> None:
        if value is None and self.none:
            return
        if not isinstance(value, list):
            _refuse(value, where, "a list")
        if self.length is not None and len(value) != self.length:
            raise ShapeError(f"{where} has {len(value)} values, not {self.length}")
        for i, part in enumerate(value):
            self.of.check(part, f"{where}[{i}]")


@dataclass(frozen=True)
class Map:
    """Any names."""

    of: Shape

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, where, "an object")
        for name, part in value.items():
            self.of.check(part, _inside(where, name))


class Anything:
    """Shown at most, never computed with: not too deep to be shown."""

    def check(self, value: Any, where: str, depth: int = 0) -> None:
        if depth > DEEPEST:
            raise ShapeError(f"{where[:60]} is nested too deeply")
        if isinstance(value, dict | list):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            for name, part in parts:
                self.check(part, _inside(where, str(name)), depth + 1)


class Nothing:
    """What must not be there."""

    def check(self, value: Any, where: str) -> None:
        raise ShapeError(f"{where} is unknown")


ANYTHING, NOTHING = Anything(), Nothing()


@dataclass(frozen=True)
class Keys:
    """Names that must be there, names that may, and the shape of all others."""

    required: Mapping[str, Shape] = field(default_factory=dict)
    optional: Mapping[str, Shape] = field(default_factory=dict)
    none: bool = False
    rest: Shape = ANYTHING

    def check(self, value: Any, where: str) -> None:
        if value is None and self.none:
            return
        if not isinstance(value, dict):
            _refuse(value, where, "an object")
        for name in self.required:
            if name not in value:
                raise ShapeError(f"{_inside(where, name)} is missing")
        shapes = {**self.optional, **self.required}
        for name, part in value.items():
            shapes.get(name, self.rest).check(part, _inside(where, name))


@dataclass(frozen=True)
class Cell:
    """Text or a number, as in a table."""

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, str):
            NUMBER.check(value, where)


def _inside(where: str, name: str) -> str:
    name = printable(name, 40)
    return f"{where}.{name}" if where else name


NUMBER, POSITIVE, COUNT = Number(), Number(low=0), Number(low=0, high=2**53, whole=True)
WHOLE, TEXT = Number(whole=True), Text()


def parse_json(path: Path, shape: Shape) -> Any:
    """Raises ShapeError, or OSError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        raise ShapeError(f"no JSON: {printable(error, 200)}") from error
    shape.check(value, "")
    return value


def _no_number(name: str) -> NoReturn:
    raise ShapeError(f"{name} is not a number")


def fits(value: Any, shape: Shape) -> bool:
    try:
        shape.check(value, "")
    except ShapeError:
        return False
    return True


def read_json(path: Path, shape: Shape) -> Any:
    """None if the file is not there. Raises RunError for one that is damaged."""
    try:
        return parse_json(path, shape)
    except FileNotFoundError:
        return None
    except ShapeError as error:
        raise RunError(f"{path}: damaged ({error}); make it again or delete it") from error
