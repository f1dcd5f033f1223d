"""The Size column of the paper's tables, measured: full-size architectures, packed for real.

    python scripts/size_table.py --configs configs/imagenet256.yaml configs/lsun_bedroom.yaml

Needs no checkpoint. The denoiser is built without memory; layer by layer it gets random weights,
which are rounded to the nearest code and packed into the bytes that calibrate.py would write, with
all scales (one for every channel that may have one), groups, biases and norms. FP32 is 4 bytes per
parameter. MB is 2^20 bytes.

BOPs: sum over layers of MACs x weight bits x activation bits (attention products: both activation
bits), one network call for one image; classifier-free guidance doubles it. TBOPs is 10^12.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models.autoencoder import first_stage_from_upstream  # noqa: E402
from models.conditioning import TEXT_TOKENS, VIT_L_14, ClassEmbedder, CLIPTextTower  # noqa: E402
from models.pipeline import sampling_plan  # noqa: E402
from quant.calibration import bit_policy, calibrated_timesteps  # noqa: E402
from quant.context import TimestepContext  # noqa: E402
from quant.coverage import LayerRow, count_macs, layer_rows  # noqa: E402
from quant.equivalent import scaled_layers  # noqa: E402
from quant.methods import QuantSettings  # noqa: E402
from quant.model import (  # noqa: E402
    LAYER_TYPES,
    BitPolicy,
    GenericRoles,
    QuantDenoiser,
    activation_quantizers,
    quantize,
    replace_module,
    roles_of,
)
from quant.packed import to_bytes  # noqa: E402
from scripts.common.cli import make_parser, run  # noqa: E402
from scripts.common.config import Config, load_config, resolved_yaml  # noqa: E402
from scripts.common.files import write_json  # noqa: E402
from scripts.common.wiring import empty_denoiser  # noqa: E402

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


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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


def example_call(config: Config) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """x, t and conditioning of one image, on the meta device."""
    params = config.model.params
    side, channels = params.get("image_size", 32), params.get("in_channels", 3)
    given = {}
    with torch.device("meta"):
        if params.get("context_dim") is not None:
            texts = config.model.conditioning is not None and config.model.conditioning.prompts
            given["context"] = torch.zeros(1, TEXT_TOKENS if texts else 1, params["context_dim"])
        if params.get("num_classes") is not None:
            given["y"] = torch.zeros(1, dtype=torch.long)
        return torch.zeros(1, channels, side, side), torch.zeros(1, dtype=torch.long), given


def own_roles(name: str, roles: Any) -> GenericRoles:
    """What `roles` says about one layer, for a module that holds it alone as "layer"."""

    def alone(names: tuple[str, ...]) -> tuple[str, ...]:
        return ("layer",) if name in names else ()

    return GenericRoles(
        inputs=alone(roles.inputs),
        outputs=alone(roles.outputs),
        timestep_only=alone(roles.timestep_only),
        concat_split={"layer": roles.concat_split[name]} if name in roles.concat_split else {},
        matmuls={"layer": roles.matmuls[name]} if name in roles.matmuls else {},
    )


def with_random_weights(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """The layer in memory. Inputs of unit variance give outputs of unit variance."""
    layer = layer.to_empty(device="cpu")
    for name, value in layer.named_parameters():
        deviation = value[0].numel() ** -0.5 if name == "weight" else 0.01
        value.data.normal_(0.0, deviation, generator=generator)
    return layer


def deployed_alone(
    layer: nn.Module,
    name: str,
    roles: Any,
    policy: BitPolicy,
    context: TimestepContext,
    settings: QuantSettings,
) -> nn.Module:
    """One layer as integers, with as many ranges, and channel scales, as the settings allow."""
    holder = nn.Module()
    holder.layer = layer
    holder.place = nn.Parameter(
        torch.zeros(0)
    )  # a product of attention has no parameter, no device
    model = quantize(holder, context, policy, own_roles(name, roles))
    if settings.equivalent_scaling:
        for calibrated in scaled_layers(model).values():
            ones = torch.ones(calibrated.weight.shape[1])
            quantizer = calibrated.weight_quantizer
            calibrated.set_channel_scale(ones, calibrated.weight.detach(), quantizer)
    groups, bins = settings.activation.groups, len(context.timesteps)
    group_of_bin = torch.arange(bins) * min(groups, bins) // bins
    high = torch.linspace(1.0, 4.0, min(groups, bins))
    for _, quantizer in activation_quantizers(model):
        quantizer.set_ranges(-high, high, group_of_bin)
    return model.deploy().denoiser.layer


def random_deployed(config: Config, policy: BitPolicy, context: TimestepContext) -> QuantDenoiser:
    """The denoiser as calibrate.py ends with it; one layer at a time is in floating point."""
    model, generator = empty_denoiser(config), torch.Generator().manual_seed(0)
    roles = roles_of(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LAYER_TYPES) or name in roles.matmuls:
            layer = with_random_weights(layer, generator)
            layer = deployed_alone(layer, name, roles, policy, context, config.quant)
            replace_module(model, name, layer)
    for module in model.modules():  # norms and embeddings
        if any(p.is_meta for p in module.parameters(recurse=False)):
            with_random_weights(module, generator)
    return QuantDenoiser(model, context)


def deployed_of(config: Config, settings: QuantSettings) -> QuantDenoiser:
    """The same with the bits, groups and timesteps that `settings` and `config` ask for."""
    sampler, schedule = config.sampler, config.schedule
    steps, _ = sampling_plan(sampler.name, sampler.steps, sampler.skip, **vars(schedule))
    steps = calibrated_timesteps(steps, config.calibration.bins)
    context = TimestepContext(steps, schedule.train_timesteps)
    policy = replace(bit_policy(settings), weight_scale="minmax")  # random: nothing to search
    return random_deployed(config, policy, context)


def bops_of(rows: list[LayerRow]) -> int:
    """MACs times the bits of both operands; what is not quantized has 32."""
    total = 0
    for row in rows:
        inputs = row.activation_bits or (FLOAT_BITS,)
        if row.weights:
            total += row.macs * (row.weight_bits or FLOAT_BITS) * max(inputs)
        else:
            total += row.macs * inputs[0] * inputs[-1]
    return total


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
    parser.add_argument("--configs", nargs="+", metavar="FILE", default=list(DEFAULT))
    parser.add_argument("--bits", nargs="+", type=int, choices=range(2, 9), default=[8, 4])
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
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
    run(main)
