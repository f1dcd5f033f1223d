"""The variants whose speed is compared: one architecture with random weights, in many ways.

Values do not change the time of a dense kernel, so that no checkpoint is needed. Quantized variants
are packed into a file once and loaded from it, as a user would.
"""

import math
import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.checkpoint import sha256_of
from ...quant.backends.build import COMPILERS, instructions_here
from ...quant.backends.full_precision import to_fast_float
from ...quant.backends.graphs import Graphed
from ...quant.backends.native import Compiled
from ...quant.backends.selection import int8_supported
from ...quant.calibration.states import CalibrationStates
from ...quant.runtime.packed_file import load_quantized, to_bytes
from ..common.files import write_bytes
from ..common.memory import keep_freed_memory, resident
from ..experiment.assembly import assemble, empty_denoiser, load_denoiser, select_backend
from ..experiment.config import Config, resolved_yaml
from ..experiment.devices import wait_for
from ..experiment.precision import HALVES, PRECISIONS, in_precision
from ..experiment.precision import obstacle as lacks_precision
from ..experiment.trajectories import record_states
from . import peers
from .random_models import deployed_of, example_call, parameters_of, with_random_weights

Call = Callable[[], torch.Tensor]
CPU = torch.device("cpu")
PEER_BATCHES, PEER_ROWS = 20, 8  # calls, and images of a call, that peers calibrate with


@dataclass(frozen=True)
class Variant:
    """bits: of the weights of a quantized file, activations have 8; None: full precision."""

    label: str
    bits: int | None = None
    backend: str = "fake"
    compiled: bool = False  # by torch.compile; a quantized one, and float32, by --compile
    instructions: str | None = None  # of --compile, by default the processor's best
    peer: str | None = None  # another runtime, see peers.py; bits 8 are its own int8
    precision: str = PRECISIONS[0]  # of what is not quantized
    graph: bool = True  # CUDA graphs, of int8; of full precision where it is said


