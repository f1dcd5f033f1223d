"""Integer execution in C++, compiled when asked: codes.cpp and products.cpp.

codes.cpp makes uint8 codes in one pass, with the GroupNorm and SiLU before them if there are any;
products.cpp multiplies them, on processors with AVX512-VNNI (`products` says so; elsewhere oneDNN
does). Needs a C++ compiler and nothing of PyTorch's headers; compiling takes about two seconds, so
that the library is not kept. Results equal those of int8_layers.py bit by bit where nothing but
codes is made, and up to float rounding elsewhere.
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

SOURCES = tuple(Path(__file__).with_name(name) for name in ("codes.cpp", "products.cpp"))
COMPILERS = ("g++", "clang++", "c++")
# Without contraction a multiplication and an addition round twice, as PyTorch's own passes do.
NATIVE = ("-O3", "-march=native", "-mprefer-vector-width=512")
EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
LIBRARY = ("-std=c++17", "-fopenmp", "-shared", "-fPIC")

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int32
_STEP = [_FLOAT, _INT, _INT]  # 1 / scale, zero point, top
_ARGUMENTS = {
    "codes": [_POINTER, _LONG, *[_POINTER] * 4, *_STEP, _INT],
    "norm_silu_codes": [*[_POINTER] * 3, _LONG, ctypes.c_double, *[_POINTER] * 4, *_STEP, _INT],
}
_PRODUCTS = {
    "convolution": [*[_POINTER] * 8, _FLOAT, _INT, _INT],
    "matrix_product": [*[_POINTER] * 4, *_STEP, *_STEP, _FLOAT, _INT, _FLOAT, _INT],
}
Step = tuple[float, float, int]  # 1 / scale, scale, zero point
Planes = list[tuple[torch.Tensor, float, int]]  # uint8 codes, their scale and their zero point


class CompileError(RuntimeError):
    """The code cannot be compiled here; the message says what is missing, in one line."""


class Compiled:
    """The compiled functions. Raises CompileError. A copy, or a pickle read again, compiles anew.

    products: whether this processor has the instructions of products.cpp.
    """

    def __init__(self) -> None:
        self._library = _compile()
        self.products = bool(self._library.has_products())
        functions = _ARGUMENTS | (_PRODUCTS if self.products else {})
        for name, arguments in functions.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, None

    def __reduce__(self) -> tuple[type["Compiled"], tuple[()]]:
        return Compiled, ()

    def codes(
        self,
        x: torch.Tensor,
        factors: torch.Tensor,
        step: Step,
        bits: int,
        border: tuple[int, int] = (0, 0),
        pitch: int | None = None,
    ) -> Planes:
        """clamp(round(x * factors / scale) + zero_point, 0, 2^bits - 1), with a border of zeros.

        x: float32 (B, C, H, W) of which `pixel_stride` is not None; factors float32 (C,). Codes are
        (B, pitch, H + 2 border[0], W + 2 border[1]), channels_last; those of channels beyond C are
        not set. More than 8 bits give two, of the low and the high byte: s (q - z) is their sum.
        """
        given = (x.data_ptr(), pixel_stride(x))
        return self._make(self._library.codes, given, x, factors, step, bits, border, pitch)

    def norm_silu_codes(
        self,
        x: torch.Tensor,
        norm: nn.GroupNorm,
        factors: torch.Tensor,
        step: Step,
        bits: int,
        border: tuple[int, int] = (0, 0),
        pitch: int | None = None,
    ) -> Planes:
        """`codes` of silu(norm(x)). x: float32 (B, C, H, W) whose `pixel_stride` is C."""
        given = (x.data_ptr(), norm.weight.data_ptr(), norm.bias.data_ptr(), norm.num_groups)
        function = self._library.norm_silu_codes
        return self._make(function, (*given, norm.eps), x, factors, step, bits, border, pitch)

    def _make(
        self,
        function: Callable[..., None],
        given: tuple[int | float | None, ...],
        x: torch.Tensor,
        factors: torch.Tensor,
        step: Step,
        bits: int,
        border: tuple[int, int],
        pitch: int | None,
    ) -> Planes:
        """Codes by a function of codes.cpp; given: its first arguments, of the input."""
        out, high, size = _targets(x, bits, border, pitch)
        inverse, scale, zero_point = step
        function(
            *(*given, factors.data_ptr(), out.data_ptr()),
            *(None if high is None else high.data_ptr(), size),
            *(inverse, zero_point, 2**bits - 1, torch.get_num_threads()),
        )
        if high is None:
            return [(out, scale, zero_point)]
        return [(out, scale, zero_point & 255), (high, scale * 256, zero_point >> 8)]

    def convolution(
        self,
        plane: tuple[torch.Tensor, float, int],
        weight: "BlockedWeight",
        bias: torch.Tensor | None,
        plus: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """out = the convolution of codes that have their border + bias + plus.

        out: float32 (B, O, H, W), channels_last. plus: such a tensor (`out` itself is one), or
        (B, O, 1, 1) with its channels side by side.
        """
        codes, scale, zero_point = plane
        batch, outputs, height, width = out.shape
        sample = pixel = 0
        if plus is not None:
            sample, pixel = plus.stride(0), 0 if plus.shape[2:] == (1, 1) else outputs
        size = (ctypes.c_long * 13)(
            *(batch, codes.shape[2], codes.shape[3], codes.shape[1], height, width, outputs),
            *(*weight.kernel, *weight.stride, sample, pixel),
        )
        self._library.convolution(
            *(codes.data_ptr(), weight.codes.data_ptr(), weight.sums.data_ptr()),
            *(weight.scale.data_ptr(), None if bias is None else bias.data_ptr()),
            *(None if plus is None else plus.data_ptr(), out.data_ptr(), size),
            *(scale, zero_point, torch.get_num_threads()),
        )

    def matrix_product(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        left_step: Step,
        right_step: Step,
        bits: tuple[int, int],
        relative: bool,
        score_scale: float | None = None,
    ) -> torch.Tensor:
        """(B, N, K) @ (B, K, M), both quantized to at most 8 bits, the right one to values that fit
        int8. relative: rows of the left one are divided by their largest value before, and the
        result's multiplied by it. score_scale: the left operand is softmax(left * score_scale)."""
        left, right = left.float(), right.float()
        if left.stride(2) != 1:
            left = left.contiguous()
        if 1 not in right.stride()[1:]:
            right = right.contiguous()
        out = torch.empty(*left.shape[:2], right.shape[2])
        strides = (*left.stride()[:2], *right.stride())
        size = (ctypes.c_long * 9)(*left.shape, right.shape[2], *strides)
        steps = [
            (inverse, zero_point, 2**b - 1)
            for (inverse, _, zero_point), b in zip((left_step, right_step), bits, strict=True)
        ]
        self._library.matrix_product(
            *(left.data_ptr(), right.data_ptr(), out.data_ptr(), size, *steps[0], *steps[1]),
            *(left_step[1] * right_step[1], relative + 2 * (score_scale is not None)),
            *(score_scale or 0.0, torch.get_num_threads()),
        )
        return out


