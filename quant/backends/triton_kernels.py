"""Integer kernels for CUDA in Triton; triton_launch.py launches them.

Codes. A code q in 0..255 with zero point z is stored as c = q - 128, since tensor cores want both
operands signed. With integer weights w, and z' = z - 128,

    sum_k w (q - z)  =  sum_k w c  -  z' sum_k w

A map of codes has its border written into it, as c = z': q - z = 0. Codes of more than 8 bits are
two planes, of the low and of the high byte; s (q - z) is the sum of both, each with a scale and a
zero point of its own, and costs two products.

Timesteps. What depends on the timestep is read from tables (S,) at `index`, an int32 (1,) on the
device. No argument of a launch depends on the timestep, so that one CUDA graph of a denoiser call
serves all of them.

Exactness. Sums are integers, exact for up to LARGEST_SUM products. Everything is launched without
fusing a multiplication and an addition into one rounding: x * inverse + ROUNDING_OFFSET would take
another code now and then.

Legend: B batch, C/O in/out channels, S calibrated timesteps, N/K/M rows, inner size and columns.
"""

import triton
import triton.language as tl

ROUNDING_OFFSET = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to even below 2^22


@triton.jit
def _shifted(x, multiplier, zero, top):
    """clamp(round(x * multiplier), -z, top - z), an integer q - z in float32."""
    q = (x * multiplier + ROUNDING_OFFSET) - ROUNDING_OFFSET
    return tl.minimum(tl.maximum(q, (-zero).to(tl.float32)), (top - zero).to(tl.float32))


