"""Deployed activation quantizers: plain buffers, and the group that the timestep chooses.

Legend: B batch, G groups of timesteps, S calibrated timesteps.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..core.affine import BroadcastStep, QuantizerStep, fake_quantize, fake_quantize_shared
from ..core.context import TimestepContext
from .derived import KeepsDerived


class ActivationQuantizer(KeepsDerived):
    """Deployed per-tensor activation quantizer: G scales, chosen by the timestep's group.

    bits: of the codes of all groups, or of each of them (G,); the attribute is the largest number.
    Buffers: scale float32 (G,), zero_point int32 (G,), group_of_timestep uint8 (S,); tops int32
    (G,), the highest codes, made from the bits.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    group_of_timestep: torch.Tensor
    tops: torch.Tensor

    def __init__(
        self,
        context: TimestepContext,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        group_of_timestep: torch.Tensor,
        bits: int | Sequence[int],
    ):
        super().__init__()
        self.context = context
        self.group_bits = [bits] * len(scale) if isinstance(bits, int) else list(bits)
        self.bits = max(self.group_bits)
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32))
        self.register_buffer("group_of_timestep", group_of_timestep.to(torch.uint8))
        tops = torch.tensor([2**b - 1 for b in self.group_bits], dtype=torch.int32)
        self.register_buffer("tops", tops.to(scale.device), persistent=False)
        # A look-up in a list makes no tensor at each call.
        self._groups: list[int] = self.group_of_timestep.tolist()
        self._forget()

    @property
    def mean_bits(self) -> float:
        """Of the calibrated timesteps."""
        return sum(self.group_bits[g] for g in self._groups) / len(self._groups)

    def _forget(self) -> None:
        """Drops what is made from the buffers: the steps of the groups, and those without scale."""
        self._steps: list[QuantizerStep] | None = None
        self._unscaled: list[BroadcastStep] = []

    def group(self, index: int) -> int:
        """The group of the calibrated timestep `index`."""
        return self._groups[index]

    def step(self, index: int) -> QuantizerStep:
        """The numbers of the calibrated timestep `index`."""
        if self._steps is None:
            inverses = self.scale.reciprocal()  # rounded to float32 as in fake_quantize
            ends = (-self.zero_point).tolist(), (self.tops - self.zero_point).tolist()
            numbers = zip(inverses.tolist(), self.scale.tolist(), *ends, strict=True)
            self._steps = [QuantizerStep(*values) for values in numbers]
            # 0-d tensors multiply faster than numbers.
            tensors = zip(inverses, *ends, strict=True)
            self._unscaled = [BroadcastStep(v, None, low, high) for v, low, high in tensors]
        return self._steps[self._groups[index]]

    def current(self, dims: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scale, zero point and highest code of the current timestep: 0-d, or (B, 1, ...) of
        `dims` axes."""
        index = self.context.index
        one = isinstance(index, int)
        group = self._groups[index] if one else self.group_of_timestep[index].long()
        shape = () if one else (-1,) + (1,) * (dims - 1)
        scale, zero_point, top = self.scale, self.zero_point, self.tops
        return scale[group].view(shape), zero_point[group].view(shape), top[group].view(shape)

    def shared(
        self, x: torch.Tensor, index: int, inplace: bool = False
    ) -> tuple[torch.Tensor, float]:
        """q - z and the scale, whose product is the quantized x, at the calibrated timestep
        `index`. inplace: x may be overwritten."""
        scale = self.step(index).scale
        step = self._unscaled[self._groups[index]]
        return fake_quantize_shared(x, step, inplace=inplace), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = self.context.index
        if isinstance(index, int):
            return fake_quantize_shared(x, self.step(index))
        scale, zero_point, top = self.current(x.dim())
        return fake_quantize(x, scale, zero_point.to(x.dtype), top)


def quantizers_of(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """(name, quantizer) of every activation quantizer of a deployed model, in the file's order."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            yield name, module
