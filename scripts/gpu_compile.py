"""Compile the integer kernels for graphics cards without a card, and list their instructions.

    python scripts/gpu_compile.py                 # compute capabilities 8.0, 8.6 and 9.0
    python scripts/gpu_compile.py --targets 89 --out mix.json

Nothing is launched. The functions that launch the kernels are called with tensors without values,
so that what is compiled is what a card would run. Matrix instructions on integers are IMMA (8.x)
and IGMMA (9.0); LDL and STL move spilled registers; LDGSTS and UTMALDG copy to shared memory past
the registers. Without cuobjdump, which Triton brings along, the instructions are those of PTX.

Exit codes: 0 done, 1 a product without integer matrix instructions, 2 bad input.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.files import write_json
from tinydm.scripts.experiment.cli import make_parser, output_file

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from tinydm.quant.backends import triton_launch as kernels
except ImportError:
    triton = None

# Triton says in a page of its own what is wrong with others.
TARGETS = ("80", "86", "87", "89", "90", "100", "103", "120", "121")
INTEGER = re.compile(r"IMMA|IGMMA|mma.*\.s32\.s8")
SHOWN = re.compile(r"[IH]G?MMA|LDL|STL|LDGSTS|UTMALDG|mma|cp\.async")
NAMES = ("product_kernel", "codes_kernel", "group_statistics_kernel", "attention_kernel")


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target. instructions: how often each of SHOWN stands in it."""

    case: str
    kernel: str
    target: str
    seconds: float
    registers: int | None
    shared_bytes: int
    instructions: dict[str, int]

    @property
    def fails(self) -> bool:
        """A product that runs without integer matrix instructions."""
        multiplies = self.kernel in ("product_kernel", "attention_kernel")
        return multiplies and not any(INTEGER.search(name) for name in self.instructions)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["80", "86", "90"],
        choices=TARGETS,
        metavar="NN",
        help=f"compute capabilities, some of {' '.join(TARGETS)} (80 86 90)",
    )
    parser.add_argument("--out", type=output_file(".json"), metavar="FILE", help="the same as JSON")
    args = parser.parse_args(argv)
    if triton is None:
        raise ConfigError("gpu_compile.py: this PyTorch came without Triton")
    rows = []
    for i, text in enumerate(args.targets):
        for row in compiled_for(int(text), i):
            rows.append(row)
            print(line(row), flush=True)
    if args.out is not None:
        write_json(Path(args.out), [asdict(row) for row in rows])
    failed = [row for row in rows if row.fails]
    for row in failed:
        print(f"no integer matrix instructions: {row.case}, {row.target}")
    return 1 if failed else 0


def line(row: Compiled) -> str:
    mix = ", ".join(f"{name} {count}" for name, count in sorted(row.instructions.items()))
    registers = "?" if row.registers is None else row.registers
    return (
        f"{row.target} {row.case} ({row.kernel}): {row.seconds:.1f} s, {registers} registers, "
        f"{row.shared_bytes / 1024:.0f} KB shared; {mix or 'none of interest'}"
    )


