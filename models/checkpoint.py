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
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import nn

State = dict[str, torch.Tensor]

# Classes that public checkpoints name but that hold no weights. Nothing else is ever admitted.
HARMLESS_CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
)
WEIGHTS = ("ema", "raw")
AGAIN = "download it again"

# First bytes of what people download instead of a checkpoint.
FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run git lfs pull"),
    (b"\x1f\x8b", "a gzip archive", "unpack it and name the checkpoint inside"),
    (b"Rar!", "a RAR archive", "unpack it and name the checkpoint inside"),
    (b"\x89HDF", "an HDF5 file", "use the PyTorch version of the checkpoint"),
)


class CheckpointError(ValueError):
    """One line: which file, what is wrong with it, what to do."""


class HarmlessClass:
    """Stands in for a class of HARMLESS_CLASSES."""


def load_state_dict(path: str | Path, *, weights: str = "ema", prefix: str | None = None) -> State:
    """The tensors of a checkpoint by name.

    path: a file of torch.save or safetensors, or a folder of Hugging Face diffusers that holds a
    UNet2DModel of the DDPM kind, whose names become those of DDIMUNet.
    weights: "ema" takes the averaged copy where the file has one, "raw" the trained weights. A
    file with one copy gives that copy.
    prefix: keep the names below it ("model.diffusion_model"), without it.

    A leading `module.` of all names, `loss.*` and the `model_ema.*` copies are removed. Raises
    CheckpointError for a file that cannot be read safely and completely.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got '{weights}'")
    path = Path(path)
    state = _guarded(path, lambda: _read(path, weights))
    if prefix is not None:
        state = select(state, prefix, path)
    return {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}


def select(state: State, prefix: str, source: str | Path) -> State:
    """The tensors below `prefix`, without it. Raises CheckpointError when there are none."""
    start = prefix.rstrip(".") + "."
    chosen = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
    if not chosen:
        parts = _listing(sorted({name.split(".")[0] for name in state}))
        raise _error(source, f"no tensor is named {start}*", f"the file holds {parts}")
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
    path = _diffusers_files(path)[1] if _is_folder(path) else path
    _size_of(path)
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def diffusers_params(folder: str | Path) -> dict[str, Any]:
    """Keyword arguments of DDIMUNet for a diffusers folder, from its config.json.

    Raises CheckpointError when the configuration describes another network.
    """
    path = _diffusers_files(Path(folder))[0]
    return _guarded(path, lambda: _ddim_params(path))


# ---- errors ----


def _printable(text: object, limit: int = 200) -> str:
    """One line of printable characters: names in a hostile file may hold anything."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= limit else line[:limit] + "..."


def _error(path: object, what: str, advice: str) -> CheckpointError:
    return CheckpointError(f"{_printable(path, 500)}: {_printable(what, 700)}; {advice}")


def _listing(names: list[str]) -> str:
    shown = ", ".join(_printable(name, 60) for name in names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    # torch wraps its reason in advice to load without protection; keep the reason alone
    text = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
    reason = f"{type(error).__name__}: {_printable(text) or 'no details'}"
    return _error(path, f"cut short or damaged ({reason})", AGAIN)


def _guarded(path: Path, action: Callable[[], Any]) -> Any:
    """Run `action`; whatever exception damaged input makes it raise becomes a CheckpointError."""
    try:
        return action()
    except CheckpointError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error


# ---- files ----


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no permission to look: opening it will say so
        return False


def _size_of(path: Path) -> int:
    """Bytes of a regular file that is not empty."""
    try:
        if not path.exists():
            raise _error(path, "no such file", "check the path or download the checkpoint")
        if not path.is_file():
            raise _error(path, "not a regular file", "name a checkpoint file")
        size = path.stat().st_size
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror})", "check the path") from error
    if size == 0:
        raise _error(path, "the file is empty", AGAIN)
    return size


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror})", "check its permissions") from error


def _read(path: Path, weights: str) -> State:
    return _read_diffusers(path) if _is_folder(path) else _weights_of(path, weights)


