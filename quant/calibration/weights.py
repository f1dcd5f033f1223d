"""Weight quantization: per-output-channel scales by search, and learned rounding (AdaRound).

Weights are (O, ...); scale and zero point are (O,). 8 bits: symmetric signed, stored z = 128 so
that one formula serves both; below: asymmetric. Every channel has at most 2^b distinct values.
"""

from functools import partial

import torch
from torch import nn

from ..core.affine import SMALLEST_SCALE, dequantize, per_channel, range_to_scale, round_to_nearest

ERROR_POWER = 2.4  # of |x - x_hat| in a search of ranges (PTQ4DM, section 3.4; Q-Diffusion's code)
SEARCHED_RANGES, SMALLEST_RANGE = 60, 0.35  # of a channel: how many, and the last as a share of all
COMPARED_RANGES = 12  # ranges that the search tries where weights are only compared
LONGEST_ROW = 2304  # weights of a channel that the search of its scale looks at, about
LARGEST_WEIGHTS = 32  # weights of such a channel that it looks at besides
WEIGHTS_AT_ONCE = 1 << 16  # weights: the passes of the search stay in the cache
LATENT_MARGIN = 0.25  # of a code's cell, where its latent starts
ZETA, GAMMA = 1.1, -0.1  # stretch of the sigmoid (Nagel et al. 2020, eq. 23)


