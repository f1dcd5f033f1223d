"""The integer products of cpp/ with every set of instructions: exact sums for any codes."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.integer_layers import compiled_with, context, psnr, small_unet
from tinydm.quant.backends.build import COMPILERS, instructions_here
from tinydm.quant.backends.native import Compiled
from tinydm.quant.backends.native_layers import CompiledLayer
from tinydm.quant.backends.prepared import BlockedWeight
from tinydm.quant.backends.selection import int8_supported, integer_module, to_int8
from tinydm.quant.core.affine import QuantizerStep
from tinydm.quant.core.operation import Operation
from tinydm.quant.runtime.layers import QuantLayer
from tinydm.quant.runtime.quantizer import ActivationQuantizer

REASON = int8_supported()
if not any(map(shutil.which, COMPILERS)):
    REASON = "no C++ compiler"
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"not here: {REASON}")
LAST = torch.channels_last


@pytest.fixture(scope="module", params=instructions_here())
def each(request: pytest.FixtureRequest) -> Compiled:
    """With each set of instructions that this processor has."""
    return compiled_with(request.param)


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def extremes(shape: tuple[int, ...], low: int, high: int) -> dict[str, torch.Tensor]:
    """int64 codes at the ends of their range, in ways that add up or cancel, and any codes."""
    alternating = torch.arange(torch.Size(shape).numel()).view(shape) % 2
    return {
        "lowest": torch.full(shape, low),
        "highest": torch.full(shape, high),
        "alternating": torch.where(alternating == 0, low, high),
        "ends": torch.where(torch.rand(shape) < 0.5, low, high),
        "any": torch.randint(low, high + 1, shape),
    }


def layer_of(
    layer: nn.Module, weight: torch.Tensor, bits: int, zero: int, act_bits: int, split: int = 0
) -> QuantLayer:
    """codes - zero = weight; all scales 1, and an activation's zero point of 5."""
    at, ones = context(), torch.ones(len(weight))
    at.set(torch.tensor([300]))
    codes = (weight + zero).view(layer.weight.shape).to(torch.uint8)
    five, groups = torch.tensor([5, 5]), torch.tensor([0, 1, 1, 0])
    inputs = [
        ActivationQuantizer(at, torch.ones(2), five, groups, act_bits)
        for _ in range(2 if split else 1)
    ]
    points = torch.full((len(weight),), zero, dtype=torch.uint8)
    return QuantLayer(Operation(layer), codes, ones, points, None, bits, inputs, split, None)


SHAPES = {  # outputs, channels, kernel, height, width, stride, padding
    "3x3 of odd sizes": (33, 5, (3, 3), 3, 13, 1, 1),
    "3x3 of two quads' rests": (17, 67, (3, 3), 5, 7, 1, 1),
    "one output": (1, 3, (3, 3), 4, 4, 1, 1),
    "many outputs": (70, 36, (3, 3), 2, 12, 1, 1),
    "rows of three tiles": (41, 64, (3, 3), 3, 35, 1, 1),
    "stride": (9, 20, (3, 3), 7, 8, 2, 0),
    "stride of two tiles": (33, 20, (3, 3), 7, 39, 2, 1),
    "5x3": (8, 12, (5, 3), 6, 5, 1, 2),
    "1x1": (24, 130, (1, 1), 3, 11, 1, 0),
}
WEIGHTS = {  # bits, zero point
    "W8": (8, 128),
    "W4": (4, 8),
    "W4, nothing negative": (4, 0),
    "W4, nothing positive": (4, 15),
    "W6": (6, 63),
    "W7": (7, 64),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_exact(each: Compiled, shape: str, kind: str):
    """Equal to sums in 64 bits, rounded once to float32."""
    outputs, channels, kernel, height, width, stride, padding = SHAPES[shape]
    bits, zero = WEIGHTS[kind]
    conv = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=False)
    inputs = extremes((2, channels, height, width), 0, 255)
    for weight in extremes(conv.weight.shape, -zero, 2**bits - 1 - zero).values():
        exact = integer_module(layer_of(conv, weight, bits, zero, 8), False, each)
        assert type(exact) is CompiledLayer
        for codes in inputs.values():
            x = (codes - 5).float()
            expected = F.conv2d(x.double(), weight.double(), None, stride, padding)
            assert torch.equal(exact(x.contiguous(memory_format=LAST)), expected.float())


