"""A small network with every kind of layer, and what a quantized one consists of."""

from collections.abc import Iterator

import torch
from torch import nn

from tinydm.models.ddim_unet import DDIMUNet
from tinydm.quant.runtime.layers import QuantLayer


def narrow_unet(seed: int = 0) -> DDIMUNet:
    """Every kind of layer of the architecture in 45 thousand parameters, 16 x 16 pixels."""
    torch.manual_seed(seed)
    return DDIMUNet(
        ch=8,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(8,),
        image_size=16,
        norm_groups=4,
    ).eval()


def layers_of(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """(name, layer) of every quantized layer of a deployed model, in the order of registration."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module


def levels(weight: torch.Tensor) -> int:
    """The largest number of distinct values in a channel (row) of a weight."""
    return max(len(row.unique()) for row in weight.flatten(1))
