"""The functions that launch the integer kernels of triton_kernels.py, whose legend holds here."""

import os
from typing import NamedTuple

import torch
import triton

from .triton_kernels import (
    attention_kernel,
    codes_kernel,
    group_statistics_kernel,
    product_kernel,
)

LARGEST_SUM = 65792  # products of 255 and 128 that int32 holds
LARGEST_MAP = 2**31 - 1  # values that the kernels' 32-bit offsets reach
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_FUSED_MULTIPLY_ADD = {"enable_fp_fusion": False}


class Steps(NamedTuple):
    """A quantizer at every calibrated timestep, and the current one; all on the device.

    current int32 (1,): the index; inverse float32, zero_point int32 and top int32, the highest
    code, (S,): of the whole codes; scale float32 and plane_zero int32, (planes, S): of each plane.
    """

    current: torch.Tensor
    inverse: torch.Tensor
    zero_point: torch.Tensor
    top: torch.Tensor
    scale: torch.Tensor
    plane_zero: torch.Tensor


class Weight(NamedTuple):
    """An integer weight as product_kernel takes it: codes, the zero point of packed ones (else
    None), sum and scale; kernel size (KH, KW)."""

    codes: torch.Tensor
    zero_point: torch.Tensor | None
    sum: torch.Tensor
    scale: torch.Tensor
    size: tuple[int, int]


def product_tiles(rows: int, columns: int, inner: int) -> dict[str, int]:
    """Sizes of product_kernel's blocks, not tuned; inner: channels."""
    if INTERPRETED:
        return {"BM": _fit(rows, 16), "BN": _fit(columns, 16), "BK": _fit(inner, 32), "GROUP_M": 8}
    if rows * columns < 100 * 128 * 128:  # large blocks would leave processors idle
        return {"BM": 64, "BN": 64, "BK": 128, "GROUP_M": 8, "num_warps": 4, "num_stages": 4}
    return {"BM": 128, "BN": 128, "BK": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}


def quantize_map(
    x: torch.Tensor,
    steps: Steps,
    factors: torch.Tensor | None = None,
    border: tuple[int, int] = (0, 0),
    norm: torch.nn.GroupNorm | None = None,
) -> torch.Tensor:
    """x (B, C, H, W) of any float type -> int8 codes (planes, B, H + 2 border[0], W + 2 border[1],
    C), of silu(norm(x)) with a norm; factors float32 (C,) multiply the channels before.

    Raises ValueError for a map that is too large.
    """
    if x.stride(2) != x.shape[3] * x.stride(3):  # pixels do not follow each other
        x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    planes = len(steps.scale)
    size = (batch, height + 2 * border[0], width + 2 * border[1], channels)
    out = torch.empty((planes, *size), device=x.device, dtype=torch.int8)
    _check_size(x)
    _check_size(out)
    strides = (x.stride(0), x.stride(3), x.stride(1))
    mean = rstd = gamma = beta = x
    if norm is not None:
        gamma, beta = norm.weight.detach(), norm.bias.detach()
        mean, rstd = _group_statistics(x, norm, strides)
    pixels = size[1] * size[2]
    block_p, block_c = (_fit(pixels, 1), _fit(channels, 1)) if INTERPRETED else (32, 64)
    grid = triton.cdiv(pixels, block_p), batch, triton.cdiv(channels, block_c)
    codes_kernel[grid](
        *(x, mean, rstd, gamma, beta, x if factors is None else factors, out),
        *(steps.current, steps.inverse, steps.zero_point, steps.top),
        *(height, width, channels, *strides, out[0].numel()),
        G=0 if norm is None else norm.num_groups,
        HAS_FACTOR=factors is not None,
        PLANES=planes,
        BY=border[0],
        BX=border[1],
        BP=block_p,
        BC=block_c,
        **NO_FUSED_MULTIPLY_ADD,
    )
    return out


