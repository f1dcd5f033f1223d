"""Quantization, with the GroupNorm and SiLU before it, as one pass of C++, compiled when asked.

Needs a C++ compiler and nothing of PyTorch's headers; compiling takes about a second, so that the
library is not kept. Plain quantization equals that of int8_layers.py bit by bit, with a GroupNorm
up to float rounding.
"""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import nn

SOURCE = Path(__file__).with_name("fused.cpp")
COMPILERS = ("g++", "clang++", "c++")
# Without contraction a multiplication and an addition round twice, as PyTorch's own passes do.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
LIBRARY = ("-std=c++17", "-fopenmp", "-shared", "-fPIC")

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_STEP = [_FLOAT, *[ctypes.c_int32] * 3]  # 1 / scale, zero point, top, threads
_CODES = [_POINTER, _LONG, _POINTER, _POINTER, *[_LONG] * 3, *_STEP]
_NORM = [*[_POINTER] * 3, _LONG, ctypes.c_double, _POINTER, _POINTER, *[_LONG] * 3, *_STEP]


class FusedError(RuntimeError):
    """The pass cannot be compiled here; the message says what is missing, in one line."""


class FusedPass:
    """The compiled functions. Raises FusedError. A copy, or a pickle read again, compiles anew."""

    def __init__(self) -> None:
        compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            raise FusedError(f"no C++ compiler ({', '.join(COMPILERS)})")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "fused.so"
            command = [compiler, *FLAGS, *LIBRARY, str(SOURCE), "-o", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                line = next((line for line in lines if "error" in line), lines[-1])
                raise FusedError(f"{compiler}: {line[:200]}")
            try:
                library = ctypes.CDLL(str(file))
            except OSError as error:
                raise FusedError(f"what {compiler} made cannot be loaded: {error}") from error
        self._codes, self._norm = library.codes, library.norm_silu_codes
        self._codes.argtypes, self._codes.restype = _CODES, None
        self._norm.argtypes, self._norm.restype = _NORM, None

    def __reduce__(self) -> tuple[type["FusedPass"], tuple[()]]:
        return FusedPass, ()

    def codes(
        self, x: torch.Tensor, factors: torch.Tensor, inverse: float, zero_point: int, top: int
    ) -> torch.Tensor:
        """clamp(round(x * factors * inverse) + zero_point, 0, top), uint8 (B, C, H, W).

        x: float32 of which `pixel_stride` is not None; factors float32 (C,).
        """
        out = _empty_codes(x)
        batch, channels, height, width = x.shape
        self._codes(
            *(x.data_ptr(), pixel_stride(x), factors.data_ptr(), out.data_ptr(), batch),
            *(height * width, channels, inverse, zero_point, top, torch.get_num_threads()),
        )
        return out

    def norm_silu_codes(
        self,
        x: torch.Tensor,
        norm: nn.GroupNorm,
        factors: torch.Tensor,
        inverse: float,
        zero_point: int,
        top: int,
    ) -> torch.Tensor:
        """`codes` of silu(norm(x)). x: float32 (B, C, H, W) whose `pixel_stride` is C."""
        out = _empty_codes(x)
        batch, channels, height, width = x.shape
        self._norm(
            *(x.data_ptr(), norm.weight.data_ptr(), norm.bias.data_ptr(), norm.num_groups),
            *(norm.eps, factors.data_ptr(), out.data_ptr(), batch, height * width, channels),
            *(inverse, zero_point, top, torch.get_num_threads()),
        )
        return out


def _empty_codes(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.uint8, memory_format=torch.channels_last)


def pixel_stride(x: torch.Tensor) -> int | None:
    """Values from one pixel to the next where the channels of float32 (B, C, H, W) on the CPU lie
    beside each other (all of them, or a part); None for any other tensor."""
    if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu" or x.numel() == 0:
        return None
    _, channels, height, width = x.shape
    stride = x.stride(3) if width > 1 else x.stride(2) if height > 1 else x.stride(0)
    expected = (height * width * stride, 1, width * stride, stride)
    matches = all(
        count == 1 or a == b for count, a, b in zip(x.shape, x.stride(), expected, strict=True)
    )
    return stride if matches and stride >= channels else None
