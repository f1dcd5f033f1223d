"""Reading the weights of public checkpoints, without running anything that a file contains.

    state = load_state_dict("model.ckpt", prefix="first_stage_model")
    load_into(autoencoder, state, "model.ckpt")

Pickled files are read with `weights_only=True`, always: there is no fallback, and the few classes
that Lightning files name are replaced by an empty one. Every way in which a file can be wrong
becomes a CheckpointError whose message is one line.

A state dict is `dict[str, Tensor]`: float tensors keep the precision of the file, every tensor
owns its memory and lies on the CPU. `load_into` casts to the precision of the module.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from .checkpoint_files import (
    AGAIN,
    WEIGHTS,
    CheckpointError,
    State,
    failure,
    guarded,
    is_folder,
    listing,
    open_file,
    printable,
    read_file,
    size_of,
    tensors_of,
)
from .diffusers_folder import diffusers_files, diffusers_params, read_diffusers

AVERAGED = "model_ema."
COUNTERS = ("model_ema.decay", "model_ema.num_updates")
# Empty tensors by which single files say what the network predicts, or its schedule.
MARKERS = {"v_pred": "v-prediction", "ztsnr": "a schedule that ends without signal"}

__all__ = [
    "CheckpointError",
    "State",
    "diffusers_params",
    "load_into",
    "load_state_dict",
    "select",
    "sha256_of",
]


# What helps where the averaged copy of the weights is not sound.
RAW = "take the trained weights in its place: --set model.weights=raw"


def load_state_dict(path: str | Path, *, weights: str = "ema", prefix: str | None = None) -> State:
    """The tensors of a checkpoint by name.

    path: a file of torch.save or safetensors, or a folder of Hugging Face diffusers that holds a
    UNet2DModel of the DDPM kind, whose names become those of DDIMUNet.
    weights: "ema" takes the averaged copy where the file has one, "raw" the trained weights. A
    file with one copy gives that copy.
    prefix: keep the names below it ("model.diffusion_model"), without it.

    A leading `module.` of all names, `loss.*` and the `model_ema.*` copies are removed. A file
    whose marker tensors (v_pred, ztsnr) ask for another sampling than ours is refused. Raises
    CheckpointError for a file that cannot be read safely and completely.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got '{weights}'")
    path = Path(path)
    state = guarded(path, lambda: _read(path, weights))
    marked = [what for name, what in MARKERS.items() if name in state]
    if marked:
        raise failure(
            path,
            f"says by its tensors {', '.join(n for n in MARKERS if n in state)} that it needs "
            f"{' and '.join(marked)}, which the samplers of single files do not have",
            "convert it to a folder of diffusers",
        )
    if prefix is not None:
        state = select(state, prefix, path)
    return {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}


def select(state: State, prefix: str, source: str | Path) -> State:
    """The tensors below `prefix`, without it. Raises CheckpointError when there are none."""
    start = prefix.rstrip(".") + "."
    chosen = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
    if not chosen:
        parts = listing(sorted({name.split(".")[0] for name in state}))
        raise failure(source, f"no tensor is named {start}*", f"the file holds {parts}")
    return chosen


def load_into(module: nn.Module, state: State, source: str | Path) -> None:
    """Copy `state` into `module`, name by name; floats are cast to the module's precision.

    A module on the meta device takes the tensors over. Raises CheckpointError, and changes
    nothing, when a name is missing or unknown, a shape or kind differs or a value is not finite.
    """
    wanted = module.state_dict()
    _check_names(module, wanted, state, source)
    ready = {name: _cast(name, state[name], wanted[name], source) for name in wanted}
    module.load_state_dict(ready, strict=True, assign=any(t.is_meta for t in wanted.values()))


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a checkpoint in hexadecimal; of the weight file where `path` is a folder."""
    path = Path(path)
    path = diffusers_files(path)[1] if is_folder(path) else path
    size_of(path)
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path, weights: str) -> State:
    return read_diffusers(path) if is_folder(path) else _weights_of(path, weights)


# ---- containers ----


def _weights_of(path: Path, weights: str) -> State:
    """The state dict within whatever a file holds."""
    content = read_file(path)
    if isinstance(content, (list, tuple)):
        return _from_ddim_list(content, weights, path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    return _with_averaged(tensors_of(content, path), weights, path)


def _from_ddim_list(content: list | tuple, weights: str, path: Path) -> State:
    """[model, optimizer, epoch, step] of ddim's training, then the averaged copy if it kept one."""
    if len(content) not in (4, 5):
        what = f"a list of {len(content)} items, not the 4 or 5 of a ddim checkpoint"
        raise failure(path, what, "use a file with a state dict")
    raw = tensors_of(content[0], path)
    if weights == "raw" or len(content) == 4:
        return raw
    averaged = tensors_of(content[4], path)
    _check_averaged(raw, averaged, path)
    return raw | averaged


