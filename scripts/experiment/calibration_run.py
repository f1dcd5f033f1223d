"""A calibration run: from a configuration to the quantized file and its reports in a run folder."""

import copy
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.architecture import describe
from ...models.protocols import roles_of
from ...quant.calibration.calibrate import calibrate
from ...quant.calibration.coverage import LayerRow, count_macs, format_table, layer_rows, shares
from ...quant.calibration.finite import DivergenceError
from ...quant.calibration.parking import is_large
from ...quant.calibration.phases.correct import correct
from ...quant.calibration.run_state import RunState
from ...quant.calibration.states import CalibrationStates
from ...quant.calibration.task import OnOutput, Task
from ...quant.core.settings import QuantSettings
from ...quant.runtime.denoiser import QuantDenoiser
from ...quant.runtime.packed_file import (
    PackedFileError,
    load_quantized,
    read_tensors,
    to_bytes,
)
from ..common.errors import ConfigError, RunError
from ..common.files import regular, remove_stale, write_bytes, write_json, write_text
from ..common.memory import return_freed_memory, return_large_blocks
from ..common.progress import Bar, ImageBar
from ..common.schema import printable
from .assembly import Assembly, bundled, no_picture
from .config import OF_THE_USER, Config, keep_written, resolved_yaml
from .devices import device_name, forget_peak, peak_memory
from .processes import ALONE, Team
from .resume import STATE, advice, identity_of, load_state, save_state
from .trajectories import (
    FIRST_FRESH_TRAJECTORY,
    SEED_DOMAIN,
    record_states,
    shared_states,
    trajectories_of,
)

RESULT, CONFIG, LOCK = "quantized.safetensors", "config.yaml", ".lock"
REPORT, LAYERS, LOG = "report.json", "layers.txt", "log.txt"


