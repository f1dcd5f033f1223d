"""The variants whose speed is compared: one architecture with random weights, in many ways.

Values do not change the time of a dense kernel, so that no checkpoint is needed. Quantized variants
are packed into a file once and loaded from it, as a user would.
"""

import contextlib
import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ...quant.backends.build import COMPILERS, instructions_here
from ...quant.backends.native import Compiled
from ...quant.backends.selection import int8_supported
from ...quant.runtime.packed_file import load_quantized, to_bytes
from ..common.files import write_bytes
from ..common.memory import keep_freed_memory
from ..experiment.assembly import empty_denoiser, select_backend
from ..experiment.config import Config, resolved_yaml
from .random_models import deployed_of, example_call, parameters_of, with_random_weights

Call = Callable[[], torch.Tensor]
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Variant:
    """bits: of the weights of a quantized file, activations have 8; None: full precision."""

    label: str
    bits: int | None = None
    backend: str = "fake"
    compiled: bool = False  # by torch.compile; a quantized one by --compile
    instructions: str | None = None  # of --compile, by default the processor's best
    half: bool = False  # bfloat16 where autocast allows it


VARIANTS = {
    "fp32": Variant("fp32"),
    "compiled": Variant("fp32, torch.compile", compiled=True),
    "bf16": Variant("bf16 (autocast)", half=True),
    "fake-w8a8": Variant("fake W8A8", 8),
    "fake-w4a8": Variant("fake W4A8", 4),
    "int8-w8a8": Variant("int8 W8A8", 8, "int8"),
    "int8-w4a8": Variant("int8 W4A8", 4, "int8"),
    "int8-w8a8-compiled": Variant("int8 W8A8, --compile", 8, "int8", compiled=True),
    "int8-w4a8-compiled": Variant("int8 W4A8, --compile", 4, "int8", compiled=True),
    "avxvnni-w8a8-compiled": Variant(
        "int8 W8A8, --compile, AVX-VNNI", 8, "int8", True, instructions="avx-vnni"
    ),
    "avxvnni-w4a8-compiled": Variant(
        "int8 W4A8, --compile, AVX-VNNI", 4, "int8", True, instructions="avx-vnni"
    ),
    "avx2-w8a8-compiled": Variant(
        "int8 W8A8, --compile, AVX2", 8, "int8", True, instructions="avx2"
    ),
    "avx2-w4a8-compiled": Variant(
        "int8 W4A8, --compile, AVX2", 4, "int8", True, instructions="avx2"
    ),
}


def obstacle(variant: Variant) -> str | None:
    """Why this machine cannot run it, or None."""
    if variant.compiled and not any(map(shutil.which, COMPILERS)):
        return "no C++ compiler"
    if variant.backend == "fake":
        return None
    wanted = variant.instructions
    if wanted is not None and wanted not in instructions_here():
        return f"this CPU lacks the {wanted.upper()} instructions"
    return int8_supported()


class Models:
    """Builds the variants of one configuration. folder: where quantized files are kept."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder

    def file(self, bits: int) -> Path:
        """The quantized file, made if it is not there."""
        path = self.folder / f"{self.config.name}-w{bits}a8.safetensors"
        if not path.exists():
            quant = self.config.quant
            activation = replace(quant.activation, bits=8)
            settings = replace(
                quant, weight=replace(quant.weight, bits=bits), activation=activation
            )
            text = {"config": resolved_yaml(self.config)}
            write_bytes(path, to_bytes(deployed_of(self.config, settings), text))
        return path

    def bytes(self, variant: Variant) -> int:
        """Size of the quantized file; for full precision, of the float32 parameters."""
        if variant.bits is not None:
            return self.file(variant.bits).stat().st_size
        return (2 if variant.half else 4) * parameters_of(empty_denoiser(self.config))

    def build(self, variant: Variant) -> nn.Module:
        model = empty_denoiser(self.config)
        if variant.bits is not None:
            compiled = Compiled(variant.instructions) if variant.compiled else None
            model = load_quantized(self.file(variant.bits), model)
            model = select_backend(model, variant.backend, compiled=compiled)
        else:
            generator = torch.Generator().manual_seed(0)
            for module in model.modules():
                if any(p.is_meta for p in module.parameters(recurse=False)):
                    with_random_weights(module, generator)
        model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        return torch.compile(model) if variant.compiled and variant.bits is None else model

    def call(self, variant: Variant, model: nn.Module, batch: int) -> Call:
        """One denoiser call on `batch` random inputs of one timestep."""
        x, t, given = example_call(self.config)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, *x.shape[1:], generator=generator)
        x = x.contiguous(memory_format=torch.channels_last)
        t = torch.full((batch,), self.config.schedule.train_timesteps // 2)
        given = {k: torch.zeros(batch, *v.shape[1:], dtype=v.dtype) for k, v in given.items()}

        def run() -> torch.Tensor:
            half = torch.autocast("cpu", torch.bfloat16) if variant.half else None
            with torch.inference_mode(), half or contextlib.nullcontext():
                return model(x, t, **given)

        return run

    def first_call(self, variant: Variant, batch: int) -> dict[str, float | None]:
        """Of a fresh process that loads the variant and calls it once, with one thread: its memory
        in bytes before, at its peak and at the end; seconds to load, of that first call, and of CPU
        time."""
        if variant.bits is not None:
            self.file(variant.bits)  # is not part of it
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_first_call, (self, variant, batch))


def _first_call(models: Models, variant: Variant, batch: int) -> dict[str, float | None]:
    keep_freed_memory()
    torch.set_num_threads(1)
    before = resident("VmRSS")
    began, used = time.perf_counter(), time.process_time()
    model = models.build(variant)
    loaded = time.perf_counter()
    models.call(variant, model, batch)()
    done = time.perf_counter()
    times = {"load": loaded - began, "first": done - loaded, "cpu": time.process_time() - used}
    return {"before": before, "peak": resident("VmHWM"), "after": resident("VmRSS"), **times}


def resident(kind: str) -> float | None:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM); None where the system
    does not say."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{kind}:")]
    return 1024.0 * int(found[0]) if found else None