VARIANTS = {
    "fp32": Variant("fp32", graph=False),
    "fp32-compiled": Variant("fp32, --compile", backend="float32", compiled=True, graph=False),
    "compiled": Variant("fp32, torch.compile", compiled=True, graph=False),
    "tf32": Variant("TF32", precision="tf32", graph=False),
    "bf16": Variant("bf16", precision="bf16", graph=False),
    "fp16": Variant("fp16", precision="fp16", graph=False),
    "fp16-compiled": Variant("fp16, torch.compile", compiled=True, precision="fp16", graph=False),
    "fp32-graph": Variant("fp32, CUDA graph"),
    "tf32-graph": Variant("TF32, CUDA graph", precision="tf32"),
    "fp16-graph": Variant("fp16, CUDA graph", precision="fp16"),
    "fake-w8a8-tf32": Variant("fake W8A8, TF32", 8, precision="tf32"),
    "fake-w4a8-tf32": Variant("fake W4A8, TF32", 4, precision="tf32"),
    "int8-w8a8-fp16": Variant("int8 W8A8, fp16 between", 8, "int8", precision="fp16"),
    "int8-w8a8-launches": Variant("int8 W8A8, no graph", 8, "int8", graph=False),
    "fake-w8a8": Variant("fake W8A8", 8),
    "fake-w4a8": Variant("fake W4A8", 4),
    "int8-w8a8": Variant("int8 W8A8", 8, "int8"),
    "int8-w4a8": Variant("int8 W4A8", 4, "int8"),
    "int8-w8a8-compiled": Variant("int8 W8A8, --compile", 8, "int8", compiled=True),
    "int8-w4a8-compiled": Variant("int8 W4A8, --compile", 4, "int8", compiled=True),
    "avx512vnni-w8a8-compiled": Variant(
        "int8 W8A8, --compile, AVX512-VNNI", 8, "int8", True, instructions="avx512-vnni"
    ),
    "avx512vnni-w4a8-compiled": Variant(
        "int8 W4A8, --compile, AVX512-VNNI", 4, "int8", True, instructions="avx512-vnni"
    ),
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
GRAPHS = [VARIANTS[name] for name in VARIANTS if name.endswith(("-graph", "-launches"))]


PEER_VARIANTS = {
    f"{peer}-{kind}": Variant(f"{name} {kind}", bits, peer=peer)
    for peer, name in peers.PEERS.items()
    for kind, bits in (("fp32", None), ("int8", 8))
}


def obstacle(variant: Variant, device: torch.device = CPU) -> str | None:
    """Why this machine cannot run it, or None."""
    cuda = device.type == "cuda"
    if variant.peer is not None:
        return "runs on a CPU" if cuda else peers.missing(variant.peer, variant.bits is not None)
    if variant.compiled and not any(map(shutil.which, COMPILERS)):
        return "no C++ compiler"
    if not cuda and variant in GRAPHS:
        return "needs a CUDA device"
    if cuda and variant.compiled and (variant.bits is not None or variant.backend == "float32"):
        return "is for CPUs"
    reason = lacks_precision(variant.precision, device)
    if variant.backend == "int8" and variant.precision != PRECISIONS[0] and not cuda:
        return "needs a CUDA device"
    if reason is not None or variant.backend != "int8":
        return reason
    if cuda:
        return int8_supported(device)
    wanted = variant.instructions
    if wanted is not None and wanted not in instructions_here():
        return f"this CPU lacks the {wanted.upper()} instructions"
    return int8_supported()


class Models:
    """Builds the variants of one configuration on a device. folder: where quantized files are kept.

    quantized: a file of calibrate.py, whose configuration `config` is; without, all weights are
    random.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        quantized: Path | None = None,
        device: torch.device = CPU,
    ):
        self.config, self.folder, self.quantized = config, folder, quantized
        self.device = device
        self.digest = None if quantized is None else sha256_of(quantized)
        self._states: dict[int, CalibrationStates] = {}  # by seed

    def obstacle(self, variant: Variant) -> str | None:
        """Why this variant cannot run here, or None."""
        own = variant.bits is not None and variant.peer is None
        if self.quantized and own and variant.bits != self.config.quant.weight.bits:
            return f"--quantized has weights of {self.config.quant.weight.bits} bits"
        return obstacle(variant, self.device)

    def file(self, bits: int) -> Path:
        """The quantized file, made if it is not there."""
        if self.quantized is not None:
            return self.quantized
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
        """Size of the quantized file, or of a peer's; for full precision, of the float32
        parameters."""
        if variant.peer is not None:
            files = [self._peer_file(variant)]
            files += [path for path in [files[0].with_suffix(".bin")] if path.exists()]
            return sum(path.stat().st_size for path in files)
        if variant.bits is not None:
            return self.file(variant.bits).stat().st_size
        return (2 if variant.precision in HALVES else 4) * parameters_of(
            empty_denoiser(self.config)
        )

    def build(self, variant: Variant) -> nn.Module:
        if variant.peer is not None:
            return peers.PeerModel(variant.peer, self._peer_file(variant))
        model = empty_denoiser(self.config)
        if variant.bits is None and self.quantized is not None:
            load_denoiser(self.config, model)
        elif variant.bits is not None:
            compiled = Compiled(variant.instructions) if variant.compiled else None
            model = load_quantized(self.file(variant.bits), model)
            model = select_backend(model, variant.backend, self.device, compiled)
            if isinstance(getattr(model, "records", None), bool):  # of kernels for CUDA
                model.records = variant.graph
        else:
            generator = torch.Generator().manual_seed(0)
            for module in model.modules():
                if any(p.is_meta for p in module.parameters(recurse=False)):
                    with_random_weights(module, generator)
        model = model.eval().requires_grad_(False).to(self.device)
        model = model.to(memory_format=torch.channels_last)
        if variant.backend == "float32":
            model = to_fast_float(model, Compiled())
        elif variant.compiled and variant.bits is None:
            model = torch.compile(model)
        model = in_precision(model, variant.precision)
        return Graphed(model) if variant.graph and variant.bits is None else model

    def _peer_file(self, variant: Variant) -> Path:
        """The network in the peer's form, made if it is not there."""
        name = f"{self.config.name}{'' if self.quantized is None else '-trained'}"
        exported = self.folder / f"{name}.onnx"
        if not exported.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            peers.export(self.build(VARIANTS["fp32"]), self._calibration(1)[0], exported)
        if variant.bits is None:
            return exported
        suffix = "xml" if variant.peer == "openvino" else "onnx"
        path = self.folder / f"{name}-{variant.peer}-int8.{suffix}"
        if not path.exists():
            peers.quantize(variant.peer, exported, self._calibration(PEER_BATCHES), path)
        return path

    def _calibration(self, count: int) -> list[peers.Inputs]:
        """Inputs of so many calls: states of the sampler, or noise for random weights."""
        if self.quantized is not None:
            return [peers.named(x, t, given) for x, t, given, _ in self.states(count, seed=0)]
        x, _, given = example_call(self.config)
        generator = torch.Generator().manual_seed(1)
        found = []
        for i in range(count):
            noise = torch.randn(PEER_ROWS, *x.shape[1:], generator=generator)
            t = torch.full((PEER_ROWS,), i * self.config.schedule.train_timesteps // count)
            rest = {
                k: torch.zeros(PEER_ROWS, *v.shape[1:], dtype=v.dtype) for k, v in given.items()
            }
            found.append(peers.named(noise, t, rest))
        return found

    def states(self, count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor, dict, Any]]:
        """(x, t, conditioning, eps) of PEER_ROWS trajectories of the full-precision sampler, at
        `count` of its steps. Of the configuration's checkpoint."""
        if seed not in self._states:
            full = assemble(self.config)
            model, pipeline = full.denoiser, full.pipeline
            with torch.inference_mode():
                classes = self.config.sampling.classes
                made = record_states(pipeline, model, PEER_ROWS, seed, classes=classes)
            self._states[seed] = made
        made, rows = self._states[seed], torch.arange(PEER_ROWS)
        steps = torch.linspace(0, len(made.timesteps) - 1, count).round().long()
        found = [made.gather(torch.stack([rows.new_full(rows.shape, k), rows], 1)) for k in steps]
        return [(x, t, given, eps) for x, t, eps, given in found]

    def sqnr(self, model: nn.Module) -> float | None:
        """dB of eps against full precision over ten timesteps of fresh trajectories, pooled; None
        for random weights, whose error says nothing."""
        if self.quantized is None:
            return None
        signal = error = 0.0
        with torch.inference_mode():
            for x, t, given, eps in self.states(10, seed=1):
                signal += float(eps.double().square().sum())
                found = model(x.to(self.device), t, **_on(self.device, given)).cpu()
                error += float((found.double() - eps).square().sum())
        return 10 * math.log10(signal / error) if error else math.inf

    def call(self, model: nn.Module, batch: int) -> Call:
        """One denoiser call on `batch` random inputs of one timestep."""
        x, t, given = example_call(self.config)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, *x.shape[1:], generator=generator)
        x = x.contiguous(memory_format=torch.channels_last).to(self.device)
        t = torch.full((batch,), self.config.schedule.train_timesteps // 2)  # as a sampler's
        given = {
            k: torch.zeros(batch, *v.shape[1:], dtype=v.dtype, device=self.device)
            for k, v in given.items()
        }

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return model(x, t, **given)

        return run

    def first_call(self, variant: Variant, batch: int) -> dict[str, float | None]:
        """What a fresh process takes that loads the variant and calls it once, with one thread.

        Its memory in bytes before, at its peak and at the end; seconds to load, of that first call,
        and of CPU time.
        """
        if variant.bits is not None:
            self.file(variant.bits)  # is not part of it
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_first_call, (self, variant, batch))


def _on(device: torch.device, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in given.items()}


def _first_call(models: Models, variant: Variant, batch: int) -> dict[str, float | None]:
    keep_freed_memory()
    torch.set_num_threads(1)
    before = resident("VmRSS")
    began, used = time.perf_counter(), time.process_time()
    model = models.build(variant)
    loaded = time.perf_counter()
    models.call(model, batch)()
    wait_for(models.device)
    done = time.perf_counter()
    times = {"load": loaded - began, "first": done - loaded, "cpu": time.process_time() - used}
    return {"before": before, "peak": resident("VmHWM"), "after": resident("VmRSS"), **times}
