"""The Size column of the paper's tables, measured: full-size architectures, packed for real.

    python scripts/size_table.py --configs configs/imagenet256.yaml configs/lsun_bedroom.yaml

Needs no checkpoint. The denoiser is built without memory; layer by layer it gets random weights,
which are rounded to the nearest code and packed into the bytes that calibrate.py would write, with
all scales (one for every channel that may have one), groups, biases and norms. FP32 is 4 bytes per
parameter. MB is 2^20 bytes.

BOPs: sum over layers of MACs x weight bits x activation bits (attention products: both activation
bits), one network call for one image; classifier-free guidance doubles it. TBOPs is 10^12.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from tinydm.models.autoencoder import first_stage_from_upstream
from tinydm.models.conditioning import VIT_L_14, ClassEmbedder, CLIPTextTower
from tinydm.models.protocols import roles_of
from tinydm.quant.calibration.coverage import LayerRow, count_macs, layer_rows
from tinydm.quant.core.settings import QuantSettings
from tinydm.quant.runtime.packed_file import to_bytes
from tinydm.scripts.bench.random_models import deployed_of, example_call, parameters_of
from tinydm.scripts.common.files import write_json
from tinydm.scripts.common.paths import ROOT
from tinydm.scripts.experiment.assembly import empty_denoiser
from tinydm.scripts.experiment.cli import input_path, make_parser, output_file
from tinydm.scripts.experiment.config import Config, load_config, resolved_yaml

DEFAULT = tuple(ROOT / "configs" / f"{name}.yaml" for name in ("imagenet256", "lsun_bedroom"))
MB = 2**20
FLOAT_BITS = 32


@dataclass(frozen=True)
class Row:
    """One architecture at one bit width; sizes in bytes, macs and bops of one call."""

    name: str
    bits: str
    parameters: int
    bytes: int
    beside: int  # first stage and conditioning, float32
    macs: int
    bops: int

    def line(self) -> str:
        sizes = f"{self.bytes / MB:.2f} | {self.beside / MB:.2f}"
        return f"| {self.name} | {self.bits} | {sizes} | {self.bops / 1e12:.3f} |"


HEADER = "| denoiser | W/A | Size (MB) | beside it (MB) | TBOPs |\n| --- | --- | --- | --- | --- |"


def bytes_beside(config: Config) -> int:
    """Float32 bytes of what stays in full precision: first stage and conditioning."""
    model, count = config.model, 0
    with torch.device("meta"):
        if model.first_stage is not None:
            count += parameters_of(first_stage_from_upstream(vars(model.first_stage)))
        if model.conditioning is not None and model.conditioning.prompts is not None:
            count += parameters_of(CLIPTextTower({**VIT_L_14, **model.conditioning.text_params}))
        elif model.conditioning is not None:
            sizes = (model.conditioning.n_classes, model.conditioning.embed_dim)
            count += parameters_of(ClassEmbedder(*sizes))
    return 4 * count


def bops_of(rows: list[LayerRow]) -> int:
    """MACs times the bits of both operands; what is not quantized has 32."""
    total = 0.0
    for row in rows:
        inputs = row.activation_bits or (FLOAT_BITS,)
        if row.weights:
            total += row.macs * (row.weight_bits or FLOAT_BITS) * max(inputs)
        else:
            total += row.macs * inputs[0] * inputs[-1]
    return round(total)


def packed(
    config: Config, settings: QuantSettings, empty: nn.Module, macs: dict[str, int]
) -> tuple[int, int]:
    """Bytes of the quantized file and BOPs of one call. empty: full precision, on no device."""
    deployed = deployed_of(config, settings)
    rows = layer_rows(empty, deployed, roles_of(empty), macs)
    return len(to_bytes(deployed, {"config": resolved_yaml(config)})), bops_of(rows)


def rows_of(config: Config, bit_widths: list[int]) -> Iterator[Row]:
    """Full precision, then each of the weight widths."""
    empty, name = empty_denoiser(config), config.name
    macs = count_macs(empty, tuple(roles_of(empty).matmuls), example_call(config))
    parameters, beside, total = parameters_of(empty), bytes_beside(config), sum(macs.values())
    full = total * FLOAT_BITS**2
    yield Row(name, "32/32", parameters, 4 * parameters, beside, total, full)
    for bits in bit_widths:
        settings = replace(config.quant, weight=replace(config.quant.weight, bits=bits))
        label = f"{bits}/{settings.activation.bits}"
        size, bops = packed(config, settings, empty, macs)
        yield Row(name, label, parameters, size, beside, total, bops)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--configs",
        nargs="+",
        type=input_path,
        metavar="FILE",
        default=list(DEFAULT),
        help="YAML of experiments (imagenet256, lsun_bedroom)",
    )
    parser.add_argument(
        "--bits",
        nargs="+",
        type=int,
        choices=range(2, 9),
        default=[8, 4],
        metavar="N",
        help="of the weights, 2 to 8 (8 4)",
    )
    parser.add_argument(
        "--json", type=output_file(".json"), metavar="FILE", help="also write the rows there"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    configs = [load_config(path) for path in args.configs]
    print(HEADER, flush=True)
    rows = []
    for config in configs:
        for row in rows_of(config, args.bits):
            print(row.line(), flush=True)
            rows.append(row)
    if args.json is not None:
        write_json(args.json, [vars(row) for row in rows])


if __name__ == "__main__":
    run(main, again="the same command begins anew", less=None)