def _group_statistics(
    x: torch.Tensor, norm: torch.nn.GroupNorm, strides: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / deviation of each group, float32 (B, G)."""
    batch, channels, height, width = x.shape
    mean = torch.empty(batch, norm.num_groups, device=x.device, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    each = channels // norm.num_groups
    block = triton.next_power_of_2(each)
    group_statistics_kernel[(norm.num_groups, batch)](
        *(x, mean, rstd, height * width, *strides, norm.eps),
        CG=each,
        BP=_fit(height * width, 1, max(1, 4096 // block)),
        BC=block,
        **NO_FUSED_MULTIPLY_ADD,
    )
    return mean, rstd


def product(
    codes: torch.Tensor,
    weight: Weight,
    steps: Steps,
    plane: int,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    plus: torch.Tensor | None = None,
    stride: int = 1,
) -> torch.Tensor:
    """The convolution of a plane of codes (B, H, W, C) -> (B, O, OH, OW) in channels_last, + bias +
    plus, which broadcasts. dtype int32: the bare integer sums. Raises ValueError as quantize_map.
    """
    batch, height, width, channels = codes.shape
    (kh, kw), outputs = weight.size, len(weight.scale)
    out_size = (height - kh) // stride + 1, (width - kw) // stride + 1
    out = torch.empty((batch, *out_size, outputs), device=codes.device, dtype=dtype)
    _check_size(out)
    rows = out.numel() // outputs
    tiles = product_tiles(rows, outputs, channels)
    added = out.permute(0, 3, 1, 2) if plus is None else plus.expand(batch, outputs, *out_size)
    _check_size(added)
    plus_b, plus_c, plus_y, plus_x = added.stride()
    grid = (triton.cdiv(rows, tiles["BM"]) * triton.cdiv(outputs, tiles["BN"]),)
    product_kernel[grid](
        *(codes, weight.codes, weight.sum if weight.zero_point is None else weight.zero_point),
        *(weight.sum, weight.scale, weight.scale if bias is None else bias, added, out),
        *(steps.current, steps.scale[plane], steps.plane_zero[plane]),
        *(rows, height, width, channels, outputs, *out_size),
        *(triton.cdiv(channels, tiles["BK"]), plus_b, plus_y, plus_x, plus_c),
        KH=kh,
        KW=kw,
        STRIDE=stride,
        PACKED=weight.zero_point is not None,
        HAS_BIAS=bias is not None,
        HAS_PLUS=plus is not None,
        RAW=dtype is torch.int32,
        **tiles,
        **NO_FUSED_MULTIPLY_ADD,
    )
    return out.permute(0, 3, 1, 2)


def attention_product(
    left: torch.Tensor,
    right: torch.Tensor,
    steps: tuple[Steps, Steps],
    dtype: torch.dtype,
    score_scale: float | None = None,
    by_row: bool = False,
) -> torch.Tensor:
    """left (B, N, K) times right (B, K, M), both quantized, left after softmax(left * score_scale)
    with a score_scale; see attention_kernel. dtype int32: the bare integer sums. Raises ValueError
    as quantize_map, and for a K whose sums int32 might not hold."""
    batch, rows, inner = left.shape
    columns = right.shape[2]
    if inner > LARGEST_SUM // 2:
        raise ValueError(f"attention over {inner} tokens: int32 sums hold {LARGEST_SUM // 2}")
    out = torch.empty(batch, rows, columns, device=left.device, dtype=dtype)
    for value in (left, right, out):
        _check_size(value)
    block = (64, 64, 64)
    if INTERPRETED:
        block = _fit(rows, 16), _fit(columns, 16), _fit(inner, 32)
    grid = triton.cdiv(rows, block[0]), triton.cdiv(columns, block[1]), batch
    a, b = steps
    attention_kernel[grid](
        *(left, right, out, a.current),
        *(a.inverse, a.scale, a.zero_point, a.top, b.inverse, b.scale, b.zero_point, b.top),
        *(rows, inner, columns, *left.stride(), *right.stride()),
        1.0 if score_scale is None else score_scale,
        SOFTMAX=score_scale is not None,
        BY_ROW=by_row,
        RAW=dtype is torch.int32,
        BM=block[0],
        BN=block[1],
        BK=block[2],
        **NO_FUSED_MULTIPLY_ADD,
    )
    return out


def _fit(size: int, least: int, most: int = 256) -> int:
    """A block that covers `size`, for the interpreter: its time is programs times operators."""
    return min(max(triton.next_power_of_2(size), least), most)


def _check_size(x: torch.Tensor) -> None:
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if reach >= LARGEST_MAP:
        raise ValueError(
            f"a map of shape {tuple(x.shape)} is too large for the integer kernels; "
            "use a smaller sampling.micro_batch"
        )