def _read_file(path: Path) -> object:
    """What a checkpoint file holds, whole: recognised by its first bytes, not by its name."""
    size = _size_of(path)
    with _open(path) as file:
        head = file.read(512)
    if _looks_like_safetensors(head, size):
        return safetensors.torch.load_file(path, device="cpu")
    _refuse_foreign(path, head)
    if head.startswith(b"PK"):
        _check_zip(path, size)
    return _read_torch(path)


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _refuse_foreign(path: Path, head: bytes) -> None:
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise _error(path, "an HTML page, not a checkpoint: the download failed", AGAIN)
    for magic, what, advice in FOREIGN:
        if head.startswith(magic):
            raise _error(path, what, advice)
    if head[257:262] == b"ustar":
        raise _error(path, "a tar archive", "unpack it and name the checkpoint inside")
    if not head.startswith((b"PK", b"\x80")):
        raise _error(path, "not a whole file of torch.save or safetensors", AGAIN)


def _check_zip(path: Path, size: int) -> None:
    """Refuse archives that hold no tensors, compressed members (torch writes none; a small one may
    unfold to any size) and members whose checksum is wrong: torch itself does not look at it."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [m.filename for m in members]
        if not any(name.endswith("data.pkl") for name in names):
            raise _error(path, "a zip archive, not a checkpoint", f"unpack {_listing(names)}")
        if any(name.endswith("constants.pkl") for name in names):
            raise _error(path, "a TorchScript program", "use a file that holds tensors only")
        if sum(m.file_size for m in members) > size:
            raise _error(path, "a checkpoint with compressed members", "use the original file")
        damaged = archive.testzip()
    if damaged is not None:
        raise _error(path, f"damaged: the checksum of {damaged} does not match", AGAIN)


def _read_torch(path: Path) -> object:
    stand_ins = [(HarmlessClass, name) for name in HARMLESS_CLASSES]
    with _open(path) as file, torch.serialization.safe_globals(stand_ins), _quiet():
        try:
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:
            raise _refusal(path, error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns about odd pickles; what matters of it is in the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """Why torch did not load a file: it names code, it is a plain pickle, or it is damaged."""
    found = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
    if found:
        advice = "use a file that holds tensors only; nothing of this one was run"
        return _error(path, f"the pickle asks for code: {found[1]}", advice)
    if "Unsupported operand 149" in str(error):  # FRAME: protocol 4 and later begin with it
        name = _first_name(path)
        what = f"a plain pickle that asks for {name}" if name else "a pickle of a protocol above 2"
        return _error(path, what, "use a file that torch.save wrote with its defaults")
    return _damaged(path, error)


def _first_name(path: Path) -> str | None:
    """The first class or function that a plain pickle names; it is read, never run."""
    strings: list[str] = []  # module and name are pushed as strings
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # not a sound pickle: then it names nothing
        return None
    return None


# ---- containers ----


def _weights_of(path: Path, weights: str) -> State:
    """The state dict within whatever a file holds."""
    content = _read_file(path)
    if isinstance(content, (list, tuple)):
        return _from_ddim_list(content, weights, path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    return _with_averaged(_tensors(content, path), weights, path)


def _tensors(content: object, path: Path) -> State:
    """Check that `content` maps names to plain tensors; strip `module.` if all names have it."""
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise _error(path, f"holds a {kind}, not tensors by name", "use a state dict")
    if not content:
        raise _error(path, "holds no tensor", AGAIN)
    for name, value in content.items():
        _check_tensor(name, value, path)
    state = _owned(content, path)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _check_tensor(name: object, value: object, path: Path) -> None:
    """A name with a dense CPU tensor that lies within its storage."""
    if not isinstance(name, str):
        raise _error(path, f"holds the key {_printable(name, 60)}, not a name", "use another file")
    name = _printable(name, 100)
    if not isinstance(value, torch.Tensor):
        what = f"entry {name} is of type {type(value).__name__}, not a tensor"
        raise _error(path, what, "use a file with a state dict")
    plain = value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized or value.is_nested:
        raise _error(path, f"tensor {name} is not a plain dense tensor", "use another file")
    stored = value.untyped_storage().nbytes()
    if value.nbytes > stored:
        what = f"tensor {name} claims {value.nbytes} bytes, {stored} are stored"
        raise _error(path, what, "use another file")


def _owned(content: dict[str, torch.Tensor], path: Path) -> State:
    """Copy what shares memory: views into a flat storage, one tensor under several names."""
    if sum(tensor.nbytes for tensor in content.values()) > 2 * path.stat().st_size:
        raise _error(path, "the tensors overlap: together they exceed the file", "use another file")
    state: State = {}
    seen: set[int] = set()
    for name, value in content.items():
        tensor, storage = value.detach(), value.untyped_storage()
        whole = tensor.nbytes == storage.nbytes() and tensor.is_contiguous()
        if not whole or storage.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        state[name] = tensor
    return state


def _from_ddim_list(content: list | tuple, weights: str, path: Path) -> State:
    """[model, optimizer, epoch, step] of ddim's training, then the averaged copy if it kept one."""
    if len(content) not in (4, 5):
        what = f"a list of {len(content)} items, not the 4 or 5 of a ddim checkpoint"
        raise _error(path, what, "use a file with a state dict")
    raw = _tensors(content[0], path)
    if weights == "raw" or len(content) == 4:
        return raw
    averaged = _tensors(content[4], path)
    _check_averaged(raw, averaged, path)
    return raw | averaged