class BlockedWeight(nn.Module):
    """int8 codes in the order that products.cpp reads. Geometry in pixels, (vertical, horizontal).

    Buffers: codes int8 (O / 16, kh kw * C / 4 * 16 * 4), filled up with zeros; sums int32 (O,)
    of an output's codes; scale float32 (O,).
    """

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, stride: list[int], padding: list[int]
    ):
        """codes int8 (O, C, kh, kw)."""
        super().__init__()
        outputs, channels, *kernel = codes.shape
        self.kernel, self.stride, self.padding = tuple(kernel), tuple(stride), tuple(padding)
        self.in_channels, self.pitch = channels, -(-channels // 4) * 4
        taps, blocks = kernel[0] * kernel[1], -(-outputs // 16)
        blocked = codes.new_zeros(blocks, taps, self.pitch // 4, 16, 4)
        for block, part in zip(blocked, codes.flatten(2).split(16), strict=True):  # little memory
            rows = F.pad(part.transpose(1, 2), (0, self.pitch - channels))  # (16, taps, pitch)
            block[:, :, : len(part)] = rows.unflatten(2, (-1, 4)).permute(1, 2, 0, 3)
        self.register_buffer("codes", blocked.flatten(1))
        self.register_buffer("sums", codes.flatten(1).sum(1, dtype=torch.int32))
        self.register_buffer("scale", scale)

    def empty_output(self, x: torch.Tensor) -> torch.Tensor:
        """For the input x (B, C, H, W) without its border."""
        size = [
            (x.shape[2 + i] + 2 * self.padding[i] - self.kernel[i]) // self.stride[i] + 1
            for i in range(2)
        ]
        shape = (len(x), len(self.scale), *size)
        return torch.empty(shape, memory_format=torch.channels_last)


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


def _targets(
    x: torch.Tensor, bits: int, border: tuple[int, int], pitch: int | None
) -> tuple[torch.Tensor, torch.Tensor | None, ctypes.Array]:
    """Empty codes, those of the high bytes, and the sizes that codes.cpp wants."""
    batch, channels, height, width = x.shape
    pitch = channels if pitch is None else pitch
    shape = (batch, pitch, height + 2 * border[0], width + 2 * border[1])
    out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    size = (ctypes.c_long * 7)(batch, height, width, channels, *border, pitch)
    return out, torch.empty_like(out) if bits > 8 else None, size


def _compile() -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise CompileError(f"no C++ compiler ({', '.join(COMPILERS)})")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "compiled.so"
        command = [compiler, *NATIVE, *EXACT, *LIBRARY, *map(str, SOURCES), "-o", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            line = next((line for line in lines if "error" in line), lines[-1])
            raise CompileError(f"{compiler}: {line[:200]}")
        try:
            return ctypes.CDLL(str(file))
        except OSError as error:
            raise CompileError(f"what {compiler} made cannot be loaded: {error}") from error
