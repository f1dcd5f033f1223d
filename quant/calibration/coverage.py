"""Which layers are quantized, at how many bits, and what share of weights and MACs they are."""

from dataclasses import dataclass

import torch
from torch import nn

from ...models.roles import LayerRoles
from ..core.operation import LAYER_TYPES
from ..runtime.denoiser import QuantDenoiser
from ..runtime.layers import QuantLayer, QuantMatMul, TimestepLayer


@dataclass(frozen=True)
class LayerRow:
    """One layer: weights (count), macs of one sample, bits; None bits: not quantized.

    activation_bits: of each operand, in the mean of the calibrated timesteps.
    """

    name: str
    kind: str
    weights: int
    macs: int
    weight_bits: int | None
    activation_bits: tuple[float, ...]
    note: str = ""


@torch.no_grad()
def count_macs(
    denoiser: nn.Module, matmuls: tuple[str, ...], call: tuple[torch.Tensor, torch.Tensor, dict]
) -> dict[str, int]:
    """Multiply-accumulates per layer for one sample; call: x (1, C, H, W), t (1,), conditioning."""
    macs: dict[str, int] = {}

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            if isinstance(module, LAYER_TYPES):
                macs[name] = out.numel() * module.weight[0].numel()
            else:
                macs[name] = out.numel() * args[0].shape[-1]

        return hook

    handles = [
        module.register_forward_hook(hook_of(name))
        for name, module in denoiser.named_modules()
        if isinstance(module, LAYER_TYPES) or name in matmuls
    ]
    try:
        x, t, conditioning = call
        denoiser(x, t, **conditioning)
    finally:
        for handle in handles:
            handle.remove()
    return macs


def layer_rows(
    denoiser: nn.Module, deployed: QuantDenoiser, roles: LayerRoles, macs: dict[str, int]
) -> list[LayerRow]:
    """The rows of the table, in the order of the modules. denoiser: the full-precision one."""
    quantized = dict(deployed.denoiser.named_modules())
    rows = []
    for name, module in denoiser.named_modules():
        if not (isinstance(module, LAYER_TYPES) or name in roles.matmuls):
            continue
        replaced = quantized[name]
        note = ""
        if isinstance(replaced, TimestepLayer):
            replaced, note = replaced.layer, "once per timestep, kept"
        weights = module.weight.numel() if isinstance(module, LAYER_TYPES) else 0
        bits: int | None = None
        inputs: tuple[float, ...] = ()
        if isinstance(replaced, QuantLayer):
            bits, inputs = replaced.bits, tuple(q.mean_bits for q in replaced.inputs)
            if replaced.split:
                note = f"input split at channel {replaced.split}"
        elif isinstance(replaced, QuantMatMul):
            inputs = (replaced.left.mean_bits, replaced.right.mean_bits)
        kind = type(module).__name__
        rows.append(LayerRow(name, kind, weights, macs.get(name, 0), bits, inputs, note))
    return rows


def shares(rows: list[LayerRow]) -> dict[str, float]:
    """Shares (0..1): weights with integer codes; MACs whose operands are all integers; MACs of
    layers kept per timestep, which sampling does once per timestep and not per image."""
    weights = sum(r.weights for r in rows) or 1
    macs = sum(r.macs for r in rows) or 1
    integer = sum(
        r.macs for r in rows if r.activation_bits and (r.weight_bits is not None or not r.weights)
    )
    kept = sum(r.macs for r in rows if not r.activation_bits and r.weight_bits is not None)
    return {
        "weights_quantized": sum(r.weights for r in rows if r.weight_bits is not None) / weights,
        "macs_quantized": integer / macs,
        "macs_once_per_timestep": kept / macs,
    }


def format_table(rows: list[LayerRow]) -> str:
    """Plain text, one line a layer."""
    width = max(len(r.name) for r in rows)
    lines = [f"{'layer':{width}}  {'kind':7} {'weights':>9} {'MMACs':>8}  W  A      note"]
    for r in rows:
        weight_bits = "-" if r.weight_bits is None else str(r.weight_bits)
        if r.weight_bits is None and r.weights:
            weight_bits = "32"
        inputs = "+".join(f"{bits:.3g}" for bits in r.activation_bits) or "32"
        lines.append(
            f"{r.name:{width}}  {r.kind:7} {r.weights:>9,} {r.macs / 1e6:>8.2f}  "
            f"{weight_bits:2} {inputs:5}  {r.note}".rstrip()
        )
    return "\n".join(lines)
