"""Logarithmic codes of attention probabilities (METHOD 5.1, the option besides uniform codes).

    q = clamp(round(-log2(x / s)), 0, 2^b - 1),    x_hat = s 2^-q

Probabilities are many and small with a few near one, which powers of two follow; at 8 bits uniform
codes are finer. A product with such codes shifts instead of multiplying, which an int8 GEMM cannot
do, so the int8 backend leaves it simulated.
"""

import torch

from quant.quantizer import SMALLEST_SCALE, ActivationQuantizer, LearnedQuantizer, round_ste

SMALLEST = 2.0**-126  # keeps log2 finite at 0


def log2_quantize(x: torch.Tensor, scale: torch.Tensor, top: int) -> torch.Tensor:
    """x >= 0 of any shape, scale broadcasts; straight-through where the code is rounded."""
    exponent = -torch.log2((x / scale).clamp(min=SMALLEST))
    return scale * torch.exp2(-round_ste(exponent.clamp(0, top)))


class LearnedLog2Quantizer(LearnedQuantizer):
    """Under calibration; the scale is the largest value that can be told apart."""

    def _quantize(self, x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        shape = () if group.dim() == 0 else (-1,) + (1,) * (x.dim() - 1)
        scale = self.log_scale.exp()[group].reshape(shape)
        return log2_quantize(x, scale, 2**self.bits - 1)

    def set_tops(self, high: torch.Tensor, group_of_bin: torch.Tensor) -> None:
        """high (G,): largest value of each group; group_of_bin (S,)."""
        self.set_ranges(torch.zeros_like(high), high * (2**self.bits - 1), group_of_bin)

    def deploy(self) -> "Log2Quantizer":
        scale = self.log_scale.exp().clamp(min=SMALLEST_SCALE)
        zero_point = torch.zeros(len(scale))
        return Log2Quantizer(self.context, scale, zero_point, self.group_of_bin, self.bits)


class Log2Quantizer(ActivationQuantizer):
    """Deployed; buffers as those of ActivationQuantizer, zero_point unused."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, _, _ = self.current(x.dim())
        return log2_quantize(x, scale, 2**self.bits - 1)

    def shared(
        self, x: torch.Tensor, index: int, inplace: bool = False
    ) -> tuple[torch.Tensor, float]:
        return log2_quantize(x, self.scale[self._groups[index]], 2**self.bits - 1), 1.0