def minmax_scale(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (O,) of the full range of each output channel."""
    flat = weight.detach().flatten(1)
    return range_to_scale(flat.amin(1), flat.amax(1), bits, symmetric=bits >= 8)


def mse_scale(
    weight: torch.Tensor, bits: int, ratios: int = SEARCHED_RANGES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (O,) that minimise sum |w - w_hat|^ERROR_POWER over shrunk ranges.

    ratios: how many of them. Of very long rows the sum takes a part, evenly spaced, and the largest
    weights.
    """
    flat = weight.detach().flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    stride = -(-flat.shape[1] // LONGEST_ROW)
    stride += stride % 3 == 0  # all taps of a 3 x 3 kernel take part
    rows = max(1, WEIGHTS_AT_ONCE // (flat.shape[1] // stride))
    grid = torch.linspace(1.0, SMALLEST_RANGE, ratios).tolist()
    found = []
    for i in range(0, len(flat), rows):
        part = flat[i : i + rows]
        seen = [part[:, ::stride].contiguous()]
        if stride > 1:
            size, place = part.abs().topk(LARGEST_WEIGHTS, dim=1, sorted=False)
            counted = seen[0].abs() >= size.amin(1, keepdim=True)
            seen = [seen[0].masked_fill(counted, 0.0), part.gather(1, place)]  # zero is exact
        found.append(_search_rows(seen, stride, low[i : i + rows], high[i : i + rows], bits, grid))
    scale, zero = (torch.cat(values) for values in zip(*found, strict=True))
    return scale.clamp(min=SMALLEST_SCALE), zero


def _search_rows(
    seen: list[torch.Tensor],
    stride: int,
    low: torch.Tensor,
    high: torch.Tensor,
    bits: int,
    ratios: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """mse_scale of a few rows, whose ranges are low and high (R,). seen: weights (R, N) that stand
    for `stride` each, then others that stand for themselves."""
    # (ratios, R): ratios together where rows are few, which saves operators
    of_ratio = torch.tensor(ratios, device=low.device)[:, None]
    scale, zero = range_to_scale(low * of_ratio, high * of_ratio, bits, symmetric=bits >= 8)
    errors = []
    at_once = max(1, WEIGHTS_AT_ONCE // seen[0].numel())
    for s, z in zip(scale.split(at_once), zero.split(at_once), strict=True):
        s, z = s[..., None], z[..., None]
        parts = []
        for w in seen:
            w_hat = (w / s).round_().add_(z).clamp_(0, 2**bits - 1).sub_(z).mul_(s)
            parts.append((w - w_hat).abs_().pow_(ERROR_POWER).sum(2))
        errors.append(parts[0] if len(parts) == 1 else parts[0] * stride + parts[1])
    best = torch.cat(errors).argmin(0, keepdim=True)
    return scale.gather(0, best)[0], zero.gather(0, best)[0]


def roughly_rounded(weight: torch.Tensor, bits: int, scale_search: str) -> torch.Tensor:
    """The weight rounded to nearest, shaped like it, with scales of a short search: for comparing.

    scale_search: mse | minmax.
    """
    search = partial(mse_scale, ratios=COMPARED_RANGES) if scale_search == "mse" else minmax_scale
    scale, zero = search(weight, bits)
    return dequantize(round_to_nearest(weight, scale, zero, bits), scale, zero)


class _LatentWeight(torch.autograd.Function):
    """s (round(latent) - z) with straight-through gradients; s and z broadcast against latent.

    Latents stay within the codes (clamp_latent). Only the result is kept for the backward pass, as
    the convolution does anyway: <g, round(latent) - z> = <g, w_hat> / s.
    """

    @staticmethod
    def forward(ctx, latent, scale, zero_point, top):
        w_hat = latent.round().clamp_(0, top).sub_(zero_point).mul_(scale)
        ctx.save_for_backward(w_hat, scale)
        return w_hat

    @staticmethod
    def backward(ctx, grad):
        w_hat, scale = ctx.saved_tensors
        of_latent = grad * scale if ctx.needs_input_grad[0] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = (grad * w_hat).flatten(1).sum(1).view_as(scale) / scale
        return of_latent, of_scale, None, None


class WeightQuantizer(nn.Module):
    """A weight under calibration: fixed scale, and one of three roundings.

    nearest: q = round(w/s) + z.
    alpha:   q = floor(w/s) + h(alpha) + z, h(alpha) = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1), which
             starts at w_hat = w and is driven to 0 or 1 (AdaRound, for single blocks).
    latent:  q = round(latent), straight-through, latent in units of the scale (for end-to-end
             steps, where any code may be reached and a soft rounding would not settle in time).
    All are clamped to 0..2^b-1.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, weight: torch.Tensor, bits: int, scale_search: str):
        super().__init__()
        self.bits, self.scale_search = bits, scale_search
        search = {"mse": mse_scale, "minmax": minmax_scale}[scale_search]
        scale, zero_point = search(weight, bits)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.alpha: nn.Parameter | None = None
        self.soft = False  # while learning; afterwards h is rounded to 0 or 1
        self.latent: nn.Parameter | None = None
        self.log_gain: nn.Parameter | None = None  # (O,) learned factor of the scale

    def start_rounding(self, weight: torch.Tensor) -> nn.Parameter:
        """Starts at the weight itself; codes that were fixed are given up. Returns alpha."""
        fraction = weight / per_channel(self.scale, weight)
        fraction = (fraction - fraction.floor()).clamp(1e-3, 1 - 1e-3)
        stretched = (fraction - GAMMA) / (ZETA - GAMMA)
        alpha = nn.Parameter(torch.logit(stretched))
        self.alpha, self.latent = alpha, None
        self.soft = True
        return alpha

    def fix_codes(self, codes: torch.Tensor) -> None:
        """Codes 0..2^b-1 chosen elsewhere, as floats shaped like the weight."""
        self.latent, self.alpha, self.soft = nn.Parameter(codes), None, False

    def start_latent(self, weight: torch.Tensor) -> None:
        """Starts at the weight itself, moved well into the cell of the code chosen so far: at its
        edge the first small steps would undo what second-order rounding chose together."""
        with torch.no_grad():
            self.soft = False
            codes = self.codes(weight)
            exact = weight / per_channel(self.scale, weight)
            exact = exact + per_channel(self.zero_point, weight)
            latent = torch.minimum(
                torch.maximum(exact, codes - LATENT_MARGIN), codes + LATENT_MARGIN
            )
        self.latent = nn.Parameter(latent)
        self.log_gain = nn.Parameter(torch.zeros_like(self.scale))
        self.alpha = None
        self.clamp_latent()

    @torch.no_grad()
    def fix_scale(self) -> None:
        """Folds what was learned of the scale into it."""
        assert self.log_gain is not None  # of start_latent
        self.scale.mul_(self.log_gain.exp())
        self.log_gain = None

    @torch.no_grad()
    def clamp_latent(self) -> None:
        """Back into 0..2^b-1: outside, a latent gets no gradient and would never move again."""
        assert self.latent is not None  # of start_latent
        self.latent.clamp_(0, 2**self.bits - 1)

    def h(self) -> torch.Tensor:
        """What learned rounding adds to floor(w / s): 0 to 1, shaped like the weight."""
        alpha = self.alpha
        assert alpha is not None  # of start_rounding
        return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def regulariser(self, beta: float) -> torch.Tensor:
        """Sum of 1 - |2h - 1|^beta: drives every h to 0 or 1 (Nagel et al. 2020, eq. 24)."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes as floats; integers unless the rounding is still soft."""
        if self.latent is not None:
            return self.latent.round().clamp(0, 2**self.bits - 1)
        if self.alpha is None:
            return round_to_nearest(weight, self.scale, self.zero_point, self.bits)
        up = self.h() if self.soft else (self.alpha >= 0).to(weight.dtype)
        floor = (weight / per_channel(self.scale, weight)).floor()
        q = floor + up + per_channel(self.zero_point, weight)
        return q.clamp(0, 2**self.bits - 1)

    def current_scale(self) -> torch.Tensor:
        """(O,), with what was learned of it."""
        return self.scale if self.log_gain is None else self.scale * self.log_gain.exp()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.latent is not None:
            scale, zero_point = (
                per_channel(v, self.latent) for v in (self.current_scale(), self.zero_point)
            )
            return _LatentWeight.apply(self.latent, scale, zero_point, 2**self.bits - 1)
        return dequantize(self.codes(weight), self.current_scale(), self.zero_point)
