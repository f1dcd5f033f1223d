"""What a quantized file holds: its activation quantizers, and its bytes by kind of tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from ...quant.runtime.packed_file import read_metadata
from ..bench.plots import group_ranks

HEADER = "header: names, shapes, configuration"
KINDS = {
    "layers.w_scale": "weight scales",
    "layers.w_zero_point": "weight zero points",
    "layers.bias": "biases",
    "layers.channel_scale": "scales of input channels",
    "activations.scale": "activation scales and zero points",
    "activations.zero_point": "activation scales and zero points",
    "activations.group": "groups of timesteps",
}


@dataclass(frozen=True)
class Quantizers:
    """L activation quantizers in the order of the network, S calibrated timesteps, ascending.

    rank (L, S): group in use, numbered by its scale from 0, the finest. bits (L, S): of its codes.
    low, high (L, S): the range that these reach; operands: which input of its layer, where there
    are several.
    """

    layers: list[str]
    operands: list[str]
    bits: np.ndarray
    timesteps: list[int]
    rank: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def labels(self) -> list[str]:
        pairs = zip(self.layers, self.operands, strict=True)
        return [f"{layer} ({operand})" if operand else layer for layer, operand in pairs]

    @property
    def groups(self) -> int:
        return int(self.rank.max()) + 1 if self.rank.size else 0


def read_quantizers(path: Path) -> Quantizers:
    """The activation quantizers of a quantized file that read_metadata accepts."""
    rank, timesteps, layers = group_ranks(path)
    metadata = read_metadata(path)
    with safe_open(path, framework="np") as handle:
        names = ("scale", "zero_point", "group")
        scale, zero, group = (handle.get_tensor(f"activations.{name}") for name in names)
    bits = np.ones(scale.shape, np.int64)  # (L, G), as wide as the widest
    given = [b for entry in metadata["layers"] for b in entry["inputs"]]
    for row, of_groups in zip(bits, given, strict=True):
        row[: len(of_groups) if isinstance(of_groups, list) else None] = of_groups
    operands = [o for entry in metadata["layers"] for o in _operands(entry)]
    rows = np.arange(len(bits))[:, None]
    scale, zero, bits = scale[rows, group], zero[rows, group], bits[rows, group]  # (L, S)
    top = 2.0**bits - 1
    low, high = -zero * scale, (top - zero) * scale
    return Quantizers(layers, operands, bits, timesteps, rank, low, high)


def _operands(entry: dict[str, Any]) -> list[str]:
    if entry["kind"] == "matmul":
        return ["left", "right"]
    if len(entry["inputs"]) == 2:
        return [f"first {entry['split']} channels", "other channels"]
    return [""] * len(entry["inputs"])


def bytes_by_kind(path: Path) -> dict[str, int]:
    """Bytes of the whole file, largest first."""
    bits = {entry["name"]: entry.get("bits") for entry in read_metadata(path)["layers"]}
    sizes: dict[str, int] = {}
    with safe_open(path, framework="np") as handle:
        for name in handle.keys():  # noqa: SIM118
            kind = _kind(name, bits)
            sizes[kind] = sizes.get(kind, 0) + handle.get_tensor(name).nbytes
    sizes[HEADER] = path.stat().st_size - sum(sizes.values())
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _kind(name: str, bits: dict[str, int | None]) -> str:
    if name.endswith(".qweight"):
        return f"weights of {bits.get(name.removesuffix('.qweight'))} bits"
    if name.startswith("float."):
        return "norms and other float32 parameters"
    if name.startswith("correction."):
        return "correction of the output"
    return KINDS.get(name, "other")