def _with_averaged(state: State, weights: str, path: Path) -> State:
    """Replace `model.*` by its averaged copies: `model_ema.` and the name without its dots."""
    copies = {n: t for n, t in state.items() if n.startswith("model_ema.")}
    trained = {n: t for n, t in state.items() if n not in copies}
    if weights == "raw" or not copies:
        return trained
    inner = {n: n.removeprefix("model.") for n in trained if n.startswith("model.")}
    flat = {n: "model_ema." + short.replace(".", "") for n, short in inner.items()}
    if len(set(flat.values())) != len(flat):
        raise _error(path, "two names share one model_ema copy", "load the raw weights")
    averaged = {n: copies[f] for n, f in flat.items() if f in copies}
    unused = set(copies) - set(flat.values()) - {"model_ema.decay", "model_ema.num_updates"}
    if unused:
        raise _error(path, f"{min(unused)} belongs to no tensor of model.*", "load the raw weights")
    _check_averaged({n: trained[n] for n in inner}, averaged, path)
    return trained | averaged


def _check_averaged(raw: State, averaged: State, path: Path) -> None:
    """Every float tensor has an averaged copy of its shape, and nothing else has one."""
    lacking = [n for n, t in raw.items() if t.is_floating_point() and n not in averaged]
    surplus = [n for n in averaged if n not in raw]
    if lacking or surplus:
        name, how = (lacking[0], "no averaged copy") if lacking else (surplus[0], "no original")
        raise _error(path, f"{_printable(name, 100)} has {how}", "load the raw weights")
    for name, tensor in averaged.items():
        if tensor.shape != raw[name].shape:
            shapes = f"{_shape(tensor)} averaged, {_shape(raw[name])} trained"
            raise _error(path, f"{name} has two shapes: {shapes}", "load the raw weights")


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
        name = _printable(unexpected[0], 100)
        faults.append(
            f"{len(unexpected)} unexpected, first {name} ({_shape(state[unexpected[0]])})"
        )
    if reshaped:
        name = reshaped[0]
        shapes = f"file {_shape(state[name])}, model {_shape(wanted[name])}"
        faults.append(f"{len(reshaped)} of another shape, first {name} ({shapes})")
    if faults:
        what = f"does not fit {type(module).__name__}: tensors " + "; ".join(faults)
        raise _error(source, what, "check the model's parameters in the configuration")


def _cast(
    name: str, tensor: torch.Tensor, target: torch.Tensor, source: str | Path
) -> torch.Tensor:
    """`tensor` in the target's precision; floats stay floats, finite, and integers integers."""
    if tensor.is_floating_point() != target.is_floating_point() or tensor.is_complex():
        kinds = f"file {tensor.dtype}, model {target.dtype}".replace("torch.", "")
        raise _error(source, f"tensor {name} is of another kind: {kinds}", "use another file")
    tensor = tensor.to(target.dtype)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        what = f"tensor {name} has {count} of {tensor.numel()} values NaN or infinite"
        raise _error(source, what, AGAIN)
    return tensor


# ---- folders of Hugging Face diffusers ----

# What a UNet2DModel must be to compute what DDIMUNet does: key -> (value, default of the library).
DIFFUSERS_NEEDS = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "norm_eps": (1e-6, 1e-5),
    "num_class_embeds": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}

