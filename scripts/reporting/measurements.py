"""What only the networks can tell, measured once and kept in RUN/report-measurements.json.

States are those of fresh trajectories, which no calibration and no image has seen.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...models.checkpoint_files import CheckpointError
from ...quant.calibration.states import CalibrationStates
from ...quant.runtime.denoiser import QuantDenoiser, replace_module
from ...quant.runtime.quantizer import quantizers_of
from ..bench.full import FRESH_SEED_DOMAIN
from ..bench.measure import eps_errors
from ..bench.record import Record
from ..common.errors import ConfigError, RunError
from ..common.json_files import DamagedJsonError, check_type
from ..common.progress import ImageBar
from ..common.reports import LayersSection, Plain, StatesSection
from ..experiment.assembly import Assembly, assemble, source_digest
from ..experiment.config import Config, repository_path
from ..experiment.trajectories import record_states
from .run_folder import Run

FILE = "report-measurements.json"


@dataclass(frozen=True)
class Measured:
    """Values, or None and the reason why there are none."""

    values: Plain | None
    reason: str = ""


def measure(
    run: Run, device: torch.device, trajectories: int, states: int
) -> tuple[Measured, Measured, Measured]:
    """(eps errors, activation ranges, sensitivity of the layers) of a run.

    trajectories: for the first two; states: for the last. 0 measures nothing.
    """
    if run.metadata is None:
        return (Measured(None, f"{run.file.name} is not in the run folder."),) * 3
    if run.config is None:
        return (Measured(None, "without a configuration there is no network to run."),) * 3
    checkpoint, reason = _checkpoint(run.config, run.report or {})
    networks = Networks(run, device, max(trajectories, 1), reason == "")
    record = Record(run.folder / FILE)
    settings = {
        "quantized": run.metadata.get("digest"),
        "checkpoint": checkpoint,
        "sampler": vars(run.config.sampler),
        "seed": run.config.sampling.seed,
        "trajectories": max(trajectories, 1),
    }

    def made(name: str, count: int, more: Plain, make: Any) -> Measured:
        if count == 0:
            return Measured(None, "it was switched off on the command line.")
        try:
            values = record.section(name, settings | more, make)
        except (ConfigError, CheckpointError) as error:
            return Measured(None, f"the network cannot be built: {error}")
        check_values(name, values, run, reason == "")
        return Measured(values)

    of_states = made("states", trajectories, {}, networks.measure_states)
    eps = Measured(None, reason) if reason else of_states
    if reason:
        return eps, of_states, Measured(None, reason)
    more = {"states": states}
    return eps, of_states, made("layers", states, more, lambda: networks.measure_layers(states))


def check_values(name: str, values: Plain, run: Run, has_full: bool) -> None:
    """Raises RunError for a section of another shape than the run's network gives."""
    try:
        check_type(values, StatesSection if name == "states" else LayersSection, name)
    except DamagedJsonError as error:
        raise RunError(f"{run.folder / FILE}: damaged ({error}); delete it") from error
    fits = bool(values["timesteps"])
    if name == "states":
        errors = values["eps_mse_of_steps"]
        fits = fits and len(errors or ()) == (len(values["timesteps"]) if has_full else 0)
        timesteps = len(run.metadata["timesteps"])
        rows = sum(len(entry["inputs"]) for entry in run.metadata["layers"])
        for side in (values["low"], values["high"]):
            fits = fits and [len(row) for row in side] == [timesteps] * rows
    if not fits:
        raise RunError(f"{run.folder / FILE}: {name} does not fit the network; delete it")


def _checkpoint(config: Config, report: Plain) -> tuple[str | None, str]:
    """sha256 of the full-precision checkpoint, and why it cannot be used, if so."""
    name = config.model.checkpoint
    if name is None or not repository_path(name).exists():
        return None, f"the full-precision checkpoint ({name}) is not there."
    digest = source_digest(config)
    if report.get("sources", {}).get("checkpoint") not in (None, digest):
        return None, f"{name} is not the checkpoint that was calibrated (its sha256 differs)."
    return digest, ""