def compiled_for(capability: int, device: int) -> list[Compiled]:
    """Every case for one target. device: a number of its own, under which Triton remembers."""
    rows: list[Compiled] = []
    driver.set_active(Target(capability, device))
    with noted(rows, f"sm_{capability}") as begin:
        for name, call in cases():
            begin(name)
            call()
    return rows


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of what the layers of CIFAR-10, LDM-4 and Stable Diffusion launch."""
    steps, wide = steps_of(1), steps_of(2)
    norm = nn.GroupNorm(32, 256, device="meta")
    half = torch.float16

    def convolution(c: int, o: int, k: int, size: int, packed: bool, dtype: torch.dtype) -> None:
        codes = meta(16, size + k - 1, size + k - 1, c, dtype=torch.int8)
        plus = meta(16, o, 1, 1)
        kernels.product(codes, weight(c, o, k, packed), steps, 0, dtype, meta(o), plus)

    x = meta(16, 256, 32, 32).contiguous(memory_format=torch.channels_last)
    yield "3x3, 256 to 256", lambda: convolution(256, 256, 3, 32, False, torch.float32)
    yield "3x3, 256 to 256, half", lambda: convolution(256, 256, 3, 32, False, half)
    yield "3x3, 960 to 960, small map", lambda: convolution(960, 960, 3, 8, False, torch.float32)
    yield "1x1, 256 to 256", lambda: convolution(256, 256, 1, 32, False, torch.float32)
    yield "1x1, 256 to 256, packed", lambda: convolution(256, 256, 1, 32, True, torch.float32)
    yield "3x3, 256 to 256, packed", lambda: convolution(256, 256, 3, 32, True, torch.float32)
    yield "codes", lambda: kernels.quantize_map(x, steps, border=(1, 1))
    yield "norm, SiLU, codes", lambda: kernels.quantize_map(x, steps, meta(256), (1, 1), norm)
    yield "norm, SiLU, 16-bit codes", lambda: kernels.quantize_map(x, wide, None, (1, 1), norm)
    queries, keys = meta(128, 1024, 64), meta(128, 64, 1024)
    scores, values = meta(128, 1024, 1024), meta(128, 1024, 64)
    pair = steps, steps
    yield "scores", lambda: kernels.attention_product(queries, keys, pair, torch.float32)
    for by_row in (False, True):
        yield (
            f"softmax, values{', by row' if by_row else ''}",
            lambda by_row=by_row: kernels.attention_product(
                scores, values, pair, torch.float32, 0.125, by_row
            ),
        )


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def steps_of(planes: int) -> "kernels.Steps":
    """A quantizer over 100 timesteps, with codes of 8 bits a plane."""
    integers = meta(1, dtype=torch.int32), meta(100, dtype=torch.int32)
    zeros = meta(planes, 100, dtype=torch.int32)
    return kernels.Steps(integers[0], meta(100), integers[1], integers[1], meta(planes, 100), zeros)


def weight(c: int, o: int, k: int, packed: bool) -> "kernels.Weight":
    codes = meta(o, k * k * c, dtype=torch.int8)
    zero = None
    if packed:
        codes = meta(o, k * k * c // 2, dtype=torch.uint8)
        zero = meta(o, dtype=torch.uint8)
    return kernels.Weight(codes, zero, meta(o, dtype=torch.int32), meta(o), (k, k))


class Target:
    """What Triton asks its driver for while it compiles."""

    def __init__(self, capability: int, device: int):
        self.capability, self.device = capability, device

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def noted(rows: list[Compiled], name: str) -> Iterator[Callable[[str], None]]:
    """Launches compile instead, and are appended to the rows. Yields what names the coming ones."""
    case = ""
    known = {kernel: getattr(kernels, kernel) for kernel in NAMES}

    class Launcher:
        def __init__(self, kernel: str):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                began = time.perf_counter()
                made = known[self.kernel].warmup(*args, grid=grid, **options)
                seconds = round(time.perf_counter() - began, 2)
                mix, registers = instructions(made.asm)
                shared = made.metadata.shared
                rows.append(Compiled(case, self.kernel, name, seconds, registers, shared, mix))

            return launch

    def begin(text: str) -> None:
        nonlocal case
        case = text

    try:
        for kernel in NAMES:
            setattr(kernels, kernel, Launcher(kernel))
        yield begin
    finally:
        for kernel, function in known.items():
            setattr(kernels, kernel, function)


def instructions(asm: dict[str, Any]) -> tuple[dict[str, int], int | None]:
    """How often the instructions of SHOWN occur, and the registers of a thread, if known."""
    tool = shutil.which("cuobjdump") or (
        Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    )
    if not Path(tool).exists():
        words = re.findall(r"^\s+(?:@%\w+ )?([\w.:]+)", asm["ptx"], re.MULTILINE)
        return counted(words), None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        texts = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        ]
    words = re.findall(r"/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", texts[0])
    registers = re.search(r"REG:(\d+)", texts[1])
    return counted(words), None if registers is None else int(registers[1])


def counted(words: list[str]) -> dict[str, int]:
    """How often each instruction of SHOWN occurs, by its first parts."""
    shown = (word for word in words if SHOWN.match(word))
    return dict(Counter(word if "mma" in word else ".".join(word.split(".")[:3]) for word in shown))


if __name__ == "__main__":
    run(main, again="the same command begins anew", less=None)