# Its names -> those of DDIM, applied in turn. Attention has had two sets of names.
DIFFUSERS_NAMES = (
    (r"^time_embedding\.linear_1\.", "temb.dense.0."),
    (r"^time_embedding\.linear_2\.", "temb.dense.1."),
    (r"^mid_block\.resnets\.0\.", "mid.block_1."),
    (r"^mid_block\.resnets\.1\.", "mid.block_2."),
    (r"^mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"^(down|up)_blocks\.", r"\1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(?:to_q|query)\.", ".q."),
    (r"\.(?:to_k|key)\.", ".k."),
    (r"\.(?:to_v|value)\.", ".v."),
    (r"\.(?:to_out\.0|proj_attn)\.", ".proj_out."),
    (r"^conv_norm_out\.", "norm_out."),
)


def _diffusers_files(folder: Path) -> tuple[Path, Path]:
    """config.json and the weight file of a folder, or of its `unet`."""
    for place in (folder / "unet", folder):
        if not (place / "config.json").is_file():
            continue
        for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
            if (place / name).is_file():
                return place / "config.json", place / name
        raise _error(place, "holds no diffusion_pytorch_model.safetensors", "download it")
    raise _error(folder, "a folder without config.json", "name the checkpoint file itself")


def _read_diffusers(folder: Path) -> State:
    """The weights of a DDPM-like UNet2DModel under the names and shapes of DDIMUNet."""
    config, weights = _diffusers_files(folder)
    levels = len(_guarded(config, lambda: _ddim_params(config))["ch_mult"])
    found = _tensors(_read_file(weights), weights)
    state: State = {}
    for name, tensor in found.items():
        new = _ddim_name(name, levels)
        if new in state:
            raise _error(weights, f"two tensors are called {new}", "use another file")
        pointwise = ".attn" in new and tensor.ndim == 2  # Linear (C, C) -> 1x1 conv (C, C, 1, 1)
        state[new] = tensor[:, :, None, None] if pointwise else tensor
    return state


def _ddim_name(name: str, levels: int) -> str:
    """down_blocks.1.resnets.0.norm1.bias -> down.1.block.0.norm1.bias; up levels count down."""
    for pattern, replacement in DIFFUSERS_NAMES:
        name = re.sub(pattern, replacement, name)
    found = re.match(r"up\.(\d{1,3})\.", name)
    return f"up.{levels - 1 - int(found[1])}.{name[found.end() :]}" if found else name


def _ddim_params(path: Path) -> dict[str, Any]:
    """The arguments of DDIMUNet that a config.json of diffusers describes."""
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    if kind != "UNet2DModel":
        raise _error(
            path, f"describes a {_printable(kind, 60)}, not a UNet2DModel", "use another model"
        )
    for key, (needed, default) in DIFFUSERS_NEEDS.items():
        if config.get(key, default) != needed:
            what = f"{key} is {config.get(key, default)}, DDIMUNet computes with {needed}"
            raise _error(path, what, "use a checkpoint of the DDPM kind")
    widths, size = config["block_out_channels"], config["sample_size"]
    down, up = config["down_block_types"], config["up_block_types"]
    attention = [kind.startswith("Attn") for kind in down]
    _check_blocks(path, widths, down, up)
    _check_single_head(path, config.get("attention_head_dim", 8), widths, attention)
    return {
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attn_resolutions": [size >> level for level, has in enumerate(attention) if has],
        "in_channels": config.get("in_channels", 3),
        "out_ch": config.get("out_channels", 3),
        "image_size": size,
        "norm_groups": config.get("norm_num_groups", 32),
    }


def _check_blocks(path: Path, widths: list[int], down: list[str], up: list[str]) -> None:
    """The way up mirrors the way down, and every width is a multiple of the first."""
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    known = set(down) <= {"DownBlock2D", "AttnDownBlock2D"}
    if not known or up != mirrored or len(widths) != len(down):
        raise _error(path, f"the blocks {down} and {up} are not those of DDIM", "use another model")
    if any(width % widths[0] for width in widths):
        raise _error(path, f"widths {widths} are not multiples of the first", "use another model")


def _check_single_head(
    path: Path, head_dim: int | None, widths: list[int], attention: list[bool]
) -> None:
    """Attention has one head: its size is absent (null) or the width, the middle included."""
    used = {w for w, has in zip(widths, attention, strict=True) if has} | {widths[-1]}
    if head_dim is not None and used != {head_dim}:
        what = f"attention_head_dim {head_dim} makes several heads, DDIMUNet has one"
        raise _error(path, what, "use a checkpoint of the DDPM kind")
