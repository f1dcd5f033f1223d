"""Strict reading: YAML with the line of every key, and frozen dataclasses built from mappings.

    tree = read_yaml(text, "configs/x.yaml")
    settings = build(Settings, tree.values, tree.where)

Whatever is wrong becomes a ConfigError of one line that says where it was written.
"""

import dataclasses
import difflib
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

import yaml

from .errors import ConfigError

Key = tuple[str, ...]  # ("model", "params", "ch")
Where = Callable[[Key], str]  # where a key was written: "configs/x.yaml:12"

WHOLE, REAL = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
MAXIMAL_DEPTH = 20
MOST_VALUES = 100_000  # prompts among them; reading takes seconds then
LARGEST_WHOLE = 2**63
NOTHING: Mapping[str, Any] = types.MappingProxyType({})


def printable(text: object, limit: int = 80) -> str:
    """One line of printable characters."""
    text = str(text).encode(errors="backslashreplace").decode()  # bytes of a path, not UTF-8
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[:limit] + "..."


def whole_line(text: object, limit: int = 2000) -> str:
    """As printable, of a message whose end says what is wrong: too long a one loses its middle."""
    line = printable(text, sys.maxsize)
    half = limit // 2
    return line if len(line) <= limit else f"{line[:half]}...{line[-half:]}"


def suggestion(name: str, known: Sequence[str]) -> str:
    """ " (did you mean ...?)", the known names if there are few, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (known: {', '.join(known)})" if len(known) <= 10 else ""


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads decimal numbers alone, 1e-4 among them; no aliases."""

    values = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        self.values += 1
        if self.values > MOST_VALUES:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_VALUES} values", mark)
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
        return super().compose_node(parent, index)


