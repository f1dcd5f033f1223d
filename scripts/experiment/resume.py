"""An unfinished calibration on the disk: whose it is, and what may still be changed in it.

Everything that the result depends on is its identity. What only a later phase reads may change
until that phase is done: a run whose end-to-end steps diverged goes on with a lower rate.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ...models.checkpoint_files import unreadable_now
from ...quant.calibration.finite import DivergenceError
from ...quant.calibration.phases import PHASES, unfinished_phase
from ...quant.calibration.run_state import RunState
from ...quant.calibration.states import CalibrationStates
from ..common.errors import RunError
from ..common.files import load_tensors, save_tensors
from ..common.schema import printable
from .config import Config
from .devices import device_name
from .runs import digest_of

STATE = "calibration.pt"


def settings_of_phases(config: Config) -> dict[str, dict[str, Any]]:
    """Phase -> the settings that may change until it is done, of the phases that have any."""
    found = {phase.name: phase.settings(config.quant) for phase in PHASES}
    return {name: settings for name, settings in found.items() if settings}


def _parts(config: Config, sources: dict[str, str]) -> dict[str, Any]:
    model = dataclasses.asdict(config.model) | {"checkpoint": None, "url": None}
    model.pop("digest")  # of what lies at the url
    return {
        "model": model,
        "schedule": vars(config.schedule),
        "sampler": vars(config.sampler),
        "quant": dataclasses.asdict(config.quant),
        "calibration": vars(config.calibration),
        "micro_batch": config.sampling.micro_batch,
        "classes": config.sampling.classes,
        "sources": sources,
    }


def identity_of(config: Config, sources: dict[str, str]) -> str:
    """Digest of everything the result depends on."""
    return digest_of(_parts(config, sources))


def identity_of_start(config: Config, sources: dict[str, str]) -> str:
    """Digest of what may not change from the trajectories on."""
    parts = _parts(config, sources)
    later = {"search", "reconstruct"}
    parts["quant"] = {k: v for k, v in parts["quant"].items() if k not in later}
    return digest_of(parts)


def save_state(
    folder: Path,
    config: Config,
    sources: dict[str, str],
    state: RunState,
    states: CalibrationStates,
) -> None:
    """Writes what an interrupted calibration continues from."""
    value = {
        "device": device_name(torch.device(states.device)),
        "identity": identity_of_start(config, sources),
        "settings": settings_of_phases(config),
        "state": state.to_plain(),
        "states": vars(states),
    }
    save_tensors(folder / STATE, value)


def load_state(
    folder: Path,
    config: Config,
    sources: dict[str, str],
    resume: bool,
    device: str | torch.device = "cpu",
) -> tuple[RunState, CalibrationStates] | None:
    """The interrupted run of this folder, if it is to be continued. Raises RunError.

    device: of this run. A run does not change its kind of device on the way: another one rounds
    otherwise, and the result would be that of neither.
    With other settings of the phase that was interrupted it stands at that phase's start.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        value = load_tensors(path)
        if not value.keys() >= {"device", "identity", "settings", "state", "states"}:
            raise ValueError("it is not whole")
    except Exception as error:  # torch has many exceptions for a damaged file
        if reason := unreadable_now(error, path):
            raise RunError(f"{path}: {reason}; it is kept") from error
        raise RunError(f"{path}: damaged; delete it or use --overwrite") from error
    # First: the sizes of batches differ as well where they follow from the device.
    if value["device"] != (name := device_name(torch.device(device))):
        raise RunError(
            f"{path}: was begun on another device, {printable(value['device'])}; this one is "
            f"{name}: choose with --device, or start anew with --overwrite"
        )
    foreign = f"{path}: belongs to another configuration or checkpoint; --overwrite starts anew"
    if value["identity"] != identity_of_start(config, sources):
        raise RunError(foreign)
    if not resume:
        raise RunError(f"{folder}: holds an unfinished calibration; --resume continues it")
    state = RunState.from_plain(value["state"])
    now, saved = settings_of_phases(config), value["settings"]
    changed = {name for name in {*now, *saved} if now.get(name) != saved.get(name)}
    if changed.intersection(state.done):
        raise RunError(foreign)
    if unfinished_phase(state).name in changed:
        state.rewind()
    return state, CalibrationStates(**(value["states"] | {"device": str(device)}))


def advice(error: DivergenceError, state: RunState, config: Config) -> str:
    """The line for a phase that diverged: what happened, and what to change."""
    phase = unfinished_phase(state)
    line = f"calibration diverged, {phase.name}: {error}"
    if error.untouched:
        return (
            f"{line}, before the first step: the noise that the checkpoint predicts is too large; "
            "look at images of it in full precision"
        )
    if phase.lower:
        settings, done = settings_of_phases(config), set(state.done)
        by_units = {"temporal", "reconstruct"}  # they have the same rates
        if done & by_units & settings.keys():
            return f"{line}; lower {phase.lower} and start anew with --overwrite"
        return f"{line}; lower {phase.lower}, and --resume goes on after the phase before"
    if phase.leave_out:
        return f"{line}; leave it out with --set {phase.leave_out} --overwrite"
    return f"{line}; look at images of the checkpoint in full precision"
