"""The loop that every training script shares: AdamW, EMA, cosine decay, files, resuming.

    values = fit(model, loss, LoopSettings(iterations=1000), Path("runs/train"), device, info, grid)

OUT/state.pt holds everything a resumed run needs, OUT/ema.pt the averaged weights (a plain state
dict), OUT/training.json how they were made, OUT/grid.png what the caller draws with them. Each file
is whole at any moment, so that a run killed anywhere continues from the last one. The state is
written last: once it says that the run has ended, the rest is there. A finished run that is started
again looks whether it still is, and writes what is missing or damaged.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ...models.checkpoint_files import CheckpointError, State, unreadable_now
from ...models.samplers import SamplingError
from ..common.errors import ConfigError, RunError
from ..common.files import load_tensors, regular, remove_stale, save_tensors, write_json
from ..common.images import is_whole_png, write_png
from ..common.schema import LARGEST_WHOLE
from ..experiment.cli import spellings
from ..experiment.runs import locked

LARGEST_BATCH = 65536
HELP = {  # field of LoopSettings -> what the option does
    "iterations": "steps of the optimizer",
    "minutes": "end after so much training, if it comes first",
    "batch_size": "images of a step",
    "lr": "learning rate, behind the warm-up",
    "warmup": "steps in which it rises from 0",
    "ema": "decay of the averaged weights",
    "seed": "of the weights and all draws",
    "save_every": "steps between two saves",
    "grid_every": "steps between two grids of samples",
}
# (generator of all draws) -> loss of one fresh batch
Loss = Callable[[torch.Generator], torch.Tensor]
Grid = Callable[[State], np.ndarray]  # averaged weights -> picture (H, W, 3) uint8


@dataclass(frozen=True)
class LoopSettings:
    """A run ends after `iterations`, or after `minutes` of training, whichever comes first."""

    iterations: int
    minutes: float | None = None
    batch_size: int = 64
    lr: float = 4e-4
    warmup: int = 200
    ema: float = 0.9995
    seed: int = 0
    save_every: int = 500
    grid_every: int = 2000

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "save_every", "grid_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_option(name)}: must be at least 1, is {getattr(self, name)}")
        for name, most in {"batch_size": LARGEST_BATCH, "seed": LARGEST_WHOLE - 1}.items():
            if abs(getattr(self, name)) > most:
                raise ConfigError(f"{_option(name)}: must be at most {most}")
        if self.warmup < 0:
            raise ConfigError(f"--warmup: must be at least 0, is {self.warmup}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"--minutes: must be above 0 and finite, is {self.minutes}")
        if not (self.lr > 0 and math.isfinite(self.lr)) or not 0 <= self.ema < 1:
            raise ConfigError("--lr must be above 0, and --ema from 0 to below 1")

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is done, 0..1."""
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(max(step / self.iterations, by_time), 1.0)

    def rate(self, step: int, progress: float) -> float:
        """Learning rate: linear warm-up, then half a cosine to zero at the end of the run."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass
class LoopState:
    """The progress of a run, besides the model and the optimizer."""

    ema: State
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    loss: float = float("nan")  # running mean


def add_loop_options(parser: argparse.ArgumentParser, prefix: str = "", **defaults: Any) -> None:
    """An option for each field of LoopSettings; `defaults` replace those of the class."""
    for field in fields(LoopSettings):
        kind, word = (int, "N") if field.type is int else (float, "X")
        default = defaults.get(field.name, field.default)
        names = spellings(f"--{prefix}{field.name}")
        shown = "" if default is None else f" ({default})"
        parser.add_argument(
            *names, type=kind, metavar=word, default=default, help=f"{HELP[field.name]}{shown}"
        )


def settings_of(args: argparse.Namespace, prefix: str = "") -> LoopSettings:
    """Raises ConfigError, which names the options with their prefix."""
    names = [field.name for field in fields(LoopSettings)]
    try:
        return LoopSettings(**{name: getattr(args, prefix + name) for name in names})
    except ConfigError as error:
        raise ConfigError(str(error).replace("--", _option(prefix))) from error


def profits_from_bfloat16(device: torch.device) -> bool:
    """CPUs without the instructions emulate them, ten times slower than float32."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def read_state(path: Path) -> dict[str, Any]:
    """The state of an interrupted run, on the CPU. Raises CheckpointError."""
    try:
        return load_tensors(path)
    except Exception as error:  # torch has many exceptions for a damaged file
        if reason := unreadable_now(error, path):
            raise CheckpointError(f"{path}: {reason}; it is kept") from error
        raise CheckpointError(f"{path}: damaged; delete it to start anew") from error


def fit(
    model: nn.Module,
    loss: Loss,
    settings: LoopSettings,
    out: Path,
    device: torch.device,
    info: dict[str, Any],
    grid: Grid,
    *,
    identity: str,
    warm: bool = False,
) -> State:
    """Train `model`, on `device` already, and return the averaged weights.

    info: goes into training.json. identity: of the data and the architecture, see identity_of.
    warm: the model is trained already, the average starts from it. Raises CheckpointError for a
    damaged state, RunError for one of another identity or for a folder in which another process
    trains, and SamplingError when the loss is not finite.
    """
    with locked(out / ".lock"):
        remove_stale(out)
        return _fit(model, loss, settings, out, info, grid, identity, warm)


