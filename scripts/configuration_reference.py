"""Writes docs/configuration.md: every key of a configuration, from the dataclasses that read it.

python scripts/configuration_reference.py
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from tinydm.quant.core.settings import METHODS, preset
from tinydm.scripts.common.files import write_text
from tinydm.scripts.common.paths import ROOT
from tinydm.scripts.common.schema import described, without_none, yaml_line
from tinydm.scripts.experiment.cli import make_parser
from tinydm.scripts.experiment.config import Config
from tinydm.scripts.experiment.device_defaults import KEYS

PAGE = ROOT / "docs" / "configuration.md"
HEAD = """# Configuration

One YAML file per experiment, `configs/*.yaml`. `--set key.sub=value` overrides a key on the command
line; the last one wins. Keys that are not written take the default below, and those of `quant` and
`calibration` take it from the preset that `quant.method` names (see the last table). An unknown key
is refused. A run folder holds the resolved configuration, with every key.

How many rows go through a network at once depends on the device. These keys may be `auto`, which
they are where nothing is written:

{keys}

On a CPU that is the default below, or the value in the configuration's section `cpu`, which has the
form of the whole; on a GPU it follows from its memory ([gpu.md](gpu.md)).

This page is written by `python scripts/configuration_reference.py`.
"""


def rows(kind: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """(key, values, default, doc) of a dataclass and of those within it."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key, hint = f"{prefix}{field.name}", without_none(hints[field.name])
        if dataclasses.is_dataclass(hint):
            if hint is not hints[field.name]:
                yield f"{key}", "a section or null", "null", " ".join((hint.__doc__ or "").split())
            yield from rows(hint, f"{key}.")
            continue
        yield key, described(hints[field.name], field.metadata), default_of(field), doc_of(field)


def default_of(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
        return f"`{yaml_line(list(value) if isinstance(value, tuple) else value)}`"
    return "`{}`" if field.default_factory is not dataclasses.MISSING else "must be given"


def doc_of(field: dataclasses.Field) -> str:
    return str(field.metadata.get("doc", ""))


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    made = [head, tuple("---" for _ in head), *lines]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "or") for cell in row) + " |" for row in made
    )


def presets() -> str:
    """The keys in which the presets differ from tinyDM's."""
    flat = {method: flattened(preset(method)) for method in METHODS}
    keys = [k for k in flat["tinydm"] if len({str(v[k]) for v in flat.values()}) > 1]
    lines = [(f"`{k}`", *(f"`{yaml_line(flat[m][k])}`" for m in METHODS)) for k in keys]
    return table(("key", *METHODS), [line for line in lines if line[0] != "`quant.method`"])


def flattened(settings: tuple[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        for name, part in vars(value).items():
            if dataclasses.is_dataclass(part):
                walk(part, f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}"] = part

    walk(settings[0], "quant.")
    walk(settings[1], "calibration.")
    return found


def page() -> str:
    """The whole page, Markdown."""
    keys = ", ".join(f"`{'.'.join(key)}`" for key in KEYS)
    parts, hints = [HEAD.format(keys=keys)], typing.get_type_hints(Config)
    head = ("key", "values", "default", "what it does")
    for field in dataclasses.fields(Config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            lines = [(f"`{k}`", *rest) for k, *rest in rows(kind, f"{field.name}.")]
            parts.append(f"## {field.name}\n\n{table(head, lines)}\n")
        else:
            parts.append(f"`{field.name}`: the name of the experiment, in reports and tables.\n")
    parts.append(
        f"## Presets\n\n{presets()}\n\nPTQ4DM below 8-bit weights: "
        "`quant.weight.rounding` is `adaround`.\n"
    )
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    make_parser(__doc__).parse_args(argv)
    write_text(PAGE, page())
    print(PAGE)


if __name__ == "__main__":
    run(main, again="the same command begins anew", less=None)