def _read_numbers_as_decimal() -> None:
    """YAML 1.1 takes 010 for 8 and 1:30 for 90: both are text here, which no number accepts."""
    kept = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in (WHOLE, REAL)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _Loader.yaml_implicit_resolvers = kept
    for tag, pattern in (
        (WHOLE, r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)"),
        (REAL, r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"),
        (REAL, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ):
        _Loader.add_implicit_resolver(tag, re.compile(f"^({pattern})$"), list("-+.0123456789"))


_read_numbers_as_decimal()


@dataclass(frozen=True)
class Tree:
    """Nested mappings and where each of their keys was written."""

    source: str
    values: dict[str, Any]
    places: dict[Key, str]

    def where(self, key: Key) -> str:
        """The place of a key, or of the nearest one above it."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.source

    def value(self, key: Key) -> Any:
        """dataclasses.MISSING where the key is not there."""
        value: Any = self.values
        for name in key:
            value = value.get(name, MISSING) if isinstance(value, dict) else MISSING
        return value

    def drop(self, key: Key) -> None:
        """Forget a key, where it is there."""
        values: Any = self.values
        for name in key[:-1]:
            values = values.get(name) if isinstance(values, dict) else None
        if isinstance(values, dict):
            values.pop(key[-1], None)
            self.places.pop(key, None)

    def set(self, key: Key, value: Any, place: str) -> None:
        """Replace one value, creating the mappings above it."""
        values = self.values
        for depth, name in enumerate(key[:-1]):
            if values.get(name) is None:
                values[name] = {}
                self.places[key[: depth + 1]] = place
            values = values[name]
            if not isinstance(values, dict):
                raise ConfigError(f"{place}: {'.'.join(key[: depth + 1])} is not a section")
        values[key[-1]] = value
        for other in [k for k in self.places if k[: len(key)] == key]:
            del self.places[other]
        self.places[key] = place


def read_yaml(text: str, source: str) -> Tree:
    """A YAML mapping. Raises ConfigError for anything else, for keys twice and for aliases."""
    tree = Tree(source, {}, {})
    root = _compose(text, source)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{source}: not a mapping of keys to values")
    tree.values.update(_plain(root, tree, (), source))
    return tree


def read_value(text: str, place: str) -> Any:
    """One YAML value, as after `--set key=`."""
    node = _compose(text, place)
    return None if node is None else _plain(node, Tree(place, {}, {}), (), place)


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{line}: not YAML: {printable(error.problem)}") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = printable(error) if isinstance(error, yaml.YAMLError) else "nested too deeply"
        raise ConfigError(f"{source}: not YAML: {reason}") from error


def _plain(node: yaml.Node, tree: Tree, key: Key, source: str) -> Any:
    """The value of a node; keys of mappings are noted in the tree."""
    place = f"{source}:{node.start_mark.line + 1}"
    if len(key) > MAXIMAL_DEPTH:
        raise ConfigError(f"{place}: nested too deeply")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, tree, (*key, "[]"), source) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = f"{source}:{key_node.start_mark.line + 1}"
            name = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not isinstance(name, str):
                raise ConfigError(f"{line}: a key must be a name")
            if name in values:
                raise ConfigError(f"{line}: key {printable('.'.join((*key, name)))} is there twice")
            tree.places[(*key, name)] = line
            values[name] = _plain(value_node, tree, (*key, name), source)
        return values
    if node.tag not in SCALARS:
        raise ConfigError(f"{place}: values of type {printable(node.tag)} are not supported")
    try:
        value = _Loader("").construct_object(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{place}: cannot read the value {printable(node.value)}") from error
    if isinstance(value, int) and abs(value) >= LARGEST_WHOLE:
        raise ConfigError(f"{place}: {printable(node.value)} is too large a number")
    return value


# ---- dataclasses ----


def build(
    kind: type, mapping: Any, where: Where, key: Key = (), defaults: Mapping[str, Any] = NOTHING
) -> Any:
    """A dataclass of `kind`, nested ones included, from a mapping.

    Field types, metadata `choices` and `range` (inclusive) are checked. A key that is absent takes
    its value from `defaults` (field name -> value), else from the class. Raises ConfigError.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    check_names(mapping, list(fields), where, key)
    hints = typing.get_type_hints(kind)
    values = {}
    for name, field in fields.items():
        path = (*key, name)
        if name not in mapping:
            if name in defaults:
                values[name] = defaults[name]
            elif field.default is field.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{where(key)}: missing key {dotted(path)}")
            continue
        value, inner = mapping[name], without_none(hints[name])
        if dataclasses.is_dataclass(inner) and not (value is None and inner is not hints[name]):
            base = defaults.get(name)
            value = build(inner, value, where, path, NOTHING if base is None else vars(base))
        elif value is not None or not dataclasses.is_dataclass(inner):
            value = convert(value, hints[name], where, path, field.metadata)
        values[name] = value
    return kind(**values)


def check_arguments(function: Callable, mapping: Any, where: Where, key: Key, extra: Any) -> None:
    """Check a mapping against the annotated arguments of a class or function, or `extra` names."""
    target = function.__init__ if inspect.isclass(function) else function
    arguments = {n: p for n, p in inspect.signature(target).parameters.items() if n != "self"}
    hints = typing.get_type_hints(target)
    check_names(mapping, [*arguments, *extra], where, key)
    for name, argument in arguments.items():
        if name in mapping:
            convert(mapping[name], hints[name], where, (*key, name))
        elif argument.default is inspect.Parameter.empty:
            raise ConfigError(f"{where(key)}: missing key {dotted((*key, name))}")


def check_names(mapping: Any, known: Sequence[str], where: Where, key: Key) -> None:
    """Every key of the mapping is known. Raises ConfigError with the nearest known name."""
    if not isinstance(mapping, Mapping):
        what = dotted(key) or "the configuration"
        raise ConfigError(f"{where(key)}: {what} must be a section, is {_shown(mapping)}")
    for name in mapping:
        if name not in known:
            path = (*key, name)
            raise ConfigError(f"{where(path)}: unknown key {dotted(path)}{suggestion(name, known)}")


def convert(value: Any, hint: Any, where: Where, key: Key, metadata: Mapping = NOTHING) -> Any:
    """`value` as the type `hint`; whole numbers pass for floats, lists become tuples.

    metadata: choices and range of the value, or of each item of a list.
    """
    inner = without_none(hint)
    if value is None and inner is not hint:
        return None
    origin = typing.get_origin(inner) or inner
    if origin in (tuple, list, Sequence):
        return _sequence(value, inner, where, key, metadata)
    value = float(value) if inner is float and type(value) is int else value
    fits = isinstance(value, origin) and (inner is bool or not isinstance(value, bool))
    if not fits or (inner is float and not math.isfinite(value)):
        raise ConfigError(f"{where(key)}: {dotted(key)} must be {named(hint)}, is {_shown(value)}")
    choices, bounds = metadata.get("choices"), metadata.get("range")
    if choices is not None and value not in choices:
        hints = suggestion(value, list(choices))
        raise ConfigError(
            f"{where(key)}: {dotted(key)} is {_shown(value)}, which is unknown{hints}"
        )
    if bounds is not None and not bounds[0] <= value <= bounds[1]:
        limits = f"{bounds[0]}..{bounds[1]}"
        raise ConfigError(
            f"{where(key)}: {dotted(key)} must be within {limits}, is {_shown(value)}"
        )
    return value


def _sequence(value: Any, hint: Any, where: Where, key: Key, metadata: Mapping) -> tuple:
    item = typing.get_args(hint)[0]
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where(key)}: {dotted(key)} must be {named(hint)}, is {_shown(value)}")
    places = [(*key, f"[{i}]") for i in range(len(value))]
    return tuple(convert(v, item, where, k, metadata) for k, v in zip(places, value, strict=True))


def without_none(hint: Any) -> Any:
    """X of `X | None`, else the hint itself."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else hint
    return hint


def described(hint: Any, metadata: Mapping) -> str:
    """The values that a field accepts, in words."""
    if choices := metadata.get("choices"):
        return ", ".join(choices)
    if bounds := metadata.get("range"):
        return f"{named(hint)}, {bounds[0]:g} to {bounds[1]:g}"
    return named(hint)


def named(hint: Any) -> str:
    """A type in words: "a whole number", "text or null"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    inner = without_none(hint)
    if typing.get_origin(inner) in (tuple, list, Sequence):
        word = {int: "whole numbers", float: "numbers"}.get(typing.get_args(inner)[0], "values")
        word = f"a list of {word}"
    else:
        word = words.get(inner, "a section")
    return word if inner is hint else f"{word} or null"


def _shown(value: Any) -> str:
    return printable(repr(value) if isinstance(value, str) else yaml_line(value))


def yaml_line(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def dotted(key: Key) -> str:
    return printable(".".join(key).replace(".[", "["))