def identity_of(data: torch.Tensor, *architecture: Any) -> str:
    """Digest of a training set (N, ...) and of what plain values the model is made of."""
    digest = hashlib.sha256(repr((tuple(data.shape), architecture)).encode())
    digest.update(data.contiguous().numpy().data)
    return digest.hexdigest()


def _fit(
    model: nn.Module,
    loss: Loss,
    settings: LoopSettings,
    out: Path,
    info: dict[str, Any],
    grid: Grid,
    identity: str,
    warm: bool,
) -> State:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    state = LoopState(ema, torch.Generator().manual_seed(settings.seed))
    if (out / "state.pt").exists():
        _restore(read_state(out / "state.pt"), model, optimizer, state, identity, out)
        print(f"{out}: resumed at iteration {state.step}")
    model.train()
    first = state.step
    with tqdm(total=settings.iterations, initial=state.step, unit="it", mininterval=5) as bar:
        while (done := settings.progress(state.step, state.seconds)) < 1:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(state.step, done)
            value = _update(model, optimizer, loss(state.generator))
            _average(state, model, settings.ema if warm else None, settings.ema)
            if not math.isfinite(value):
                where = f"{out}: iteration {state.step}"
                raise SamplingError(f"{where}: the loss is not finite; lower --lr, resume")
            state.loss = value if math.isnan(state.loss) else 0.99 * state.loss + 0.01 * value
            state.step += 1
            state.seconds += time.perf_counter() - began
            bar.update()
            bar.set_postfix(loss=f"{state.loss:.4f}", refresh=False)
            ended = settings.progress(state.step, state.seconds) >= 1
            due = ended or state.step % settings.save_every == 0
            if due:
                _write_weights(out, model, state, settings, info)
            try:
                if ended or state.step % settings.grid_every == 0:
                    write_png(out / "grid.png", grid(state.ema))
            finally:  # a picture that cannot be drawn costs no training
                if due:
                    _save_state(out, model, optimizer, state, identity)
    if state.step == first:
        _complete(out, model, state, settings, info, grid)
    print(
        f"{out / 'ema.pt'}: {state.step} iterations, loss {state.loss:.5f}, {state.seconds:.0f} s"
    )
    return state.ema


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _average(state: LoopState, model: nn.Module, decay: float | None, limit: float) -> None:
    """One step of the moving average; without a fixed decay it follows closely at first."""
    decay = min(limit, (state.step + 1) / (state.step + 10)) if decay is None else decay
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            state.ema[name].lerp_(value, 1 - decay)
        else:
            state.ema[name].copy_(value)


def _restore(
    saved: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: LoopState,
    identity: str,
    out: Path,
) -> None:
    # States of earlier versions know nothing of their data.
    if saved.get("identity", identity) != identity:
        raise RunError(
            f"{out}: was trained on other data or with another model; give another --out"
        )
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for name, value in saved["ema"].items():
        state.ema[name].copy_(value)
    state.step = saved["step"]
    state.seconds, state.loss = saved["seconds"], saved["loss"]
    state.generator.set_state(saved["generator"].cpu())
    torch.set_rng_state(saved["torch_rng"].cpu())


def _save_state(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: LoopState,
    identity: str,
) -> None:
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    draws = {"generator": state.generator.get_state(), "torch_rng": torch.get_rng_state()}
    counts = {"step": state.step, "seconds": state.seconds, "loss": state.loss}
    counts["identity"] = identity
    save_tensors(out / "state.pt", {**parts, "ema": state.ema, **draws, **counts})


def _write_weights(
    out: Path,
    model: nn.Module,
    state: LoopState,
    settings: LoopSettings,
    info: dict[str, Any],
) -> None:
    """ema.pt and training.json."""
    save_tensors(out / "ema.pt", {k: v.contiguous().cpu() for k, v in state.ema.items()})
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "iterations_done": state.step,
        "images_seen": state.step * settings.batch_size,
        "running_loss": state.loss,
        "seconds": state.seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_json(out / "training.json", {**info, **about, **asdict(settings)})


def _complete(
    out: Path,
    model: nn.Module,
    state: LoopState,
    settings: LoopSettings,
    info: dict[str, Any],
    grid: Grid,
) -> None:
    """Writes what a finished run lacks beside its state."""
    if not (_holds(out / "ema.pt", state.ema) and _is_json(out / "training.json")):
        print(f"{out}: ema.pt or training.json is missing or damaged; written again")
        _write_weights(out, model, state, settings, info)
    if not is_whole_png(out / "grid.png"):
        print(f"{out}: grid.png is missing or damaged; written again")
        write_png(out / "grid.png", grid(state.ema))


def _holds(path: Path, ema: State) -> bool:
    """Whether a file holds these weights."""
    try:
        found = load_tensors(path)
        return found.keys() == ema.keys() and all(
            torch.equal(found[name], value.cpu()) for name, value in ema.items()
        )
    except Exception as error:  # torch has many exceptions for a damaged file
        if reason := unreadable_now(error, path):
            raise CheckpointError(f"{path}: {reason}; it is kept") from error
        return False


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(regular(path).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False
