"""JSON that others may have touched: read, and compared with the types that its readers rely on.

    report = read_json(run / "report.json", CalibrationReport)

The types are TypedDicts of reports.py. A file of another shape is one line that names the key.
"""

import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Union

from .errors import RunError
from .files import regular
from .schema import printable

LARGEST_NUMBER = 1e30  # whatever is drawn or multiplied with it stays finite
DEEPEST_NESTING = 12
LARGEST_FILE = 1 << 28  # bytes: a results.json with the errors of millions of images


class DamagedJsonError(ValueError):
    """A JSON file whose content has another type than expected; one line names the key."""


def read_json(path: Path, kind: Any) -> Any:
    """None if the file is not there. Raises RunError for one that is damaged."""
    try:
        return parse_json(path, kind)
    except FileNotFoundError:
        return None
    except DamagedJsonError as error:
        raise RunError(f"{path}: damaged ({error}); make it again or delete it") from error


def parse_json(path: Path, kind: Any) -> Any:
    """Raises DamagedJsonError, or OSError."""
    if regular(path).stat().st_size > LARGEST_FILE:
        raise DamagedJsonError(f"it is larger than {LARGEST_FILE >> 20} MiB")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        raise DamagedJsonError(f"no JSON: {printable(error, 200)}") from error
    check_type(value, kind)
    return value


def check_type(value: Any, kind: Any, where: str = "", depth: int = 0) -> None:
    """Raises DamagedJsonError unless `value` is of the type `kind`: a TypedDict, dict[str, X],
    list[X], X | None, float, int, str, bool or Any."""
    if depth > DEEPEST_NESTING:
        raise DamagedJsonError(f"{where[:60]} is nested too deeply")
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        parts: Any = value.items() if isinstance(value, dict) else ()
        parts = enumerate(value) if isinstance(value, list) else parts
        for name, part in parts:
            check_type(part, Any, _inside(where, name), depth + 1)
    elif origin in (Union, types.UnionType):
        if not (value is None and types.NoneType in inner):
            (only,) = [k for k in inner if k is not types.NoneType]
            check_type(value, only, where, depth)
    elif typing.is_typeddict(kind):
        _check_keys(value, kind, where, depth)
    elif origin is dict:
        for name, part in _of(value, dict, where, "an object").items():
            check_type(part, inner[1], _inside(where, name), depth + 1)
    elif origin is list:
        for i, part in enumerate(_of(value, list, where, "a list")):
            check_type(part, inner[0], f"{where}[{i}]", depth + 1)
    elif kind is float:
        number = _of(value, (int, float), where, "a number")
        if not abs(number) <= LARGEST_NUMBER:
            _refuse(value, where, f"within {-LARGEST_NUMBER:g}..{LARGEST_NUMBER:g}")
    else:
        _of(value, kind, where, {int: "a whole number", str: "text"}.get(kind, kind.__name__))


def _check_keys(value: Any, kind: Any, where: str, depth: int) -> None:
    given: Mapping[str, Any] = _of(value, dict, where, "an object")
    hints = typing.get_type_hints(kind)
    for name in hints:
        if name in kind.__required_keys__ and name not in given:
            raise DamagedJsonError(f"{_inside(where, name)} is missing")
    for name, part in given.items():
        check_type(part, hints.get(name, Any), _inside(where, name), depth + 1)


def _of(value: Any, kinds: Any, where: str, wanted: str) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        _refuse(value, where, wanted)
    return value


def _refuse(value: Any, where: str, wanted: str) -> NoReturn:
    shown = {dict: "an object", list: "a list"}.get(type(value)) or printable(json.dumps(value), 40)
    raise DamagedJsonError(f"{where or 'the whole'} is {shown}, not {wanted}")


def _inside(where: str, name: Any) -> str:
    name = printable(name, 40)
    return f"{where}.{name}" if where else name


def _refuse_constant(name: str) -> NoReturn:
    raise DamagedJsonError(f"{name} is not a number")