@triton.jit
def group_statistics_kernel(
    x_ptr,  # (B, C, pixels) of any strides
    mean_ptr,  # float32 (B, G)
    rstd_ptr,  # float32 (B, G), 1 / sqrt(variance + eps)
    pixels,
    stride_b,
    stride_p,
    stride_c,
    eps,
    CG: tl.constexpr,  # channels of a group
    BP: tl.constexpr,
    BC: tl.constexpr,  # CG or more, a power of two
):
    """Mean and deviation of one group of one sample, the squares around the mean."""
    g, b = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BC)
    columns = (g * CG + c) * stride_c
    base = x_ptr + b * stride_b
    sums = tl.zeros((BP, BC), dtype=tl.float32)
    for start in range(0, pixels, BP):
        p = start + tl.arange(0, BP)
        keep = (p < pixels)[:, None] & (c < CG)[None, :]
        sums += tl.load(base + p[:, None] * stride_p + columns[None, :], mask=keep, other=0.0).to(
            tl.float32
        )
    mean = tl.sum(tl.sum(sums, 1), 0) / (pixels * CG)
    squares = tl.zeros((BP, BC), dtype=tl.float32)
    for start in range(0, pixels, BP):
        p = start + tl.arange(0, BP)
        keep = (p < pixels)[:, None] & (c < CG)[None, :]
        x = tl.load(base + p[:, None] * stride_p + columns[None, :], mask=keep, other=0.0)
        away = tl.where(keep, x.to(tl.float32) - mean, 0.0)
        squares += away * away
    variance = tl.sum(tl.sum(squares, 1), 0) / (pixels * CG)
    at = b * tl.num_programs(0) + g
    tl.store(mean_ptr + at, mean)
    tl.store(rstd_ptr + at, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def codes_kernel(
    x_ptr,  # (B, C, H, W) of any strides, of which rows of pixels follow each other
    mean_ptr,
    rstd_ptr,
    gamma_ptr,
    beta_ptr,
    factor_ptr,  # float32 (C,)
    out_ptr,  # int8 (planes, B, H + 2 BY, W + 2 BX, C)
    index_ptr,
    inverse_ptr,
    zero_ptr,
    top_ptr,
    H,
    W,
    C,
    stride_b,
    stride_p,
    stride_c,
    plane,  # values of a plane
    G: tl.constexpr,  # groups of the norm, 0 without: then neither norm nor SiLU
    HAS_FACTOR: tl.constexpr,
    PLANES: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """The codes of x, or of silu(norm(x)), with a border, in one pass."""
    b = tl.program_id(1)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    wide = W + 2 * BX
    pixels = (H + 2 * BY) * wide
    y, x = p // wide - BY, p % wide - BX
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    in_c = c < C
    keep = inside[:, None] & in_c[None, :]
    offset = (y * W + x)[:, None] * stride_p + c[None, :] * stride_c
    v = tl.load(x_ptr + b * stride_b + offset, mask=keep, other=0.0).to(tl.float32)
    if G > 0:
        at = b * G + c // (C // G)
        gamma = tl.load(gamma_ptr + c, mask=in_c, other=0.0)
        scale = tl.load(rstd_ptr + at, mask=in_c, other=0.0) * gamma
        mean = tl.load(mean_ptr + at, mask=in_c, other=0.0)
        shift = tl.load(beta_ptr + c, mask=in_c, other=0.0) - mean * scale
        v = v * scale[None, :] + shift[None, :]
        v = v / (1.0 + tl.exp(-v))
    index = tl.load(index_ptr)
    inverse, zero = tl.load(inverse_ptr + index), tl.load(zero_ptr + index)
    top = tl.load(top_ptr + index)
    if HAS_FACTOR:
        factors = tl.load(factor_ptr + c, mask=in_c, other=0.0) * inverse
        q = _shifted(v, factors[None, :], zero, top)
    else:
        q = _shifted(v, inverse, zero, top)
    code = tl.where(inside[:, None], q.to(tl.int32), 0) + zero
    out = out_ptr + (b * pixels + p)[:, None] * C + c[None, :]
    keep = (p < pixels)[:, None] & in_c[None, :]
    if PLANES == 1:
        tl.store(out, (code - 128).to(tl.int8), mask=keep)
    else:
        tl.store(out, ((code & 255) - 128).to(tl.int8), mask=keep)
        tl.store(out + plane, ((code >> 8) - 128).to(tl.int8), mask=keep)


@triton.jit
def product_kernel(
    x_ptr,  # int8 codes (B, H, W, C), H and W with the border
    w_ptr,  # int8 (N, KH KW C), or uint8 (N, KH KW C / 2): the first code in the high nibble
    w_zero_ptr,  # uint8 (N,), of packed weights alone
    w_sum_ptr,  # int32 (N,), the sum of w
    w_scale_ptr,  # float32 (N,)
    bias_ptr,  # float32 (N,)
    plus_ptr,  # (B, N, OH, OW) of any strides
    out_ptr,  # (B, OH, OW, N), or int32 sums of w (q - z) if RAW
    index_ptr,
    scale_ptr,
    zero_ptr,
    M,  # B OH OW
    H,
    W,
    C,
    N,
    OH,
    OW,
    steps,  # blocks of BK channels
    plus_b,
    plus_y,
    plus_x,
    plus_c,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PLUS: tl.constexpr,
    RAW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A convolution as a matrix product whose left operand is gathered from the map: for each
    kernel position and block of channels, (BM output pixels, BK) times (BK, BN output channels). A
    linear layer is a 1x1 convolution of a map with one row."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    width = GROUP_M * tiles_n  # programs that share weights run at the same time
    first = (pid // width) * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    m = (first + (pid % width) % size) * BM + tl.arange(0, BM)
    n = ((pid % width) // size) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    in_m, in_n = m < M, n < N
    ow, oh, b = m % OW, (m // OW) % OH, m // (OW * OH)
    base = ((b * H + oh * STRIDE) * W + ow * STRIDE) * C
    if PACKED:
        half = tl.arange(0, BK // 2)
        w_zero = tl.load(w_zero_ptr + n, mask=in_n, other=0).to(tl.int8)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for i in range(KH * KW * steps):
        tap, c0 = i // steps, (i % steps) * BK
        in_c = c0 + k < C
        at = base[:, None] + ((tap // KW) * W + tap % KW) * C + c0 + k[None, :]
        a = tl.load(x_ptr + at, mask=in_m[:, None] & in_c[None, :], other=0)
        if PACKED:
            column = (tap * C + c0) // 2 + half
            keep = in_n[:, None] & (c0 + 2 * half < C)[None, :]
            pair = tl.load(w_ptr + n[:, None] * (KH * KW * C // 2) + column[None, :], keep, other=0)
            high, low = (pair >> 4).to(tl.int8), (pair & 15).to(tl.int8)
            # Beyond C, w holds -w_zero, but a holds 0.
            w = tl.trans(tl.interleave(high, low) - w_zero[:, None])
        else:
            at = (n[None, :] * (KH * KW) + tap) * C + c0 + k[:, None]
            w = tl.load(w_ptr + at, mask=in_n[None, :] & in_c[:, None], other=0)
        acc = tl.dot(a, w, acc, out_dtype=tl.int32)

    index = tl.load(index_ptr)
    w_sum = tl.load(w_sum_ptr + n, mask=in_n, other=0)
    acc -= (tl.load(zero_ptr + index) - 128) * w_sum[None, :]
    keep = in_m[:, None] & in_n[None, :]
    out = out_ptr + m[:, None] * N + n[None, :]
    if RAW:
        tl.store(out, acc, mask=keep)
    else:
        scale = tl.load(scale_ptr + index) * tl.load(w_scale_ptr + n, mask=in_n, other=0.0)
        value = acc.to(tl.float32) * scale[None, :]
        if HAS_BIAS:
            value += tl.load(bias_ptr + n, mask=in_n, other=0.0)[None, :]
        if HAS_PLUS:
            at = (b * plus_b + oh * plus_y + ow * plus_x)[:, None] + n[None, :] * plus_c
            value += tl.load(plus_ptr + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def attention_kernel(
    a_ptr,  # (B, N, K) of any strides
    b_ptr,  # (B, K, M) of any strides
    out_ptr,  # (B, N, M), or int32 sums of (q_a - z_a) (q_b - z_b) if RAW
    index_ptr,
    a_inverse_ptr,
    a_scale_ptr,
    a_zero_ptr,
    a_top_ptr,
    b_inverse_ptr,
    b_scale_ptr,
    b_zero_ptr,
    b_top_ptr,
    N,
    K,
    M,
    a_stride_b,
    a_stride_n,
    a_stride_k,
    b_stride_b,
    b_stride_k,
    b_stride_m,
    score_scale,
    SOFTMAX: tl.constexpr,  # the left operand is softmax(a * score_scale)
    BY_ROW: tl.constexpr,  # it is quantized relative to the largest value of each row
    RAW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A product of attention. Both operands are quantized on the way, after the softmax of the left
    one if there is one, whose largest value and sum a first pass finds."""
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    m = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    in_n, in_m = n < N, m < M
    rows = a_ptr + tl.program_id(2) * a_stride_b + n[:, None] * a_stride_n
    columns = b_ptr + tl.program_id(2) * b_stride_b + m[None, :] * b_stride_m
    largest = tl.full((BM,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    if SOFTMAX:
        for k0 in range(0, K, BK):
            keep = in_n[:, None] & (k0 + k < K)[None, :]
            s = tl.load(rows + (k0 + k)[None, :] * a_stride_k, mask=keep, other=0.0).to(tl.float32)
            s = tl.where((k0 + k < K)[None, :], s * score_scale, -float("inf"))
            before = largest
            largest = tl.maximum(before, tl.max(s, 1))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(s - largest[:, None]), 1)

    index = tl.load(index_ptr)
    a_inverse, a_zero = tl.load(a_inverse_ptr + index), tl.load(a_zero_ptr + index)
    b_inverse, b_zero = tl.load(b_inverse_ptr + index), tl.load(b_zero_ptr + index)
    a_top, b_top = tl.load(a_top_ptr + index), tl.load(b_top_ptr + index)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    a_sum = tl.zeros((BM,), dtype=tl.int32)
    b_sum = tl.zeros((BN,), dtype=tl.int32)
    for k0 in range(0, K, BK):
        in_k = k0 + k < K
        keep = in_n[:, None] & in_k[None, :]
        a = tl.load(rows + (k0 + k)[None, :] * a_stride_k, mask=keep, other=0.0).to(tl.float32)
        if SOFTMAX:
            a = tl.exp(a * score_scale - largest[:, None])
            if not BY_ROW:
                a = a / total[:, None]
        a = _shifted(a, a_inverse, a_zero, a_top).to(tl.int32) + (a_zero - 128)
        a = tl.where(in_k[None, :], a, 0)
        b = tl.load(
            columns + (k0 + k)[:, None] * b_stride_k, mask=in_k[:, None] & in_m[None, :], other=0.0
        ).to(tl.float32)
        b = _shifted(b, b_inverse, b_zero, b_top).to(tl.int32) + (b_zero - 128)
        b = tl.where(in_k[:, None], b, 0)
        a_sum += tl.sum(a, 1)
        b_sum += tl.sum(b, 0)
        acc = tl.dot(a.to(tl.int8), b.to(tl.int8), acc, out_dtype=tl.int32)

    a_zero -= 128
    b_zero -= 128
    acc += K * a_zero * b_zero - a_zero * b_sum[None, :] - b_zero * a_sum[:, None]
    keep = in_n[:, None] & in_m[None, :]
    out = out_ptr + (tl.program_id(2) * N + n)[:, None] * M + m[None, :]
    if RAW:
        tl.store(out, acc, mask=keep)
    else:
        scale = tl.load(a_scale_ptr + index) * tl.load(b_scale_ptr + index)
        value = acc.to(tl.float32) * scale
        if SOFTMAX and BY_ROW:
            value = value / total[:, None]
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=keep)
