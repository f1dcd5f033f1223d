"""Reads the configuration of an experiment from YAML, strictly.

    config = load_config("configs/cifar10.yaml", ["sampler.steps=50"])

Nothing else reads YAML. `quant` and `calibration` take their defaults from the method's preset.
Relative paths to checkpoints are looked up in the repository, then beside the configuration file,
then in the working directory; those given on the command line in the working directory first.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ...models.pipeline import DIFFUSERS
from ...quant.core.settings import METHODS, QUALITIES, QuantSettings, WeightSettings, preset
from ..common.errors import ConfigError
from ..common.files import read_text, regular
from ..common.paths import ROOT
from ..common.schema import Key, Tree, build, printable, read_value, read_yaml, suggestion
from . import device_defaults
from .config_sections import OF_DIFFUSERS, Config, check_config

__all__ = ["Config", "ConfigError", "Override", "load_config", "parse_config", "resolved_yaml"]

OF_THE_USER = "is a file of yours and would be replaced; give another --out"
# Keys of settings that did not earn their place -> the values that files of earlier versions may
# have: those that switched them off, and the default of what only calibration did.
REMOVED: dict[Key, tuple[Any, ...]] = {
    ("quant", "activation", "step_bits"): ([],),
    ("quant", "reconstruct", "mixed_inputs"): (False,),
    ("quant", "reconstruct", "progressive"): (False,),
    ("quant", "reconstruct", "run_share"): (0.0, 0.1),
}
# Keys that have a better name now.
RENAMED = {
    ("calibration", "bins"): ("calibration", "calibrated_timesteps"),
    ("quant", "edge_bits"): ("quant", "first_last_bits"),
    ("quant", "edge_activation_bits"): ("quant", "first_last_activation_bits"),
}
# The baselines have no such steps, whatever a file of tinyDM says.
END_TO_END = ("quant", "reconstruct", "finetune_iterations")


@dataclass(frozen=True)
class Override:
    """One key of the command line: `--set key=value`, or an option that stands for a key."""

    key: str
    text: str
    label: str

    @classmethod
    def parse(cls, pair: str) -> "Override":
        """key.sub=value. Raises ConfigError."""
        key, equals, text = pair.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {pair}: must be key.sub=value")
        return cls(key, text, f"--set {key}")


def load_config(
    path: str | Path, overrides: Sequence[str | Override] = (), memory: float | None = None
) -> Config:
    """Read a YAML file; overrides ("key.sub=value") replace keys, the last one wins.

    memory: GiB of the GPU that the run is for, None for a CPU (device_defaults.py). Raises
    ConfigError: one line with file and line, or with the option.
    """
    return parse_config(read_text(path), str(path), overrides, Path(path).parent, memory)


def parse_config(
    text: str,
    source: str,
    overrides: Sequence[str | Override] = (),
    folder: str | Path = ".",
    memory: float | None = None,
) -> Config:
    """Reads a configuration from YAML text, as load_config does from a file.

    source: name of the text in error messages; paths may be relative to `folder`. memory: see
    load_config.

    Where overrides name another method than the text, and one without end-to-end steps, the text's
    steps do not count.
    """
    tree = read_yaml(text, source)
    written, given = _method(tree), set()
    for override in overrides:
        override = Override.parse(override) if isinstance(override, str) else override
        key = tuple(override.key.split("."))
        tree.set(key, read_value(override.text, override.label), override.label)
        given.add(key)
    method = _checked_method(tree)
    has_steps = preset(method)[0].reconstruct.finetune_iterations > 0
    told = any(END_TO_END[: len(key)] == key for key in given)
    if method != written and not told and not has_steps:
        tree.drop(END_TO_END)  # what the file says is for methods with such steps
    _translate_old_keys(tree)
    quant, calibration = preset(method, _weight_bits(tree), _quality(tree))
    defaults = {"quant": quant, "calibration": calibration}
    device_defaults.resolve(tree, memory, quant)
    model = tree.values.get("model")
    if isinstance(model, dict) and model.get("arch") == DIFFUSERS:
        defaults["sampler"] = OF_DIFFUSERS
    config = build(Config, tree.values, tree.where, (), defaults)
    check_config(config, tree.where)
    return _with_paths(config, tree, Path(folder))


def resolved_yaml(config: Config) -> str:
    """All keys of a configuration; load_config reads it back to the same one."""
    values = _lists(dataclasses.asdict(config))
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)


def keep_written(path: Path, config: Config, source: str | Path | None, ours: bool) -> None:
    """Raises ConfigError where the resolved configuration would replace a file of the user's.

    source: the file that the configuration was read from; ours: a run has left other files beside
    `path`. What was resolved before is no loss: all of it is written again.
    """
    if not path.exists():
        return
    try:
        text = regular(path).read_text(encoding="utf-8")
        if text in (resolved_yaml(config), resolved_yaml(load_config(path))):
            return
    except (ConfigError, UnicodeDecodeError):
        pass  # not what was resolved
    read = source is not None and Path(source).exists() and path.samefile(source)
    if read or not ours:
        raise ConfigError(f"{path}: {OF_THE_USER}")


def repository_path(text: str) -> Path:
    """A path of a loaded configuration as one that can be opened."""
    path = ROOT / text
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def checkpoints_of(config: Config) -> list[Path]:
    """The files and folders of weights that a configuration names."""
    stage = config.model.first_stage
    names = [config.model.checkpoint, None if stage is None else stage.checkpoint]
    return [repository_path(name) for name in names if name is not None]


def _translate_old_keys(tree: Tree) -> None:
    """Takes the keys of earlier versions out of a file, since quantized files hold the
    configuration they were made with: removed ones at the values of REMOVED, and renamed ones.
    Raises ConfigError for others, and for those of the command line."""
    for key, forgotten in REMOVED.items():
        value = tree.value(key)
        if value is MISSING:
            continue
        where = tree.where(key)
        if value not in forgotten or where.startswith("--"):
            raise ConfigError(f"{where}: {'.'.join(key)} was removed (docs/ablations.md says why)")
        tree.drop(key)
    for key, new in RENAMED.items():
        value = tree.value(key)
        if value is MISSING:
            continue
        where = tree.where(key)
        if where.startswith("--") or tree.value(new) is not MISSING:
            raise ConfigError(f"{where}: {'.'.join(key)} is called {'.'.join(new)} now")
        tree.drop(key)
        tree.set(new, value, where)


def _method(tree: Tree) -> Any:
    section = tree.values.get("quant")
    return section.get("method", "tinydm") if isinstance(section, dict) else "tinydm"


def _checked_method(tree: Tree) -> str:
    """quant.method, known before the rest since it chooses the defaults."""
    method = _method(tree)
    if method not in METHODS:
        where, known = tree.where(("quant", "method")), suggestion(str(method), METHODS)
        shown = printable(repr(method))
        raise ConfigError(f"{where}: quant.method is {shown}, which is unknown{known}")
    return method


def _weight_bits(tree: Tree) -> int:
    """quant.weight.bits, which some presets depend on; its default where it is not valid."""
    bits = tree.value(("quant", "weight", "bits"))
    return bits if type(bits) is int else WeightSettings.bits


def _quality(tree: Tree) -> str:
    """quant.quality, likewise."""
    quality = tree.value(("quant", "quality"))
    return quality if quality in QUALITIES else QuantSettings.quality


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value


def _with_paths(config: Config, tree: Tree, folder: Path) -> Config:
    """Checkpoints as they are found: relative to the repository if they lie in it."""
    model = config.model
    found = _located(model.checkpoint, ("model", "checkpoint"), tree, folder)
    model = replace(model, checkpoint=found)
    if model.first_stage is not None:
        key = ("model", "first_stage", "checkpoint")
        path = _located(model.first_stage.checkpoint, key, tree, folder)
        model = replace(model, first_stage=replace(model.first_stage, checkpoint=path))
    return replace(config, model=model)


def _located(text: str | None, key: Key, tree: Tree, folder: Path) -> str | None:
    if not text:
        return None
    bases = [ROOT, folder, Path.cwd()]
    if tree.where(key).startswith("--"):  # written on the command line
        bases.insert(0, Path.cwd())
    for base in bases:
        try:
            path = (base / text).absolute()
            if path.exists():
                return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
        except (OSError, ValueError):  # too long a name, a zero byte: opening it will say so
            break
    return text
