"""Puts a denoiser under calibration: finds its layers by type and replaces them."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...models.protocols import roles_of
from ...models.roles import LayerRoles
from ..core.context import TimestepContext
from ..core.operation import LAYER_TYPES
from ..core.settings import QuantSettings
from ..runtime.denoiser import QuantDenoiser, replace_module
from .layers import CalibLayer, CalibMatMul, CalibTimestepLayer
from .quantizer import LearnedQuantizer
from .weights import WeightQuantizer


@dataclass(frozen=True)
class BitPolicy:
    """Bits of each kind of layer; `of` makes it from the settings.

    activation: None leaves all activations in floating point; first_last: weights of the first and
    last layers; first_last_activation: their inputs (16 bits are two 8-bit products, on less than
    one percent of the multiply-accumulates); time: layers of the timestep alone, whose activations
    are never quantized when `cache_timestep` is true; softmax: attention probabilities; symmetric:
    activation ranges around zero (queries, keys and values always have them, probabilities never).
    """

    weight: int = 4
    activation: int | None = 8
    first_last: int = 8
    first_last_activation: int = 16
    time: int = 8
    softmax: int = 8
    split_skip: bool = True
    quantize_matmuls: bool = True
    cache_timestep: bool = True
    symmetric: bool = False
    softmax_by_row: bool = False  # see quant.runtime.layers.QuantMatMul
    weight_scale: str = "mse"

    @classmethod
    def of(cls, settings: QuantSettings) -> "BitPolicy":
        """What the settings say of each kind of layer. No kind gets fewer bits than the others."""
        weight, activation = settings.weight, settings.activation
        return cls(
            weight=weight.bits,
            activation=activation.bits,
            first_last=max(settings.first_last_bits, weight.bits),
            first_last_activation=settings.first_last_activation_bits,
            time=max(settings.time_bits, weight.bits),
            softmax=max(activation.softmax_bits, activation.bits),
            split_skip=settings.split_skip,
            quantize_matmuls=settings.quantize_matmuls,
            cache_timestep=settings.time_embedding == "cached",
            symmetric=activation.symmetric,
            softmax_by_row=activation.softmax == "row",
            weight_scale=weight.scale,
        )


def count_layers(denoiser: nn.Module) -> int:
    """Number of layers that would be quantized, products of attention apart."""
    return sum(isinstance(m, LAYER_TYPES) for m in denoiser.modules())


def quantize(
    denoiser: nn.Module,
    context: TimestepContext,
    policy: BitPolicy,
    roles: LayerRoles | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
) -> QuantDenoiser:
    """A copy of the denoiser under calibration; the original is not touched.

    Ranges are not set: see grouping.assign. on_layer(name) follows each of count_layers(denoiser)
    searches of weight scales. Raises ValueError for unsupported layers, naming them.
    """
    roles = roles_of(denoiser) if roles is None else roles
    clone = copy.deepcopy(denoiser)
    first_last = set(roles.inputs) | set(roles.outputs)
    named = clone.named_modules()
    for name in [n for n, m in named if isinstance(m, LAYER_TYPES) or n in roles.matmuls]:
        layer = clone.get_submodule(name)  # one at a time: what is replaced frees its memory
        if isinstance(layer, LAYER_TYPES):
            cached = policy.cache_timestep and name in roles.timestep_only
            bits = policy.first_last if name in first_last else policy.weight
            act_bits = policy.activation
            if act_bits is not None and name in first_last:
                act_bits = max(act_bits, policy.first_last_activation)
            if cached:
                bits, act_bits = policy.time, None
            split = roles.concat_split.get(name, 0) if policy.split_skip else 0
            inputs: list[LearnedQuantizer] = []
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
                replacement = CalibTimestepLayer(context, replacement)
            replace_module(clone, name, replacement)
            on_layer(name)
        elif policy.quantize_matmuls and policy.activation is not None:
            bits = policy.activation
            probabilities = roles.matmuls[name] == "values"
            left = LearnedQuantizer(
                context,
                policy.softmax if probabilities else bits,
                symmetric=not probabilities,
                unsigned=probabilities,
            )
            right = LearnedQuantizer(context, bits, symmetric=True, unsigned=False)
            by_row = probabilities and policy.softmax_by_row
            replace_module(clone, name, CalibMatMul(left, right, by_row))
    model = QuantDenoiser(clone, context)
    first = next(denoiser.parameters(), None)
    return model if first is None else model.to(first.device)  # the new quantizers as well


def deploy(model: QuantDenoiser) -> QuantDenoiser:
    """A copy whose layers are integers. The layers under calibration are left as they are."""
    own: dict[int, Any] = {}
    copy.deepcopy(model.context, own)  # it has a timestep of its own
    copies = dict(own)  # of a module that is in it, deepcopy takes what is here
    for name, module in model.denoiser.named_modules():
        if isinstance(module, (CalibLayer, CalibMatMul, CalibTimestepLayer)):
            if not _inside(name, model.denoiser, CalibTimestepLayer):
                copies[id(module)] = copy.deepcopy(module, dict(own)).deploy()
    return copy.deepcopy(model, copies).eval().requires_grad_(False)


def activation_quantizers(model: nn.Module) -> Iterator[tuple[str, LearnedQuantizer]]:
    """(name, quantizer) of every activation quantizer, in the order of registration."""
    for name, module in model.named_modules():
        if isinstance(module, LearnedQuantizer):
            yield name, module


def weight_layers(model: nn.Module) -> Iterator[tuple[str, CalibLayer]]:
    """(name, layer) of every layer under calibration, in the order of registration."""
    for name, module in model.named_modules():
        if isinstance(module, CalibLayer):
            yield name, module


def _inside(name: str, root: nn.Module, kind: type) -> bool:
    """True if an ancestor of the named module is of this kind."""
    parts = name.split(".")
    return any(
        isinstance(root.get_submodule(".".join(parts[:i])), kind) for i in range(1, len(parts))
    )
