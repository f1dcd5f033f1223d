"""The smallest denoiser with every kind of row, quantized and packed: for tests of the file."""

from collections.abc import Callable

import torch
from torch import nn

from tinydm.models.ops import MatMul
from tinydm.models.roles import LayerRoles
from tinydm.quant.calibration.wrapping import BitPolicy, activation_quantizers, deploy, quantize
from tinydm.quant.core.context import TimestepContext
from tinydm.quant.runtime.denoiser import QuantDenoiser
from tinydm.quant.runtime.packed_file import to_bytes

TIMESTEPS = [0, 3, 12, 40, 90]


class Attention(nn.Module):
    """The smallest denoiser with every kind of row: time layer, split input, matrix product."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(2, 4)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.join = nn.Conv2d(8, 4, 1, bias=False)
        self.scores = MatMul()
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        emb = self.time(torch.stack([t / 50, torch.cos(t / 7)], 1).float())
        h = self.norm(self.first(x)) + emb[:, :, None, None]
        h = self.join(torch.cat([h, h.relu()], 1))
        scores = torch.softmax(self.scores(h.flatten(2).transpose(1, 2), h.flatten(2)), -1)
        return self.last(h * scores.sum(1).view(-1, 1, *h.shape[2:]))

    def layer_roles(self) -> LayerRoles:
        return LayerRoles(
            inputs=("first",),
            outputs=("last",),
            timestep_only=("time",),
            concat_split={"join": 4},
            matmuls={"scores": "scores"},
        )


def meta(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return kind().eval()


def quantized(
    denoiser: nn.Module, policy: BitPolicy, timesteps: list[int], groups: int, total: int = 100
) -> QuantDenoiser:
    """Deployed, with ranges that differ from group to group and from quantizer to quantizer."""
    g = torch.Generator().manual_seed(5)
    context = TimestepContext(timesteps, total)
    model = quantize(denoiser, context, policy)
    for _, q in activation_quantizers(model):
        low, high = -torch.rand(groups, generator=g) - 0.1, torch.rand(groups, generator=g) * 3 + 1
        group = torch.randint(groups, (len(context.timesteps),), generator=g)
        fewer = torch.arange(groups) == 1  # a group with bits of its own
        q.set_ranges(low, high, group, torch.where(fewer, q.bits - 1, q.bits))
    return deploy(model)


def small_model() -> QuantDenoiser:
    torch.manual_seed(2)
    return quantized(Attention().eval(), BitPolicy(weight=3, activation=6), TIMESTEPS, 3)


def small_file(model: QuantDenoiser) -> bytes:
    return to_bytes(model, {"config": "name: x", "method": "tinydm"})
