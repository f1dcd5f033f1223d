"""Images of a file in another runtime, beside those of the fake backend."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.errors import RunError
from ..common.progress import ImageBar
from ..experiment.assembly import Assembly
from ..experiment.config import Config
from ..experiment.counted import Counted
from ..experiment.sampling_run import pixels_of
from ..metrics.scores import psnr, squared_error
from .calls import LOWEST, MARGIN, Call, rounded_otherwise
from .runtimes import RUNTIMES, Inputs, not_installed, prepare


class InRuntime:
    """A file of ONNX, called like the denoiser that it holds and has all else of."""

    def __init__(self, runtime: str, path: Path, denoiser: Any):
        self.runtime, self.path, self.denoiser = runtime, path, denoiser
        self._compute: dict[int, Callable[[Inputs], np.ndarray]] = {}  # by the number of samples

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **named: Any) -> torch.Tensor:
        given = {name: value for name, value in sorted(named.items()) if value is not None}
        inputs = Call(x, t[:1], given, x).inputs()
        if len(x) not in self._compute:
            threads = torch.get_num_threads()
            self._compute[len(x)] = prepare(self.runtime, self.path, inputs, threads, True)
        return torch.from_numpy(self._compute[len(x)](inputs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)


class Images:
    """`count` images of a configuration: those of the fake backend, and of others against them."""

    def __init__(self, config: Config, assembly: Assembly, count: int):
        self.config, self.assembly, self.count = config, assembly, count
        self.expected = self._made_by(assembly.denoiser, "fake")

    def _made_by(self, denoiser: Any, title: str) -> np.ndarray:  # (count, H, W, C) uint8
        sampling, pipeline = self.config.sampling, self.assembly.pipeline
        parts = []
        with ImageBar(self.count, pipeline.calls_per_image, f"images, {title}") as bar:
            counted = Counted(denoiser, bar.update)
            for start in range(0, self.count, sampling.batch_size):
                indices = range(start, min(start + sampling.batch_size, self.count))
                x = pipeline.sample(counted, indices, sampling.seed, sampling.classes)
                parts.append(pixels_of(self.config, x))
        return np.concatenate(parts)

    def check(self, runtime: str, path: Path) -> str:
        """The line of a report. Raises RunError where the runtime's images are others."""
        absent = not_installed([runtime])
        if absent is not None:
            return f"{RUNTIMES[runtime]}: no images, {absent}"
        there = InRuntime(runtime, path, self.assembly.denoiser)
        found = self._decibels(self._made_by(there, RUNTIMES[runtime]))
        line = (
            f"{RUNTIMES[runtime]}: {self.count} images, {found:.1f} dB to those of the fake backend"
        )
        if found >= LOWEST:
            return line
        with rounded_otherwise(self.assembly.denoiser):
            own = self._decibels(self._made_by(self.assembly.denoiser, "fake, moved"))
        line += f"; float rounding alone moves those by {own:.1f} dB"
        if not found >= own - MARGIN:
            raise RunError(f"{path}: {line}; at least {min(LOWEST, own - MARGIN):.1f} are expected")
        return line

    def _decibels(self, images: np.ndarray) -> float:
        """The pooled PSNR."""
        return float(psnr(squared_error(images, self.expected)))