@pytest.mark.parametrize("bits, zero", [(8, 128), (4, 8)])
def test_linear_and_split(each: Compiled, bits: int, zero: int):
    linear = nn.Linear(75, 19, bias=False)
    for weight in extremes(linear.weight.shape, -zero, 2**bits - 1 - zero).values():
        for split in (0, 31):
            exact = integer_module(layer_of(linear, weight, bits, zero, 8, split), False, each)
            for codes in extremes((3, 7, 75), 0, 255).values():
                x = (codes - 5).float()
                parts = (slice(0, split), slice(split, None))
                sums = [(x[..., p].double() @ weight[:, p].double().t()).float() for p in parts]
                assert torch.equal(exact(x), sums[0] + sums[1])


@pytest.mark.parametrize("bits, zero", [(8, 128), (4, 8)])
def test_sixteen_bits(each: Compiled, bits: int, zero: int):
    """Two maps of codes, of the low and the high bytes, whose sums add up in float32."""
    conv = nn.Conv2d(11, 20, 3, padding=1, bias=False)
    for weight in extremes(conv.weight.shape, -zero, 2**bits - 1 - zero).values():
        exact = integer_module(layer_of(conv, weight, bits, zero, 16), False, each)
        for codes in extremes((2, 11, 4, 19), 0, 65535).values():
            padded = F.pad(codes, (1, 1, 1, 1), value=5)
            low, high = (padded & 255) - 5, padded >> 8
            sums = [F.conv2d(v.double(), weight.double()).float() for v in (low, high)]
            given = exact((codes - 5).float().contiguous(memory_format=LAST))
            assert torch.equal(given, sums[1] * 256 + sums[0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "rows, inner, columns", [(7, 53, 37), (50, 3, 1), (2, 130, 16), (50, 64, 20)]
)
def test_attention(each: Compiled, rows: int, inner: int, columns: int, transposed: bool):
    steps = QuantizerStep(1.0, 1.0, -5, 250), QuantizerStep(1.0, 1.0, -128, 127)
    for left in extremes((2, rows, inner), -5, 250).values():
        for right in extremes((2, inner, columns), -128, 127).values():
            given = right.float()
            if transposed:
                given = given.transpose(1, 2).contiguous().transpose(1, 2)
            product = each.matrix_product(left.float(), given, lambda _: steps, 0, False)
            assert torch.equal(product, (left.double() @ right.double()).float())


@pytest.mark.parametrize(
    "value, depth", [(127, 0), (-128, 0), (65, 0), (64, 1), (-64, 1), (16, 4), (8, 8), (2, 30)]
)
def test_depth(value: int, depth: int):
    """How many groups of four products AVX2 may sum in 16 bits; 0: planes of 4 bits."""
    if "avx2" not in instructions_here():
        pytest.skip("no AVX2")
    compiled = Compiled("avx2")
    codes = torch.full((16, 120, 1, 1), value, dtype=torch.int8)
    weight = BlockedWeight(codes, torch.ones(16), [1, 1], [0, 0], compiled.depth)
    planes = weight.codes.view(1, -1, 30, 16, 4)
    assert planes.shape[1] == (1 if depth else 2)
    if depth:
        assert int(weight.depth) == depth
    else:
        high, low = planes.int()[0]
        assert (16 * high + low).eq(value).all() and low.abs().max() <= 8 and high.abs().max() <= 8
        assert int(weight.depth) >= 8


@pytest.mark.parametrize("bits, by_row", [(4, True), (8, False)])
def test_networks_are_the_same_bytes(bits: int, by_row: bool):
    """Whatever the instructions; and what fake quantization computes."""
    fake, outputs = small_unet(weight=bits, softmax_by_row=by_row), []
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=LAST)
    t = torch.full((4,), 500)
    for name in instructions_here():
        compiled = Compiled(name)  # with AVX512-VNNI where AMX is refused
        exact = to_int8(copy.deepcopy(fake), False, compiled).to(memory_format=LAST)
        outputs.append(exact(x, t))
    assert psnr(outputs[0], fake(x, t)) >= 47
    assert all(torch.equal(v, outputs[0]) for v in outputs)


REFUSED = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(int(sys.argv[2]))
system = ctypes.CDLL(None, use_errno=True)
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert system.sigaltstack(ctypes.byref(stack), None) == 0, ctypes.get_errno()
library = ctypes.CDLL(sys.argv[1])
library.instruction_set.restype = ctypes.c_char_p
print(library.instruction_set().decode())
"""


@pytest.mark.parametrize("stack, found", [(6144, "avx512-vnni"), (65536, "amx")])
def test_amx_refused_by_the_system(stack: int, found: str):
    """Linux refuses the tiles to a process whose stack for signals could not hold them."""
    if "amx" not in instructions_here():
        pytest.skip("this processor has no AMX")
    file = compiled_with("amx")._library._name
    command = [sys.executable, "-c", REFUSED, file, str(stack)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
