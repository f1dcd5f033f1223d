"""Quantized denoisers from Python: `tinydm.load` and `tinydm.calibrate`.

pipe = StableDiffusionPipeline.from_pretrained("path/to/folder")
tinydm.calibrate(pipe, "quantized.safetensors", prompts=["a cat", "a dog"], steps=20)
pipe.unet = tinydm.load("quantized.safetensors")
image = pipe("a red fox").images[0]
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .models.architecture import built, describe
from .models.diffusers_denoiser import DiffusersDenoiser, LikeDiffusers
from .models.diffusers_loading import denoiser_of
from .models.diffusers_pipeline import DiffusersPipeline
from .quant.backends.native import Compiled
from .quant.backends.selection import int8_supported, to_int8
from .quant.calibration.calibrate import calibrate as calibrate_task
from .quant.calibration.distinct import enough_trajectories
from .quant.calibration.record import Recorder
from .quant.calibration.states import CalibrationStates, joined
from .quant.calibration.task import OnOutput, Task
from .quant.core.settings import FEWEST_BITS, MOST_BITS, CalibrationSettings, QuantSettings
from .quant.runtime.denoiser import QuantDenoiser
from .quant.runtime.packed_file import PackedFileError, load_quantized, read_metadata, to_bytes

# Samples images of these numbers with a denoiser called as (x, t, **named); the same each time.
Sample = Callable[[Callable[..., torch.Tensor], range], Any]


def load(
    path: str | Path,
    module: nn.Module | None = None,
    *,
    backend: str = "fake",
    compile: bool = False,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The quantized denoiser of a file, called like the original.

    One of diffusers takes (sample, timestep, ...) and gives what has `.sample`; the others take
    (x, t, ...) and give eps. Timesteps are a number, 0-d or (B,). module: the architecture where
    the file does not know it, a module of your own; it is changed in place, its weights are not
    used. backend: fake or int8; compile: faster int8. Raises PackedFileError, and
    ValueError for a backend that this machine cannot run.
    """
    if backend not in ("fake", "int8"):
        raise ValueError(f"backend must be fake or int8, got '{backend}'")
    if compile and backend == "fake":
        raise ValueError("compile=True: needs backend='int8'")
    text = read_metadata(path).get("denoiser")
    if module is None:
        if text is None:
            raise PackedFileError(f"{path}: does not say what its denoiser is; give module=")
        try:
            module = built(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PackedFileError(f"{path}: {error}") from error
    model = load_quantized(path, module)
    if backend != "fake":
        reason = int8_supported(device)
        if reason is not None:
            raise ValueError(f"backend {backend}: {reason}; use fake")
        model = to_int8(model, compiled=Compiled() if compile else None, device=device)
    return _like_the_original(model.to(device).to(memory_format=torch.channels_last))


def calibrate(
    model: Any,
    out: str | Path | None = None,
    *,
    sample: Sample | None = None,
    train_timesteps: int = 1000,
    steps: int = 50,
    guidance_scale: float | None = None,
    prompts: str | Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    batch_size: int = 4,
    weight_bits: int = 4,
    activation_bits: int = 8,
    settings: QuantSettings | None = None,
    calibration: CalibrationSettings | None = None,
) -> nn.Module:
    """Quantizes a pipeline's denoiser, or a module of your own, and returns what `load` gives.

    model: a pipeline of diffusers, whose own scheduler makes the trajectories with `steps`,
    `guidance_scale`, `prompts` and `classes`; or a module called as (x (B, C, H, W), t (B,),
    **named tensors), with `sample(denoiser, numbers)`, which samples images of these numbers with
    it. It stays in full precision. out: the file to write. settings, calibration: everything else;
    the bits count beside them. Raises ValueError for what cannot be quantized, naming it.
    """
    _check_arguments(out, batch_size, weight_bits, activation_bits)
    settings = QuantSettings() if settings is None else settings
    calibration = CalibrationSettings() if calibration is None else calibration
    settings = replace(
        settings,
        weight=replace(settings.weight, bits=weight_bits),
        activation=replace(settings.activation, bits=activation_bits),
    )
    if isinstance(model, nn.Module):
        if sample is None:
            raise ValueError("a module needs sample=, a function that samples with it")
        denoiser, limit = model, train_timesteps
        source: Any = _OwnSampler(sample)
    else:
        _, module = denoiser_of(model)
        denoiser = DiffusersDenoiser(module)
        more = {"guidance_scale": guidance_scale, "prompts": prompts, "device": module.device}
        pipeline = DiffusersPipeline(model, denoiser, steps, micro_batch=batch_size, **more)
        source, limit = _PipelineSampler(pipeline, classes), pipeline.train_timesteps
        if pipeline.uncorrected(settings.correction) is not None:
            settings = replace(settings, correction="none")
    device = str(next(denoiser.parameters()).device)
    first = source.states(denoiser, range(batch_size), device)
    total = calibration.trajectories
    if total is None:
        enough = enough_trajectories(calibration.samples, len(first.timesteps))
        total = -(-enough * batch_size // first.trajectories)  # guidance makes two of each
    blocks = range(batch_size, total, batch_size)
    more_states = [source.states(denoiser, range(i, i + batch_size), device) for i in blocks]
    states = joined([first, *more_states])
    importance = source.importance(len(states.timesteps))
    task = Task(denoiser, states, settings, calibration, limit, importance, source, _Bars())
    deployed, _ = calibrate_task(task)
    if out is not None:
        known = isinstance(denoiser, DiffusersDenoiser)
        about = {"denoiser": json.dumps(describe("", {}, denoiser))} if known else {}
        _write(Path(out), to_bytes(deployed, about | {"method": settings.method}))
    return _like_the_original(deployed)


def _check_arguments(
    out: str | Path | None, batch_size: int, weight_bits: int, activation_bits: int
) -> None:
    """Raises ValueError, before anything is computed, for what would fail or be wrong later."""
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if bits not in range(FEWEST_BITS, MOST_BITS + 1):
            raise ValueError(f"{name} must be within {FEWEST_BITS}..{MOST_BITS}, is {bits}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, is {batch_size}")
    if out is not None and (Path(out).is_dir() or not Path(out).parent.is_dir()):
        raise ValueError(f"out: {out} must be a file in a folder that is there")


def _like_the_original(model: QuantDenoiser) -> nn.Module:
    inner = model.denoiser
    return LikeDiffusers(inner.model, model) if isinstance(inner, DiffusersDenoiser) else model


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


FRESH = 1 << 24  # numbers of images that calibration states never hold


@dataclass
class _OwnSampler:
    """quant.calibration.task.Sampler of a user's function."""

    sample: Sample

    @torch.no_grad()
    def states(self, denoiser: nn.Module, numbers: range, device: str) -> CalibrationStates:
        recorder = Recorder(denoiser)
        self.sample(recorder, numbers)
        return recorder.states(1, device)

    def importance(self, steps: int) -> torch.Tensor:
        return torch.ones(steps)

    @torch.no_grad()
    def run(self, model: nn.Module, on_output: OnOutput, count: int) -> None:
        def observed(x: torch.Tensor, t: torch.Tensor, **named: Any) -> torch.Tensor:
            rows = torch.as_tensor(t, device=x.device).reshape(-1).expand(len(x))
            return on_output(x, rows, model(x, t, **named))

        self.sample(observed, range(FRESH, FRESH + count))


@dataclass
class _PipelineSampler:
    """quant.calibration.task.Sampler of a pipeline of diffusers."""

    pipeline: DiffusersPipeline
    classes: Sequence[int] | None
    seed: int = 1 << 62  # not that of images that somebody samples

    def states(self, denoiser: nn.Module, numbers: range, device: str) -> CalibrationStates:
        recorder = Recorder(denoiser)
        self.pipeline.latents(recorder, numbers, self.seed, self.classes)
        return recorder.states(2 if self.pipeline.guided else 1, device)

    def importance(self, steps: int) -> torch.Tensor:
        return torch.from_numpy(self.pipeline.step_importance()).float()

    def run(self, model: nn.Module, on_output: OnOutput, count: int) -> None:
        numbers = range(FRESH, FRESH + count)
        self.pipeline.latents(model, numbers, self.seed, self.classes, on_output=on_output)


class _Bars:
    """quant.calibration.task.Progress: one bar a phase."""

    def begin(self, phase: str, total: int) -> None:
        self.bar = tqdm(total=total, desc=f"{phase:20}", mininterval=1, leave=False)

    def step(self, text: str) -> None:
        self.bar.update()

    def end(self) -> None:
        self.bar.close()