class Bars:
    """Progress bars, one a phase. peaks: phase -> bytes that it took on the device at most, of a
    device that is not the CPU."""

    def __init__(self, device: torch.device, shown: bool = True) -> None:
        self.device, self.shown, self.peaks = device, shown, dict[str, int]()
        self.bar: Bar | None = None

    def begin(self, phase: str, total: int) -> None:
        self.phase = phase
        forget_peak(self.device)
        self.bar = Bar(total=total, desc=f"{phase:20}", mininterval=1, disable=not self.shown)

    def step(self, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def end(self) -> None:
        self.bar.close()
        peak = peak_memory(self.device)
        if peak is not None:
            self.peaks[self.phase] = peak
        return_freed_memory()  # phases want blocks of other sizes

    def close(self) -> None:
        """Ends the bar of a phase that failed, so that what is printed next begins a line."""
        if self.bar is not None:
            self.bar.close()


@dataclass(frozen=True)
class CalibrationRun:
    """Everything that a calibration run is made of: model, run folder, device, processes.

    assembly: full precision, of the same configuration. team: processes that calibrate together.
    """

    config: Config
    assembly: Assembly
    folder: Path
    device: torch.device
    team: Team = ALONE

    @property
    def identity(self) -> str:
        """Digest of everything that the result depends on."""
        return identity_of(self.config, self.assembly.sources)

    @property
    def trajectories(self) -> int:
        """Images whose trajectories are made. Raises ConfigError where they are too few."""
        pipeline, config = self.assembly.pipeline, self.config
        size = config.sampling.micro_batch
        return trajectories_of(config.calibration, len(pipeline.timesteps), pipeline.guided, size)

    def settings(self) -> QuantSettings:
        """Those of the configuration, without a correction where the sampler has no use for it."""
        quant = self.config.quant
        if self.assembly.pipeline.uncorrected(quant.correction) is None:
            return quant
        return replace(quant, correction="none")

    def run(self, model: nn.Module, on_output: OnOutput, count: int) -> None:
        """See quant.calibration.task.Sampler."""
        self.assembly.pipeline.latents(
            model,
            range(FIRST_FRESH_TRAJECTORY, FIRST_FRESH_TRAJECTORY + count),
            SEED_DOMAIN + self.config.calibration.seed,
            self.config.sampling.classes,
            device=self.device,
            on_output=on_output,
        )


def is_done(run: CalibrationRun) -> bool:
    """True if the folder holds this run's result. Raises RunError for another run's, and
    PackedFileError for one that is damaged."""
    if not (run.folder / RESULT).exists():
        return False
    report, asked = report_there(run.folder) or {}, device_name(run.device)
    ways = "--overwrite calibrates anew, --out names another folder"
    # First: the sizes of batches differ as well where they follow from the device.
    if (made := report.get("device", asked)) != asked:  # reports of before have none
        raise RunError(
            f"{run.folder / RESULT}: was made on another device, {printable(made)}; this one is "
            f"{asked}: choose with --device; {ways}"
        )
    if report.get("identity") != run.identity:
        raise RunError(
            f"{run.folder / RESULT}: was made from another configuration or checkpoint; {ways}"
        )
    try:
        read_tensors(run.folder / RESULT)
    except PackedFileError as error:
        raise PackedFileError(f"{error} (--overwrite calibrates anew)") from error
    return True


def report_there(folder: Path) -> dict[str, Any] | None:
    """The report of the run in a folder; None where there is none that has an identity."""
    try:
        report = json.loads(regular(folder / REPORT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and report.get("identity") is not None else None


def check_files(run: CalibrationRun, source: str | None, overwrite: bool) -> None:
    """Raises ConfigError where the run would replace files of the user's in its folder."""
    folder = run.folder
    ours = overwrite or (folder / STATE).exists() or report_there(folder) is not None
    keep_written(folder / CONFIG, run.config, source, ours)
    others = [folder / name for name in (REPORT, LAYERS, LOG) if (folder / name).exists()]
    if others and not ours:
        raise ConfigError(f"{others[0]}: {OF_THE_USER}")


def make_states(run: CalibrationRun) -> CalibrationStates:
    """The trajectories, which all ranks make together."""
    config = run.config
    total = run.trajectories
    size = config.sampling.micro_batch
    title, whole = f"{'trajectories':20}", -(-total // size) * size
    calls = run.assembly.pipeline.calls_per_image
    with ImageBar(whole, calls, title, disable=run.team.rank != 0) as bar:
        return record_states(
            run.assembly.pipeline,
            run.assembly.denoiser,
            total,
            config.calibration.seed,
            classes=config.sampling.classes,
            device=run.device,
            on_rows=bar.update,
            team=run.team,
        )


def step_importance(assembly: Assembly, states: CalibrationStates) -> torch.Tensor:
    """Weight of an eps error at each sampling step, (K,) float32.

    PLMS calls twice in its first step; both calls get the weight of that step.
    """
    values = assembly.pipeline.step_importance().tolist()
    values = values[:1] * (len(states.timesteps) - len(values)) + values
    return torch.tensor(values)


def help_calibrate(run: CalibrationRun) -> None:
    """The part of the ranks above 0 while rank 0 is in calibrate_run, whose files and bars are
    those of the job."""
    # The two answers that rank 0 gives in calibrate_run, in its order.
    states_wanted, wanted = run.team.broadcast(False), run.team.broadcast(False)
    if not wanted:
        return
    states = make_states(run) if states_wanted else shared_states(run.team, None, run.device)
    with closing(Bars(run.device, shown=False)) as bars:
        _calibrate(run, states, bars, RunState())


def _calibrate(
    run: CalibrationRun,
    states: CalibrationStates,
    bars: Bars,
    state: RunState,
    save: Callable[[RunState], None] = lambda state: None,
) -> tuple[QuantDenoiser, dict[str, Any]]:
    """See quant.calibration.calibrate. Raises RunError where it diverges."""
    if is_large(run.assembly.denoiser):
        return_large_blocks()
    task = Task(
        run.assembly.denoiser,
        states,
        run.settings(),
        run.config.calibration,
        run.assembly.pipeline.train_timesteps,
        step_importance(run.assembly, states),
        sampler=run,
        progress=bars,
        state=state,
        save=save,
        team=run.team,
    )
    try:
        return calibrate(task)
    except DivergenceError as error:
        raise RunError(advice(error, state, run.config)) from error


def calibrate_run(
    run: CalibrationRun,
    *,
    resume: bool = False,
    overwrite: bool = False,
    states: CalibrationStates | None = None,
) -> list[str] | None:
    """Calibrate into run.folder and return the lines of its log; None if it is done already.

    states: what make_states gives, if it is there already; the reported seconds are then those
    after it. Raises RunError, ConfigError.
    """
    config, assembly, folder, team = run.config, run.assembly, run.folder, run.team
    began = time.perf_counter()
    temporal = roles_of(assembly.denoiser).timestep_only
    if config.quant.time_embedding == "reconstructed" and not temporal:
        raise ConfigError(
            f"quant.time_embedding: {config.name} has no layer that depends on the timestep alone "
            "to be reconstructed; use quantized"
        )
    _ = run.trajectories  # a mistake is told before the work
    if run.settings() != config.quant:
        why = assembly.pipeline.uncorrected(config.quant.correction)
        print(f"note: no correction of the output: {why}", flush=True)
    if (why := no_picture(assembly)) is not None:
        print(f"note: {why}: sample_diffusion.py will make none, tinydm.load works", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    if overwrite:  # at once: killed from here on, --resume continues the new run
        for name in (RESULT, STATE):
            (folder / name).unlink(missing_ok=True)
    done = is_done(run)
    saved = None if done else load_state(folder, config, assembly.sources, resume, run.device)
    wanted = team.broadcast(not done and saved is None and states is None)
    team.broadcast(not done)
    if done:
        (folder / STATE).unlink(missing_ok=True)  # of a run killed just before it did so
        return None
    write_text(folder / CONFIG, resolved_yaml(config))
    state = RunState()

    def save(state: RunState) -> None:
        save_state(folder, config, assembly.sources, state, states)

    if saved is not None:
        state, states = saved
        shared_states(team, states, run.device)
        print(f"resumed after: {', '.join(['trajectories', *state.done])}")
    elif wanted:
        states = make_states(run)
        save(state)
    else:
        states = shared_states(team, states, run.device)
    with closing(Bars(run.device)) as bars:
        deployed, phases = _calibrate(run, states, bars, state, save)
    if phases.get("correction", {}).get("kept") is False:
        print("note: no correction of the output: it leads the sampler further away", flush=True)
    lines = write_result(run, states, Outcome(deployed, phases, began, bars.peaks))
    (folder / STATE).unlink(missing_ok=True)
    return lines


def correct_run(run: CalibrationRun, base: Path, states: CalibrationStates) -> list[str]:
    """Makes a run out of the finished one in the folder `base`, whose method has no correction of
    the output and differs in nothing else (PTQD and Q-Diffusion): only the correction is fitted.

    The reported seconds count those of the base.
    """
    config, assembly = run.config, run.assembly
    report = json.loads(regular(base / REPORT).read_text(encoding="utf-8"))
    began = time.perf_counter() - report["seconds"]
    phases = report["phases"]
    model = load_quantized(base / RESULT, copy.deepcopy(assembly.denoiser))
    model = model.to(states.device).to(memory_format=torch.channels_last)
    with closing(Bars(run.device)) as bars:
        started = time.perf_counter()
        kind, denoiser = config.quant.correction, assembly.denoiser
        fitted = correct(kind, model, denoiser, run, states, bars)
        phases["correction"] = fitted | {"seconds": round(time.perf_counter() - started, 2)}
    run.folder.mkdir(parents=True, exist_ok=True)
    return write_result(run, states, Outcome(model, phases, began, bars.peaks))


@dataclass(frozen=True)
class Outcome:
    """A deployed model, the reports of the phases, when the run began (perf_counter), and what the
    phases took on the device (Bars.peaks)."""

    model: nn.Module
    phases: dict[str, Any]
    began: float
    peaks: dict[str, int]


def write_result(run: CalibrationRun, states: CalibrationStates, outcome: Outcome) -> list[str]:
    """The reports, then the quantized file, by which the run is done; the lines of the log."""
    assembly, config = run.assembly, run.config
    roles = roles_of(assembly.denoiser)
    x, t, _, conditioning = states.gather(torch.zeros(1, 2, dtype=torch.long))
    macs = count_macs(assembly.denoiser, tuple(roles.matmuls), (x, t, conditioning))
    rows = layer_rows(assembly.denoiser, outcome.model, roles, macs)
    beside = bundled(config, assembly.pipeline)
    data = to_bytes(
        outcome.model,
        {
            "config": resolved_yaml(with_scale_factor(config, assembly)),
            "denoiser": json.dumps(
                describe(config.model.arch, config.model.params, assembly.denoiser)
            ),
            "method": config.quant.method,
            "source_sha256": ",".join(assembly.sources.values()),
            "torch": torch.__version__,
        },
        beside,
    )
    write_text(run.folder / CONFIG, resolved_yaml(config))
    lines = write_report(run, outcome, rows, len(data), sum(v.nbytes for v in beside.values()))
    write_bytes(run.folder / RESULT, data)
    return lines


def with_scale_factor(config: Config, assembly: Assembly) -> Config:
    """The configuration with the scale factor of the latents that was found in the checkpoint,
    which sampling from the quantized file does not read any more."""
    if config.model.first_stage is None or config.model.scale_factor is not None:
        return config
    scale_factor = assembly.pipeline.scale_factor
    return replace(config, model=replace(config.model, scale_factor=scale_factor))


def write_report(
    run: CalibrationRun, outcome: Outcome, rows: list[LayerRow], whole: int, beside: int
) -> list[str]:
    """report.json, layers.txt and log.txt, whose lines are returned. whole: bytes of the file;
    beside: those of other parts than the denoiser, which count for no size but the file's."""
    config, folder, size = run.config, run.folder, whole - beside
    seconds = time.perf_counter() - outcome.began
    table, share = format_table(rows), shares(rows)
    parameters = sum(p.numel() for p in run.assembly.denoiser.parameters())
    summary = {
        "name": config.name,
        "method": config.quant.method,
        "weight_bits": config.quant.weight.bits,
        "activation_bits": config.quant.activation.bits,
        "bytes": size,
        "file_bytes": whole,
        "size_mb": size / 2**20,
        "float32_mb": parameters * 4 / 2**20,
        "ratio_to_float32": size / (parameters * 4),
        **share,
        "seconds": round(seconds, 2),
        "seed": config.calibration.seed,
        "device": device_name(run.device),
        "peak_device_bytes": outcome.peaks or None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "sources": run.assembly.sources,
        "identity": run.identity,
        "phases": outcome.phases,
        "layers": [dataclasses.asdict(r) for r in rows],
    }
    write_json(folder / REPORT, summary)
    write_text(folder / LAYERS, table + "\n")
    lines = [
        table,
        f"weights quantized: {share['weights_quantized']:.2%}; MACs in integers: "
        f"{share['macs_quantized']:.2%}, once per timestep: {share['macs_once_per_timestep']:.2%}",
        f"{folder / RESULT}: {size / 2**20:.3f} MiB, {size / (parameters * 4):.4f} of float32 "
        f"({parameters * 4 / 2**20:.2f} MiB), in {seconds:.0f} s",
    ]
    if beside:
        lines.append(
            f"the denoiser; with what sampling needs beside it, in half precision, the file has "
            f"{whole / 2**20:.3f} MiB"
        )
    write_text(folder / LOG, "\n".join(lines) + "\n")
    return lines
