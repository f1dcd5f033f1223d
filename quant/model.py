"""Wraps a denoiser: finds its layers by type, replaces them, and passes the timestep on.

`roles` is what the architecture declares about itself (models.ddim_unet.LayerRoles or anything
with the same attributes); without it every layer is treated alike.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quant.context import TimestepContext
from quant.layers import CalibLayer, QuantLayer, QuantMatMul, TimestepLayer
from quant.log2 import LearnedLog2Quantizer
from quant.quantizer import ActivationQuantizer, LearnedQuantizer
from quant.weights import WeightQuantizer

LAYER_TYPES = (nn.Conv2d, nn.Conv1d, nn.Linear)


@dataclass(frozen=True)
class BitPolicy:
    """Bits of each kind of layer. None leaves that operand in floating point.

    edge: weights of the first and last layer, which see the image; edge_activation: their inputs
    (16 bits are two 8-bit products, on less than one percent of the MACs); time: layers of the
    timestep alone, whose activations are never quantized when `cache_timestep` is true; softmax:
    attention probabilities; symmetric: activation ranges around zero (queries, keys and values
    always have them, probabilities never).
    """

    weight: int = 4
    activation: int | None = 8
    edge: int = 8
    edge_activation: int = 16
    time: int = 8
    softmax: int = 8
    split_skip: bool = True
    quantize_matmuls: bool = True
    cache_timestep: bool = True
    symmetric: bool = False
    softmax_codes: str = "uniform"  # row or log2, see methods.ActivationSettings
    weight_scale: str = "mse"


@dataclass(frozen=True)
class GenericRoles:
    """The roles of a module that declares none."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    timestep_only: tuple[str, ...] = ()
    concat_split: dict[str, int] = field(default_factory=dict)
    matmuls: dict[str, str] = field(default_factory=dict)
    units: tuple[str, ...] = ()


def roles_of(denoiser: nn.Module) -> Any:
    return denoiser.layer_roles() if hasattr(denoiser, "layer_roles") else GenericRoles()


class QuantDenoiser(nn.Module):
    """Called like the denoiser it wraps: eps = model(x, t, ...). Holds the one TimestepContext.

    independent_rows: a row of eps is the same to the bit in any batch, see
    compiled_layers.rows_are_independent.
    """

    def __init__(self, denoiser: nn.Module, context: TimestepContext):
        super().__init__()
        self.denoiser, self.context = denoiser, context
        self.correction: nn.Module | None = None
        self.independent_rows = False

    def forward(self, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.context.set(t)
        if self.independent_rows and self.context.t is not None:
            t = t[:1]  # its embedding, too, must not depend on the batch
        eps = self.denoiser(x, t, *args, **kwargs)
        return eps if self.correction is None else self.correction(eps)

    def noise_scale(self, t: int, sigma: float, direction: float) -> float:
        """What is left of a sampler's noise sigma at t, where eps enters the step with the factor
        `direction`: all of it without a correction, see correction.py."""
        if self.correction is None:
            return sigma
        return self.correction.noise_scale(t, sigma, direction)

    def deploy(self) -> "QuantDenoiser":
        """A copy whose layers are integers. The layers under calibration are left as they are."""
        clone = copy.deepcopy(self)
        for name, module in list(clone.denoiser.named_modules()):
            if isinstance(module, (CalibLayer, QuantMatMul, TimestepLayer)):
                if not _inside(name, clone.denoiser, TimestepLayer):
                    replace_module(clone.denoiser, name, module.deploy())
        return clone.eval().requires_grad_(False)


def count_layers(denoiser: nn.Module) -> int:
    return sum(isinstance(m, LAYER_TYPES) for m in denoiser.modules())


def quantize(
    denoiser: nn.Module,
    context: TimestepContext,
    policy: BitPolicy,
    roles: Any = None,
    on_layer: Callable[[str], None] = lambda name: None,
) -> QuantDenoiser:
    """A copy of the denoiser under calibration; the original is not touched.

    Ranges are not set: see grouping.assign. on_layer(name) follows each of count_layers(denoiser)
    searches of weight scales. Raises ValueError for unsupported layers, naming
    them.
    """
    roles = roles_of(denoiser) if roles is None else roles
    clone = copy.deepcopy(denoiser)
    edge = set(roles.inputs) | set(roles.outputs)
    for name, layer in list(clone.named_modules()):
        if isinstance(layer, LAYER_TYPES):
            cached = policy.cache_timestep and name in roles.timestep_only
            bits = policy.edge if name in edge else policy.weight
            act_bits = policy.activation
            if act_bits is not None and name in edge:
                act_bits = max(act_bits, policy.edge_activation)
            if cached:
                bits, act_bits = policy.time, None
            split = roles.concat_split.get(name, 0) if policy.split_skip else 0
            inputs = []
            if act_bits is not None:
                count = 2 if split else 1
                inputs = [
                    LearnedQuantizer(context, act_bits, policy.symmetric, False)
                    for _ in range(count)
                ]
            try:
                weight = WeightQuantizer(layer.weight, bits, policy.weight_scale)
                replacement: nn.Module = CalibLayer(layer, weight, inputs, split)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error
            if cached:
                replacement = TimestepLayer(context, replacement)
            replace_module(clone, name, replacement)
            on_layer(name)
        elif name in roles.matmuls and policy.quantize_matmuls and policy.activation is not None:
            bits = policy.activation
            probabilities = roles.matmuls[name] == "values"
            codes = policy.softmax_codes if probabilities else "uniform"
            left = (LearnedLog2Quantizer if codes == "log2" else LearnedQuantizer)(
                context,
                policy.softmax if probabilities else bits,
                symmetric=not probabilities,
                unsigned=probabilities,
            )
            right = LearnedQuantizer(context, bits, symmetric=True, unsigned=False)
            replace_module(clone, name, QuantMatMul(left, right, by_row=codes == "row"))
    model = QuantDenoiser(clone, context)
    first = next(denoiser.parameters(), None)
    return model if first is None else model.to(first.device)  # the new quantizers as well


def activation_quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, quantizer) of every activation quantizer, in the order of registration."""
    for name, module in model.named_modules():
        if isinstance(module, (LearnedQuantizer, ActivationQuantizer)):
            yield name, module


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every CalibLayer or QuantLayer."""
    for name, module in model.named_modules():
        if isinstance(module, (CalibLayer, QuantLayer)):
            yield name, module


def _inside(name: str, root: nn.Module, kind: type) -> bool:
    """True if an ancestor of the named module is of this kind."""
    parts = name.split(".")
    return any(
        isinstance(root.get_submodule(".".join(parts[:i])), kind) for i in range(1, len(parts))
    )


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, child, module)
