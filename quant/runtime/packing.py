"""Codes of 2 to 8 bits, packed without gaps."""

import numpy as np
import torch

CODES_AT_ONCE = 1 << 20  # codes handled at a time when packing, a multiple of 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes 0..2^bits-1 of any shape -> uint8 (ceil(n * bits / 8),)."""
    flat = codes.detach().cpu().contiguous().view(-1).numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy())
    parts = [
        np.packbits(np.unpackbits(flat[i : i + CODES_AT_ONCE, None], axis=1)[:, 8 - bits :])
        for i in range(0, len(flat), CODES_AT_ONCE)
    ]
    return torch.from_numpy(np.concatenate(parts))


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Inverse of pack: uint8 (count,). Raises ValueError if the length does not fit."""
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != -(-count * bits // 8):
        raise ValueError(f"{len(packed)} bytes cannot hold {count} codes of {bits} bits")
    if bits == 8:
        return packed.clone()
    flat, out = packed.numpy(), np.empty(count, np.uint8)
    if 8 % bits == 0:  # whole codes in a byte: much quicker
        each, mask = 8 // bits, 2**bits - 1
        for i in range(each):
            place = out[i::each]
            np.right_shift(flat[: len(place)], 8 - bits * (i + 1), out=place)
            place &= mask
        return torch.from_numpy(out)
    step = CODES_AT_ONCE * bits // 8
    for i, start in enumerate(range(0, len(flat), step)):
        n = min(CODES_AT_ONCE, count - i * CODES_AT_ONCE)
        rows = np.unpackbits(flat[start : start + step], count=n * bits).reshape(n, bits)
        out[i * CODES_AT_ONCE : i * CODES_AT_ONCE + n] = np.packbits(rows, axis=1)[:, 0] >> (
            8 - bits
        )
    return torch.from_numpy(out)