def _with_averaged(state: State, weights: str, path: Path) -> State:
    """Replace tensors by their averaged copies: `model_ema.` and the name without its dots.

    Lightning's LitEma counts from `model.`, or from the root where the file is that of a first
    stage. It copies what was trained: a frozen layer has no copy and keeps its weights. Pruned
    files hold nothing of it but the two counters.
    """
    copies = {n: t for n, t in state.items() if n.startswith(AVERAGED)}
    trained = {n: t for n, t in state.items() if n not in copies}
    copies = {n: t for n, t in copies.items() if n not in COUNTERS}
    if weights == "raw" or not copies:
        return trained
    own: dict[str, list[str]] = {}  # copy -> names that it could be of
    for name in trained:
        own.setdefault(AVERAGED + name.removeprefix("model.").replace(".", ""), []).append(name)
    unused = set(copies) - set(own)
    if unused:
        raise failure(path, f"{min(unused)} belongs to no tensor of the model", RAW)
    if any(len(own[copy]) > 1 for copy in copies):
        raise failure(path, "two names share one model_ema copy", RAW)
    averaged = {own[copy][0]: tensor for copy, tensor in copies.items()}
    _check_shapes(trained, averaged, path)
    return trained | averaged


def _check_averaged(raw: State, averaged: State, path: Path) -> None:
    """Every float tensor has an averaged copy of its shape, and nothing else has one."""
    lacking = [n for n, t in raw.items() if t.is_floating_point() and n not in averaged]
    surplus = [n for n in averaged if n not in raw]
    if lacking or surplus:
        name, how = (lacking[0], "no averaged copy") if lacking else (surplus[0], "no original")
        raise failure(path, f"{printable(name, 100)} has {how}", RAW)
    _check_shapes(raw, averaged, path)


def _check_shapes(raw: State, averaged: State, path: Path) -> None:
    for name, tensor in averaged.items():
        if tensor.shape != raw[name].shape:
            shapes = f"{_shape(tensor)} averaged, {_shape(raw[name])} trained"
            raise failure(path, f"{name} has two shapes: {shapes}", RAW)


# ---- into a module ----


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(str(n) for n in tensor.shape) or "scalar"


def _check_names(module: nn.Module, wanted: State, state: State, source: str | Path) -> None:
    missing = [n for n in wanted if n not in state]
    unexpected = [n for n in state if n not in wanted]
    reshaped = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing, first {missing[0]} ({_shape(wanted[missing[0]])})")
    if unexpected:
        name = printable(unexpected[0], 100)
        faults.append(
            f"{len(unexpected)} unexpected, first {name} ({_shape(state[unexpected[0]])})"
        )
    if reshaped:
        name = reshaped[0]
        shapes = f"file {_shape(state[name])}, model {_shape(wanted[name])}"
        faults.append(f"{len(reshaped)} of another shape, first {name} ({shapes})")
    if faults:
        what = f"does not fit {type(module).__name__}: tensors " + "; ".join(faults)
        raise failure(source, what, "check the model's parameters in the configuration")


def _cast(
    name: str, tensor: torch.Tensor, target: torch.Tensor, source: str | Path
) -> torch.Tensor:
    """`tensor` in the target's precision; floats stay floats, finite, and integers integers."""
    if tensor.is_floating_point() != target.is_floating_point() or tensor.is_complex():
        kinds = f"file {tensor.dtype}, model {target.dtype}".replace("torch.", "")
        raise failure(source, f"tensor {name} is of another kind: {kinds}", "use another file")
    tensor = tensor.to(target.dtype)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        what = f"tensor {name} has {count} of {tensor.numel()} values NaN or infinite"
        raise failure(source, what, AGAIN)
    return tensor
