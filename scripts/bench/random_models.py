"""Full-size networks with random weights, deployed one layer at a time: for sizes and speed."""

from dataclasses import replace

import torch
from torch import nn

from ...models.conditioning import TEXT_TOKENS
from ...models.pipeline import sampling_plan
from ...models.protocols import roles_of
from ...models.roles import LayerRoles
from ...quant.calibration.calibrate import calibrated_timesteps
from ...quant.calibration.equivalent import scaled_layers
from ...quant.calibration.wrapping import BitPolicy, activation_quantizers, deploy, quantize
from ...quant.core.context import TimestepContext
from ...quant.core.operation import LAYER_TYPES
from ...quant.core.settings import QuantSettings
from ...quant.runtime.denoiser import QuantDenoiser, replace_module
from ..experiment.assembly import empty_denoiser
from ..experiment.config import Config


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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


def own_roles(name: str, roles: LayerRoles) -> LayerRoles:
    """What `roles` says about one layer, for a module that holds it alone as "layer"."""

    def alone(names: tuple[str, ...]) -> tuple[str, ...]:
        return ("layer",) if name in names else ()

    return LayerRoles(
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
    roles: LayerRoles,
    policy: BitPolicy,
    context: TimestepContext,
    settings: QuantSettings,
) -> nn.Module:
    """One layer as integers, with as many ranges, and channel scales, as the settings allow."""
    holder = nn.Module()
    holder.layer = layer
    # A product of attention has no parameter, hence no device.
    holder.place = nn.Parameter(torch.zeros(0))
    model = quantize(holder, context, policy, own_roles(name, roles))
    if settings.equivalent_scaling:
        for calibrated in scaled_layers(model).values():
            ones = torch.ones(calibrated.weight.shape[1])
            quantizer = calibrated.weight_quantizer
            calibrated.set_channel_scale(ones, calibrated.weight.detach(), quantizer)
    groups, timesteps = settings.activation.groups, len(context.timesteps)
    group_of_timestep = torch.arange(timesteps) * min(groups, timesteps) // timesteps
    high = torch.linspace(1.0, 4.0, min(groups, timesteps))
    for _, quantizer in activation_quantizers(model):
        quantizer.set_ranges(-high, high, group_of_timestep)
    return deploy(model).denoiser.layer


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
    """A deployed model of random weights with the bits, groups and timesteps of `settings` and
    `config`."""
    sampler, schedule = config.sampler, config.schedule
    steps, _ = sampling_plan(sampler.name, sampler.steps, sampler.skip, **vars(schedule))
    steps = calibrated_timesteps(steps, config.calibration.calibrated_timesteps)
    context = TimestepContext(steps, schedule.train_timesteps)
    policy = replace(BitPolicy.of(settings), weight_scale="minmax")  # random: nothing to search
    return random_deployed(config, policy, context)
