"""Full precision, made once for all cells: its images, calibration states and fresh states.

full-<sampler>-<digest>/images/            the images that every cell is compared with
                        calibration-*.pt   states that cells are calibrated on
                        fresh-*.pt         other states, on which eps errors are measured
                        record.json        seconds, scores
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ...models.checkpoint_files import unreadable_now
from ...quant.calibration.states import CalibrationStates
from ..common.errors import RunError
from ..common.files import load_tensors, save_tensors
from ..experiment.assembly import Assembly, assemble
from ..experiment.calibration_run import CalibrationRun, make_states
from ..experiment.config import Config
from ..experiment.runs import claim, digest_of, missing_images
from ..experiment.sampling_run import SamplingRun, identity_of, make_images
from ..experiment.trajectories import record_states, trajectories_of
from .record import Record

FRESH_SEED_DOMAIN = (
    1 << 61
)  # added to the seed of the images: neither they nor calibration have this noise


def sample_images(
    config: Config, assembly: Assembly, folder: Path, backend: str | None, device: torch.device
) -> None:
    """The images that the folder lacks, as sample_diffusion.py makes them."""
    run = SamplingRun(config, assembly, folder, device, backend)
    claim(folder, run.identity)
    make_images(run, run.missing())


class FullPrecision:
    """Images and states of the full-precision model with one sampler.

    The checkpoint is read anew by each part that is not there yet.
    """

    def __init__(self, root: Path, config: Config, device: torch.device):
        self.config, self.device = config, device
        assembly = self.assembly()
        self.sources = assembly.sources
        self.calls = assembly.pipeline.timesteps
        self.guided = assembly.pipeline.guided
        self.parameters = sum(p.numel() for p in assembly.denoiser.parameters())
        self.identity = identity_of(config, assembly, None, device)
        self.digest = digest_of(self.identity)
        sampler = config.sampler
        self.folder = root / f"full-{sampler.name}-{sampler.steps}-{self.digest[:8]}"
        self.record = Record(self.folder / "record.json")

    def assembly(self) -> Assembly:
        return assemble(self.config, device=self.device)

    def images(self) -> Path:
        """The folder with at least sampling.count images."""
        folder = self.folder / "images"
        if missing_images(folder, self.config.sampling.count):
            sample_images(self.config, self.assembly(), folder, None, self.device)
        return folder

    def fresh_states(self, trajectories: int) -> CalibrationStates:
        sampling = self.config.sampling

        def make() -> CalibrationStates:
            assembly = self.assembly()
            return record_states(
                assembly.pipeline,
                assembly.denoiser,
                trajectories,
                FRESH_SEED_DOMAIN + sampling.seed,
                classes=sampling.classes,
                device=self.device,
            )

        return self._load_or_make(f"fresh-{trajectories}", make)[0]

    def trajectories(self, config: Config) -> int:
        """Number of trajectories that a cell of this configuration is calibrated on.

        Raises ConfigError.
        """
        size = config.sampling.micro_batch
        return trajectories_of(config.calibration, len(self.calls), self.guided, size)

    def calibration_states(self, config: Config) -> tuple[CalibrationStates, float]:
        """The states of a cell's configuration and the seconds that it took."""
        settings = config.calibration
        name = f"calibration-{self.trajectories(config)}-s{settings.seed}"
        return self._load_or_make(
            name,
            lambda: make_states(CalibrationRun(config, self.assembly(), self.folder, self.device)),
        )

    def _load_or_make(
        self, name: str, make: Callable[[], CalibrationStates]
    ) -> tuple[CalibrationStates, float]:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            began = time.perf_counter()
            states = make()
            seconds = time.perf_counter() - began
            save_tensors(path, {"states": vars(states), "seconds": seconds})
            return states, seconds
        try:
            saved = load_tensors(path)
        except Exception as error:  # torch has many exceptions for a damaged file
            if reason := unreadable_now(error, path):
                raise RunError(f"{path}: {reason}; it is kept") from error
            raise RunError(f"{path}: damaged; delete it") from error
        return CalibrationStates(**(saved["states"] | {"device": str(self.device)})), saved[
            "seconds"
        ]
