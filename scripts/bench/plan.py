"""What is to be measured: cells of method, bit width, steps and seed, each one configuration.

    Plan("configs/emoji32.yaml", overrides).config(Cell("benchmark", "tinydm", (4, 8), 50, 0))

Overrides of the user come first, then the cell's coordinates, then those of an ablation's variant.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...quant.core.settings import METHODS as QUANTIZED
from ..common.errors import ConfigError
from ..common.schema import suggestion
from ..experiment.config import Config, Override, load_config
from .ablations import PARTS, Variant
from .studies import STUDIES

# Kinds of tables; further ones are those of STUDIES.
BENCHMARK, ABLATION = "benchmark", "ablation"
NAMES = {
    "fp": "FP",
    "minmax": "MinMax",
    "ptq4dm": "PTQ4DM",
    "tfmq": "TFMQ-DM",
    "apqdm": "APQ-DM",
    "qdiffusion": "Q-Diffusion",
    "ptqd": "PTQD",
    "e2e_plain": "E2E, no correction",
    "e2e": "E2E",
    "tinydm": "TinyDM",
}  # in the order of the table
METHODS = ("fp", *QUANTIZED)
# Methods that differ from another one in the correction of the output alone -> that one.
BASES = {"ptqd": "qdiffusion", "e2e": "e2e_plain"}
LARGEST_SEED = 2**63 - 1
MOST_DIGITS = 100  # leading zeros among them; Python reads no more than 4300
OF = " of "  # in the table's name of a study


@dataclass(frozen=True)
class Cell:
    """table: BENCHMARK, a part of the ablations or "study of method"; label: the method or the
    variant."""

    table: str
    label: str
    bits: tuple[int, int]  # weights, activations
    steps: int
    seed: int  # of the calibration
    overrides: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Kind of its table: BENCHMARK, ABLATION or a study."""
        if self.table == BENCHMARK:
            return BENCHMARK
        study, of, _ = self.table.partition(OF)
        return study if of else ABLATION

    @property
    def method(self) -> str:
        if self.table == BENCHMARK:
            return self.label
        return self.table.partition(OF)[2] or "tinydm"

    @property
    def base(self) -> "Cell | None":
        """The cell that this one differs from in the correction of the output alone, if any."""
        other = BASES.get(self.method)
        if other is None or self.kind == ABLATION:
            return None
        if self.kind == BENCHMARK:
            return replace(self, label=other)
        return replace(self, table=f"{self.kind}{OF}{other}")

    @property
    def key(self) -> tuple[Any, ...]:
        """The values that tell cells of the tables apart."""
        return (self.table, self.label, self.bits, self.steps, self.seed)

    @property
    def name(self) -> str:
        """The name of the cell's folder. Variants of an ablation that are alike share one."""
        return f"{self.steps}-w{self.bits[0]}a{self.bits[1]}-{self.method}-s{self.seed}"

    @property
    def title(self) -> str:
        """A line that says which cell this is, for the progress output."""
        what = self.label if self.kind == BENCHMARK else f"{self.table}: {self.label}"
        return f"{self.steps} steps, w{self.bits[0]}a{self.bits[1]}, seed {self.seed}, {what}"

    def to_plain(self) -> dict[str, Any]:
        return vars(self) | {"bits": list(self.bits), "overrides": list(self.overrides)}

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> "Cell":
        lists = {name: tuple(value[name]) for name in ("bits", "overrides")}
        return cls(**(value | lists))


@dataclass(frozen=True)
class Sampler:
    name: str  # as in sampler.name
    steps: int

    @property
    def label(self) -> str:
        return f"{self.name}-{self.steps}"


class Plan:
    """Configurations of the cells. Raises ConfigError for those that cannot be."""

    def __init__(self, path: str, overrides: Sequence[str | Override], memory: float | None = None):
        """memory: GiB of a GPU, see device_defaults.py."""
        self.path, self.overrides, self.memory = path, list(overrides), memory
        self.base = load_config(path, self.overrides, memory)

    @property
    def noise(self) -> int:
        """Seed of the images' noise, where no other one is asked for."""
        return self.base.sampling.seed

    def config(
        self, cell: Cell, sampler: Sampler | None = None, noise: int | None = None
    ) -> Config:
        """The configuration of a cell. sampler, noise (a seed): of its images, if not its own."""
        coordinates = [
            f"quant.method={cell.method}",
            f"quant.weight.bits={cell.bits[0]}",
            f"quant.activation.bits={cell.bits[1]}",
            f"calibration.seed={cell.seed}",
        ]
        sampler = sampler or self.sampler(cell.steps)
        return load_config(
            self.path,
            [*self.overrides, *coordinates, *_sampler_keys(sampler, noise), *cell.overrides],
            self.memory,
        )

    def full_config(self, sampler: Sampler, noise: int | None = None) -> Config:
        overrides = [*self.overrides, *_sampler_keys(sampler, noise)]
        return load_config(self.path, overrides, self.memory)

    def sampler(self, steps: int) -> Sampler:
        """The configuration's own, with so many steps."""
        return Sampler(self.base.sampler.name, steps)

    def transfers(self, text: str, steps: int) -> list[Sampler]:
        """ "20,ddpm,ddpm:250" -> samplers; a name alone takes the calibrated number of steps."""
        samplers = []
        for item in _items(text):
            name, _, count = item.partition(":")
            if name.isdecimal():
                name, count = self.base.sampler.name, name
            samplers.append(Sampler(name, _number("--transfer", count) if count else steps))
        return [s for s in dict.fromkeys(samplers) if s != self.sampler(steps)]