class Networks:
    """The networks of a run and their states, loaded and made when they are needed."""

    def __init__(self, run: Run, device: torch.device, trajectories: int, has_full: bool):
        sampling = run.config.sampling
        small = replace(sampling, micro_batch=min(sampling.micro_batch, trajectories))
        self.config = replace(run.config, sampling=small)
        self.run, self.device, self.has_full = run, device, has_full
        self.trajectories = trajectories

    @cached_property
    def full(self) -> Assembly:
        return assemble(self.config, device=self.device)

    @cached_property
    def quantized(self) -> Assembly:
        return assemble(self.config, self.run.file, device=self.device)

    def _record(self, assembly: Assembly) -> CalibrationStates:
        sampling = self.config.sampling
        total = -(-self.trajectories // sampling.micro_batch) * sampling.micro_batch
        with ImageBar(total, assembly.pipeline.calls_per_image, "fresh trajectories") as bar:
            return record_states(
                assembly.pipeline,
                assembly.denoiser,
                self.trajectories,
                FRESH_SEED_DOMAIN + sampling.seed,
                classes=sampling.classes,
                device=self.device,
                on_rows=bar.update,
            )

    @cached_property
    def states(self) -> CalibrationStates:
        return self._record(self.full)

    def _check(self, values: Iterable[float]) -> None:
        if not all(map(math.isfinite, values)):
            raise RunError(f"{self.run.file}: its network gives NaN or infinity; calibrate anew")

    def measure_states(self) -> Plain:
        """eps-MSE of each step and trajectory, ranges of each activation quantizer and timestep.

        Without full precision the states are those of the quantized sampler, and there is no
        error to tell.
        """
        model = self.quantized.denoiser
        with ranges_of(model) as (low, high):
            if self.has_full:
                states = self.states
                steps, trajectories = eps_errors(model, states, self.quantized.pipeline)
            else:
                states, steps, trajectories = self._record(self.quantized), None, None
        seen = torch.stack([low, high])
        self._check([*(steps or []), *seen[~seen.isnan()].tolist()])
        return {
            "timesteps": states.timesteps,
            "trajectories": states.trajectories // (2 if self.quantized.pipeline.guided else 1),
            "eps_mse_of_steps": steps,
            "eps_mse_of_trajectories": trajectories,
            "low": _plain(low),
            "high": _plain(high),
        }

    def measure_layers(self, states: int) -> Plain:
        """eps-MSE of the full-precision network with one layer after the other quantized."""
        steps, count = len(self.states.timesteps), self.states.trajectories
        chosen = torch.linspace(0, steps - 1, states).round().long()
        index = torch.stack([chosen, torch.arange(states) % count], dim=1)  # (states, 2)
        x, t, eps, conditioning = self.states.gather(index)
        quantized = self.quantized.denoiser
        host = QuantDenoiser(self.full.denoiser, quantized.context)

        def error(model: nn.Module) -> float:
            with torch.no_grad():
                return float((model(x, t, **conditioning) - eps).double().square().mean())

        alone = {}
        for entry in tqdm(self.run.metadata["layers"], desc="layer by layer", unit="layer"):
            name = entry["name"]
            original = host.denoiser.get_submodule(name)
            replace_module(host.denoiser, name, quantized.denoiser.get_submodule(name))
            alone[name] = error(host)
            replace_module(host.denoiser, name, original)
        self._check(alone.values())
        return {"timesteps": t.tolist(), "eps_mse": alone, "eps_mse_of_all": error(quantized)}


@contextmanager
def ranges_of(model: QuantDenoiser) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """While it is open, what the activation quantizers see: (low, high), each (L, S) for L
    quantizers in the file's order and S calibrated timesteps; NaN where nothing came."""
    quantizers = [module for _, module in quantizers_of(model)]
    shape = (len(quantizers), len(model.context.timesteps))
    low, high = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))

    row_of = {id(quantizer): row for row, quantizer in enumerate(quantizers)}

    def see(quantizer: nn.Module, x: torch.Tensor) -> None:
        row, column = row_of[id(quantizer)], model.context.index
        smallest, largest = (v.double().cpu() for v in torch.aminmax(x.detach()))
        low[row, column] = torch.fmin(low[row, column], smallest)
        high[row, column] = torch.fmax(high[row, column], largest)

    handles = [
        quantizer.register_forward_pre_hook(lambda module, args: see(module, args[0]))
        for quantizer in quantizers
    ]
    try:
        yield low, high
    finally:
        for handle in handles:
            handle.remove()


def _plain(values: torch.Tensor) -> list[list[float | None]]:
    """Nested lists for JSON, with None in place of NaN, which JSON does not have."""
    return [[None if v != v else float(f"{v:.5g}") for v in row] for row in values.tolist()]
