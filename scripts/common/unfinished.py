"""An unfinished calibration on the disk: whose it is, and what may still be changed in it.

Everything that the result depends on is its identity. What only a later phase reads may change
until that phase is done: a run whose end-to-end steps ran away goes on with a lower rate.
"""

import dataclasses
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import torch

from models.checkpoint_files import unreadable_now
from quant.bank import Bank
from quant.finite import DivergenceError
from quant.state import CalibrationState
from scripts.common.config import Config
from scripts.common.files import save_tensors
from scripts.common.runs import RunError

STATE = "calibration.pt"
BLOCKS_ALONE = {"iterations", "batch_size", "lr_rounding", "regulariser"}
STEPS_ALONE = {
    "finetune_iterations",
    "finetune_batch_size",
    "accumulate",
    "progressive",
    "weigh_steps",
}
LOWER = {
    "search": "quant.search.lr_scale",
    "temporal": "quant.reconstruct.lr_scale or quant.reconstruct.lr_rounding",
    "reconstruct": "quant.reconstruct.lr_scale or quant.reconstruct.lr_rounding",
    "finetune": "quant.reconstruct.lr_scale",
}
UNITS = ("temporal", "reconstruct")
LEAVE_OUT = {
    "equivalent": "quant.equivalent_scaling=false",
    "rounding": "quant.weight.rounding=nearest",
    "precision": "quant.activation.step_bits=[]",
    "correction": "quant.correction=none",
}


def settings_of_phases(config: Config) -> dict[str, dict[str, Any]]:
    """Phase -> the settings that it alone reads, or it and later ones."""
    settings = config.quant
    values = vars(settings.reconstruct)
    blocks = {k: v for k, v in values.items() if k not in STEPS_ALONE}
    blocks = blocks if settings.reconstruct.iterations > 0 else {}
    return {
        "search": dict(vars(settings.search)),
        "temporal": blocks if settings.time_embedding == "reconstructed" else {},
        "reconstruct": blocks if settings.weight.rounding == "adaround" else {},
        "finetune": {k: v for k, v in values.items() if k not in BLOCKS_ALONE},
    }


def _parts(config: Config, sources: dict[str, str]) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(config.model) | {"checkpoint": None, "url": None},
        "schedule": vars(config.schedule),
        "sampler": vars(config.sampler),
        "quant": dataclasses.asdict(config.quant),
        "calibration": vars(config.calibration),
        "micro_batch": config.sampling.micro_batch,
        "classes": config.sampling.classes,
        "sources": sources,
    }


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()


def identity_of(config: Config, sources: dict[str, str]) -> str:
    """Digest of everything the result depends on."""
    return _digest(_parts(config, sources))


def identity_of_start(config: Config, sources: dict[str, str]) -> str:
    """Digest of what may not change from the trajectories on."""
    parts = _parts(config, sources)
    later = {"search", "reconstruct"}
    parts["quant"] = {k: v for k, v in parts["quant"].items() if k not in later}
    return _digest(parts)


def save_state(
    folder: Path, config: Config, sources: dict[str, str], state: CalibrationState, bank: Bank
) -> None:
    value = {
        "identity": identity_of_start(config, sources),
        "settings": settings_of_phases(config),
        "state": state.to_plain(),
        "bank": vars(bank),
    }
    save_tensors(folder / STATE, value)


def load_state(
    folder: Path,
    config: Config,
    sources: dict[str, str],
    resume: bool,
    device: str | torch.device = "cpu",
) -> tuple[CalibrationState, Bank] | None:
    """The interrupted run of this folder, if it is to be continued. Raises RunError.

    device: of this run, which may be another than that of the interrupted one.
    With other settings of the phase that was interrupted it stands at that phase's start.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums
            if archive.testzip() is not None:
                raise ValueError("a checksum does not match")
        value = torch.load(path, weights_only=True, map_location="cpu")
        if not value.keys() >= {"identity", "settings", "state", "bank"}:
            raise ValueError("it is not whole")
    except Exception as error:  # torch has many exceptions for a damaged file
        if reason := unreadable_now(error, path):
            raise RunError(f"{path}: {reason}; it is kept") from error
        raise RunError(f"{path}: damaged; delete it or use --overwrite") from error
    foreign = f"{path}: belongs to another configuration or checkpoint; --overwrite starts anew"
    if value["identity"] != identity_of_start(config, sources):
        raise RunError(foreign)
    if not resume:
        raise RunError(f"{folder}: holds an unfinished calibration; --resume continues it")
    state = CalibrationState.from_plain(value["state"])
    changed = {k for k, v in settings_of_phases(config).items() if value["settings"].get(k) != v}
    if changed.intersection(state.done):
        raise RunError(foreign)
    if state.phase in changed:
        state.rewind()
    return state, Bank(**(value["bank"] | {"device": str(device)}))


def advice(error: DivergenceError, state: CalibrationState, config: Config) -> str:
    """The line for a phase that ran away: what happened, and what to change."""
    phase = state.phase
    line = f"calibration ran away, {phase}: {error}"
    if error.untouched:
        return (
            f"{line}, before the first step: the noise that the checkpoint predicts is too large; "
            "look at images of it in full precision"
        )
    if phase in LOWER:
        settings = settings_of_phases(config)
        if any(settings[p] for p in UNITS if p in state.done):  # they had the same rate
            return f"{line}; lower {LOWER[phase]} and start anew with --overwrite"
        return f"{line}; lower {LOWER[phase]}, and --resume goes on after the phase before"
    if phase in LEAVE_OUT:
        return f"{line}; leave it out with --set {LEAVE_OUT[phase]} --overwrite"
    return f"{line}; look at images of the checkpoint in full precision"
