"""Folders of Hugging Face diffusers that hold a DDPM-like UNet2DModel, in the names of DDIM."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint_files import (
    CheckpointError,
    State,
    failure,
    guarded,
    listing,
    printable,
    read_file,
    tensors_of,
)

# Our beta schedules in the words of diffusers.
BETAS = {"squaredcos_cap_v2": "cosine"}

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


SUPPORTED = (
    "this architecture reads those of a UNet2DModel of the DDPM kind; other pipelines, where "
    "they are supported, by the diffusers library (--ckpt FOLDER without --config, or model.arch: "
    "diffusers), Stable Diffusion also as its original .ckpt (configs/sd_v1.yaml)"
)
WEIGHT_FILES = tuple(
    f"diffusion_pytorch_model.{name}"
    for name in ("safetensors", "bin", "fp16.safetensors", "fp16.bin")  # in order of preference
)


def diffusers_files(folder: Path) -> tuple[Path, Path]:
    """config.json and the weight file of a folder, or of its `unet`."""
    for place in (folder / "unet", folder):
        if not (place / "config.json").is_file():
            continue
        for name in WEIGHT_FILES:
            if (place / name).is_file():
                return place / "config.json", place / name
        raise _without_weights(place)
    kind = _class_name(folder / "model_index.json")
    if kind is not None:
        raise failure(folder, f"a diffusers folder of {kind}, without a unet", SUPPORTED)
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.ckpt")):
        raise failure(folder, "a folder without config.json", "name the checkpoint file in it")
    raise failure(folder, "a folder without config.json", f"name a checkpoint file; {SUPPORTED}")


def _without_weights(place: Path) -> CheckpointError:
    """What a folder with a config.json holds in place of one whole file of weights."""
    kind = guarded(place / "config.json", lambda: _class_name(place / "config.json"))
    if kind != "UNet2DModel":
        return failure(place, f"holds a {kind}", SUPPORTED)
    shards = sorted(place.glob("*-of-*.safetensors")) + sorted(place.glob("*-of-*.bin"))
    if shards:
        what = f"weights in {len(shards)} shards ({shards[0].name}), which are not joined here"
        return failure(place, what, "save it again with save_pretrained(max_shard_size='100GB')")
    others = [path.name for path in sorted(place.iterdir()) if path.suffix != ".json"]
    found = f", but {listing(others)}" if others else ""
    what = f"holds neither of {listing(list(WEIGHT_FILES))}{found}"
    return failure(place, what, "download one of them")


def _class_name(path: Path) -> str | None:
    """_class_name of a JSON of diffusers; None where there is no such file."""
    if not path.is_file():
        return None
    config = guarded(path, lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(config, dict):
        return "JSON that is no object"
    other = config.get("architectures") or config.get("model_type")  # of transformers
    named = config.get("_class_name") or (f"model of {other}" if other else "model of no class")
    return printable(named, 60)


def read_diffusers(folder: Path) -> State:
    """The weights of a DDPM-like UNet2DModel under the names and shapes of DDIMUNet."""
    config, weights = diffusers_files(folder)
    _check_prediction(config.parent)
    levels = len(guarded(config, lambda: _ddim_params(config))["ch_mult"])
    found = tensors_of(read_file(weights), weights)
    state: State = {}
    for name, tensor in found.items():
        new = _ddim_name(name, levels)
        if new in state:
            raise failure(weights, f"two tensors are called {new}", "use another file")
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
        raise failure(path, f"describes a {printable(kind, 60)}, not a UNet2DModel", SUPPORTED)
    for key, (needed, default) in DIFFUSERS_NEEDS.items():
        if config.get(key, default) != needed:
            what = f"{key} is {config.get(key, default)}, DDIMUNet computes with {needed}"
            raise failure(path, what, "use a checkpoint of the DDPM kind")
    widths, size = config["block_out_channels"], _side(path, config["sample_size"])
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


def _side(path: Path, size: Any) -> int:
    """Pixels of a side; newer files may give height and width."""
    sides = size if isinstance(size, list) and size else [size]
    if len(set(map(str, sides))) > 1 or not isinstance(sides[0], int):
        raise failure(path, f"sample_size is {size}, DDIMUNet is square", "use another model")
    return sides[0]


def _check_prediction(folder: Path) -> None:
    """The scheduler beside a unet says what the network predicts."""
    for place in (folder, folder.parent):
        path = place / "scheduler" / "scheduler_config.json"
        if not path.is_file():
            continue
        config = guarded(path, lambda: json.loads(path.read_text(encoding="utf-8")))  # noqa: B023
        kind = config.get("prediction_type", "epsilon") if isinstance(config, dict) else config
        if kind != "epsilon":
            what = f"prediction_type is {printable(kind, 40)}, the samplers here expect epsilon"
            raise failure(path, what, "use a checkpoint that predicts the noise")
        return


def _check_blocks(path: Path, widths: list[int], down: list[str], up: list[str]) -> None:
    """The way up mirrors the way down, and every width is a multiple of the first."""
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    known = set(down) <= {"DownBlock2D", "AttnDownBlock2D"}
    if not known or up != mirrored or len(widths) != len(down):
        raise failure(
            path, f"the blocks {down} and {up} are not those of DDIM", "use another model"
        )
    if any(width % widths[0] for width in widths):
        raise failure(path, f"widths {widths} are not multiples of the first", "use another model")


def _check_single_head(
    path: Path, head_dim: int | None, widths: list[int], attention: list[bool]
) -> None:
    """Attention has one head: its size is absent (null) or the width, the middle included."""
    used = {w for w, has in zip(widths, attention, strict=True) if has} | {widths[-1]}
    if head_dim is not None and used != {head_dim}:
        what = f"attention_head_dim {head_dim} makes several heads, DDIMUNet has one"
        raise failure(path, what, "use a checkpoint of the DDPM kind")


def diffusers_params(folder: str | Path) -> dict[str, Any]:
    """Keyword arguments of DDIMUNet for a diffusers folder, from its config.json.

    Raises CheckpointError when the configuration describes another network.
    """
    path = diffusers_files(Path(folder))[0]
    return guarded(path, lambda: _ddim_params(path))


def scheduler_says(folder: Path, schedule: Mapping[str, Any]) -> str:
    """What the folder's scheduler_config.json, if it has one, asks for that the samplers here with
    `schedule` (betas, beta_start, beta_end, train_timesteps) do not do; empty if nothing."""
    files = [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return ""
    config = guarded(path, lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(config, dict):
        raise failure(path, "holds no JSON object", "download it again")
    betas = config.get("beta_schedule", "linear")
    said = {"beta_schedule": BETAS.get(betas, betas)}
    ours = {"beta_schedule": schedule["betas"]}
    keys = {"num_train_timesteps": "train_timesteps"}
    if said["beta_schedule"] != "cosine":
        keys |= {"beta_start": "beta_start", "beta_end": "beta_end"}
    plain = {
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "trained_betas": None,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
    ours |= plain | {key: schedule[name] for key, name in keys.items()}
    said |= {key: config.get(key, value) for key, value in ours.items() if key not in said}
    said["beta_schedule"] = betas if said["beta_schedule"] != ours["beta_schedule"] else ""
    ours["beta_schedule"] = ""
    return ", ".join(f"{key} {said[key]}" for key in ours if said[key] != ours[key])
