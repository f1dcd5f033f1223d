"""Integer execution in C++: the files of cpp/, compiled when asked.

codes.cpp makes uint8 codes in one pass, with the GroupNorm and SiLU before them if there are any;
products.cpp multiplies them with the best instructions of the processor (AMX, AVX512-VNNI, AVX-VNNI
or AVX2, see vectors.h and amx.h), and layer.cpp does both in one call. Needs a C++ compiler, see
build.py, and nothing of PyTorch's headers. Results are the same bytes with all of these
instructions; they equal those of onednn.py bit by bit where nothing but codes is made, up to float
rounding elsewhere.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from ..core.affine import QuantizerStep
from .build import CompileError, library
from .prepared import PartStep, PreparedFloatLayer, PreparedLayer

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int32
_STEP = [_FLOAT, _INT, _INT]  # 1 / scale, zero point, top
_ARGUMENTS = {
    "codes": [_POINTER, _LONG, *[_POINTER] * 4, *_STEP, _INT],
    "values": [
        *(_POINTER, _LONG, _POINTER, _POINTER, _LONG, ctypes.c_double),
        *(_INT, _POINTER, _POINTER, _INT),
    ],
    "copy_pixels": [*[_POINTER] * 3, _INT],
    "norm_silu_codes": [*[_POINTER] * 3, _LONG, ctypes.c_double, *[_POINTER] * 4, *_STEP, _INT],
}
_PRODUCTS = {
    "depth_of": [_POINTER, ctypes.c_int64, ctypes.c_int64],
    "layer": [
        *[_POINTER] * 3,
        *(_LONG, _POINTER, _POINTER, _LONG, ctypes.c_double),
        *(_POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT),
    ],
    "float_layer": [
        *(_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, ctypes.c_double),
        *(_POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT),
    ],
    "few_rows": [*[_POINTER] * 5, _INT],
    "softmax": [_POINTER, _LONG, _LONG, _FLOAT, _INT],
    "matrix_product": [*[_POINTER] * 4, *_STEP, *_STEP, _FLOAT, _INT, _FLOAT, _INT],
}
Planes = list[tuple[torch.Tensor, float, int]]  # uint8 codes, their scale and their zero point
# Arguments of a call that depend on the calibrated timestep: the position of the first, and all of
# them by the timestep's index.
Varying = tuple[int, Callable[[int], tuple[Any, ...]]]


class CallRecorder(Protocol):
    """What is told of the calls of compiled functions, see tapes.py."""

    def run(
        self, function: Callable, arguments: tuple, varying: Varying | None, keeps: Any
    ) -> None:
        """A function is about to run; keeps: what its arguments point to."""
        ...

    def give_up(self) -> None:
        """The caller goes on with numbers that no recording knows."""
        ...


class Compiled:
    """The compiled functions. Raises CompileError. A copy, or a pickle read again, loads them anew.

    instructions: a key of build.INSTRUCTIONS, by default the best one of this processor; afterwards
    the one in use, or "" on a processor that has none: "avx512-vnni" instead of "amx" where the
    compiler does not know AMX, or the operating system refuses it to this process. products:
    whether there is one. recorder: is told of each call, where there is one.
    """

    recorder: CallRecorder | None = None

    def __init__(self, instructions: str | None = None) -> None:
        self._wanted = instructions
        self._library = library(instructions)
        try:
            self._library.instruction_set.restype = ctypes.c_char_p
            self.instructions = self._library.instruction_set().decode()
            self.products = self.instructions != ""
            functions = _ARGUMENTS | (_PRODUCTS if self.products else {})
            for name, arguments in functions.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, None
            if self.products:
                self._library.depth_of.restype = ctypes.c_int64
        except AttributeError as error:
            raise CompileError(f"what the compiler made lacks a function: {error}") from error

    def __reduce__(self) -> tuple[type["Compiled"], tuple[str | None]]:
        return Compiled, (self._wanted,)

    def depth(self, blocked: torch.Tensor) -> int:
        """Groups of four inputs whose products may be summed in 16 bits; 0 if not even one, which
        planes of 4 bits mend. blocked: int8 (..., columns * C / 4, 16, 4), see BlockedWeight."""
        quads = blocked.shape[-3]
        return self._library.depth_of(blocked.data_ptr(), blocked.numel() // (64 * quads), quads)

    def _run(
        self,
        name: str,
        arguments: tuple[Any, ...],
        varying: Varying | None = None,
        keeps: Any = None,
    ) -> None:
        """Calls a function; of tensors it gets the address. keeps: what the arguments point to."""
        function = getattr(self._library, name)
        if self.recorder is not None:
            self.recorder.run(function, arguments, varying, keeps)
        function(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))

    def codes(
        self,
        x: torch.Tensor,
        factors: torch.Tensor,
        step: QuantizerStep,
        border: tuple[int, int] = (0, 0),
        pitch: int | None = None,
    ) -> Planes:
        """clamp(round(x * factors / scale) + zero_point, 0, top), with a border of zeros.

        x: float32 (B, C, H, W) of which `pixel_stride` is not None; factors float32 (C,). Codes are
        (B, pitch, H + 2 border[0], W + 2 border[1]), channels_last; those of channels beyond C are
        not set. More than 8 bits give two, of the low and the high byte: s (q - z) is their sum.
        """
        return self._make("codes", (x, pixel_stride(x)), x, factors, step, border, pitch)

    def norm_silu_codes(
        self,
        x: torch.Tensor,
        norm: nn.GroupNorm,
        factors: torch.Tensor,
        step: QuantizerStep,
        border: tuple[int, int] = (0, 0),
        pitch: int | None = None,
    ) -> Planes:
        """`codes` of silu(norm(x)). x: float32 (B, C, H, W) whose `pixel_stride` is C."""
        given = (x, *_of_norm(norm))
        return self._make("norm_silu_codes", given, x, factors, step, border, pitch)

    def group_norm(self, x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
        """norm(x), of which a sample depends neither on the batch nor on the threads. x as in
        `norm_silu_codes`."""
        out = torch.empty_like(x)
        batch, channels, height, width = x.shape
        size = (_LONG * 7)(batch, height, width, channels, 0, 0, channels)
        given = (x, channels, *_of_norm(norm), False, out, size, torch.get_num_threads())
        self._run("values", given)
        return out

    def copy_pixels(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """target.copy_(source). Both float32 (B, C, H, W) on the CPU, `have_pixels`."""
        batch, channels, height, width = source.shape
        steps = (*map(source.stride, (0, 2, 3)), *map(target.stride, (0, 2, 3)))
        size = (_LONG * 10)(batch, height, width, channels, *steps)
        self._run("copy_pixels", (source, target, size, torch.get_num_threads()))

    def _make(
        self,
        function: str,
        given: tuple[Any, ...],
        x: torch.Tensor,
        factors: torch.Tensor,
        step: QuantizerStep,
        border: tuple[int, int],
        pitch: int | None,
    ) -> Planes:
        """Codes by a function of codes.cpp; given: its first arguments, of the input."""
        scale, zero_point, top = step.scale, step.zero_point, step.top
        out, high, size = _targets(x, top > 255, border, pitch)
        if self.recorder is not None:
            self.recorder.give_up()  # the caller goes on with numbers of this timestep
        numbers = (step.inverse, zero_point, top, torch.get_num_threads())
        self._run(function, (*given, factors, out, high, size, *numbers))
        if high is None:
            return [(out, scale, zero_point)]
        return [(out, scale, zero_point & 255), (high, scale * 256, zero_point >> 8)]

    def layer(
        self,
        prepared: PreparedLayer,
        steps: "Callable[[int], ctypes.Array[PartStep]]",
        index: int,
        x: torch.Tensor,
        stride: int,
        norm: nn.GroupNorm | None,
        plus: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """out = the layer of x, or of silu(norm(x)), + plus, with the quantizers' steps(index).

        x: float32, `stride` values from one pixel to the next, all channels with a norm. out:
        float32, its channels beside each other. plus: a tensor like out, or (B, O, 1, 1) with its
        channels beside each other, and B of the output.
        """
        scratch = torch.empty(prepared.scratch, dtype=torch.uint8)
        given = (x, stride, *_of_norm(norm), *_of_plus(plus), out, scratch, torch.get_num_threads())
        varying = 1, lambda i: (steps(i),)
        self._run("layer", (prepared.address, steps(index), *given), varying, prepared)

    def float_layer(
        self,
        prepared: PreparedFloatLayer,
        x: torch.Tensor,
        stride: int,
        norm: nn.GroupNorm | None,
        plus: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """The same in float32."""
        scratch = torch.empty(prepared.scratch)
        given = (x, stride, *_of_norm(norm), *_of_plus(plus), out, scratch, torch.get_num_threads())
        self._run("float_layer", (prepared.address, *given), keeps=prepared)

    def few_rows(self, x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """linear(x), fast where x has few rows. All float32 on the CPU and contiguous."""
        out = torch.empty(*x.shape[:-1], linear.out_features)
        size = (_LONG * 3)(x.numel() // x.shape[-1], linear.in_features, linear.out_features)
        given = (x, linear.weight, linear.bias, out, size, torch.get_num_threads())
        self._run("few_rows", given)
        return out

    def softmax_(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """softmax(scale * x) over the last dimension, in place. x: contiguous float32."""
        count = x.shape[-1]
        rows = x.numel() // count
        self._run("softmax", (x, rows, count, scale, torch.get_num_threads()))
        return x

    def matrix_product(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        steps: Callable[[int], tuple[QuantizerStep, QuantizerStep]],
        index: int,
        relative: bool,
        score_scale: float | None = None,
    ) -> torch.Tensor:
        """(B, N, K) @ (B, K, M), the left and the right one quantized by steps(index) to at most 8
        bits, the right one to values that fit int8. relative: rows of the left one are divided by
        their largest value before, and the result's multiplied by it. score_scale: the left operand
        is softmax(left * score_scale)."""
        left, right = left.float(), right.float()
        if left.stride(2) != 1:
            left = left.contiguous()
        if 1 not in right.stride()[1:]:
            right = right.contiguous()
        out = torch.empty(*left.shape[:2], right.shape[2])
        strides = (*left.stride()[:2], *right.stride())
        size = (ctypes.c_long * 9)(*left.shape, right.shape[2], *strides)

        def numbers(i: int) -> tuple[float, ...]:
            first, second = steps(i)
            sides = (v for s in (first, second) for v in (s.inverse, s.zero_point, s.top))
            return (*sides, first.scale * second.scale)

        kind = relative + 2 * (score_scale is not None)
        rest = (kind, score_scale or 0.0, torch.get_num_threads())
        self._run("matrix_product", (left, right, out, size, *numbers(index), *rest), (4, numbers))
        return out


def _of_norm(
    norm: nn.GroupNorm | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int, float]:
    """A norm before a layer, as the compiled code takes it."""
    if norm is None:
        return None, None, 0, 0.0
    return norm.weight, norm.bias, norm.num_groups, norm.eps


def _of_plus(plus: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """What is added to a layer's output: values, and the steps from a sample and a pixel to the
    next."""
    if plus is None:
        return None, 0, 0
    return plus, plus.stride(0), 0 if plus.shape[2:] == (1, 1) else plus.shape[1]


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


def have_pixels(*maps: torch.Tensor) -> bool:
    """Whether these are float32 (B, C, H, W) on the CPU, in each of which a pixel's channels lie
    beside each other, wherever the pixels are."""
    return all(
        x.dim() == 4 and x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(1) == 1
        for x in maps
    )


def _targets(
    x: torch.Tensor, two: bool, border: tuple[int, int], pitch: int | None
) -> tuple[torch.Tensor, torch.Tensor | None, ctypes.Array]:
    """Empty codes, if two those of the high bytes, and the sizes that codes.cpp wants."""
    batch, channels, height, width = x.shape
    pitch = channels if pitch is None else pitch
    shape = (batch, pitch, height + 2 * border[0], width + 2 * border[1])
    out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    size = (ctypes.c_long * 7)(batch, height, width, channels, *border, pitch)
    return out, torch.empty_like(out) if two else None, size