def _sampler_keys(sampler: Sampler, noise: int | None) -> list[str]:
    keys = [f"sampler.name={sampler.name}", f"sampler.steps={sampler.steps}"]
    return keys if noise is None else [*keys, f"sampling.seed={noise}"]


def benchmark_cells(
    methods: Sequence[str], bits: Sequence[tuple[int, int]], steps: Sequence[int], seeds: list[int]
) -> Iterator[Cell]:
    """All but full precision, which is no cell; those in BASES after what they differ from."""
    in_order = sorted(methods, key=lambda method: method in BASES)
    for count in steps:
        for width in bits:
            for method in in_order:
                if method != "fp":
                    yield from (Cell(BENCHMARK, method, width, count, seed) for seed in seeds)


def ablation_cells(
    parts: Sequence[str], bits: Sequence[tuple[int, int]], steps: Sequence[int], seeds: list[int]
) -> Iterator[Cell]:
    """The preset itself first, then every variant of the parts."""
    variants = [("preset", Variant("as it is", ()))]
    variants += [(part, variant) for part in parts for variant in PARTS[part]]
    for count in steps:
        for width in bits:
            for part, variant in variants:
                if width[1] > variant.widest:
                    continue
                for seed in seeds:
                    yield Cell(part, variant.label, width, count, seed, variant.overrides)


def study_cells(
    study: str,
    methods: Sequence[str],
    bits: Sequence[tuple[int, int]],
    steps: Sequence[int],
    seeds: list[int],
) -> Iterator[Cell]:
    """Every variant of a study of these methods."""
    for count in steps:
        for width in bits:
            for method in sorted(methods, key=lambda method: method in BASES):
                for variant in STUDIES[study][method]:
                    name, table = variant.label, f"{study}{OF}{method}"
                    for seed in seeds:
                        yield Cell(table, name, width, count, seed, variant.overrides)


def variants_of(cell: Cell) -> tuple[Variant, ...]:
    """All that stand beside the cell's own in its part of the ablations or its study."""
    if cell.kind in STUDIES:
        return STUDIES[cell.kind].get(cell.method, ())
    return tuple(v for v in PARTS.get(cell.table, ()) if cell.bits[1] <= v.widest)


def is_current(cell: Cell) -> bool:
    """False for a variant that the list of ablations or the study does not have any more."""
    if cell.table == BENCHMARK:
        return cell.label in METHODS
    if cell.table == "preset":
        return not cell.overrides
    variants = variants_of(cell)
    return (cell.label, cell.overrides) in {(v.label, v.overrides) for v in variants}


# ---- the command line's lists ----


def _items(text: str) -> list[str]:
    return list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def _number(option: str, text: str, lowest: int = 1, highest: int = LARGEST_SEED) -> int:
    digits = text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS
    if not (digits and lowest <= int(text) <= highest):
        to = "" if highest == LARGEST_SEED else f" to {highest}"
        raise ConfigError(f"{option} {text}: must be whole numbers from {lowest}{to}")
    return int(text)


def _list(option: str, text: str, read: Callable[[str], Any]) -> list[Any]:
    values = [read(item) for item in _items(text)]
    if not values:
        raise ConfigError(f"{option}: names nothing")
    return values


def read_numbers(option: str, text: str, lowest: int = 1, highest: int = LARGEST_SEED) -> list[int]:
    return _list(option, text, lambda item: _number(option, item, lowest, highest))


def read_names(option: str, text: str, known: Sequence[str]) -> list[str]:
    def read(item: str) -> str:
        if item not in known:
            raise ConfigError(f"{option} {item}: is unknown{suggestion(item, known)}")
        return item

    return _list(option, text, read)


def read_bits(text: str) -> list[tuple[int, int]]:
    """ "w8a8,w4a8" -> [(8, 8), (4, 8)]."""

    def read(item: str) -> tuple[int, int]:
        match = re.fullmatch(r"w([2-8])a([2-8])", item.lower())
        if match is None:
            raise ConfigError(f"--bits {item}: must look like w4a8, each of 2..8 bits")
        return int(match[1]), int(match[2])

    return _list("--bits", text, read)
