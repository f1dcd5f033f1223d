"""A folder with a tiny network, to calibrate and sample in."""

from pathlib import Path

import torch
import yaml

from tinydm.models.pipeline import build_denoiser

PARAMS = {"ch": 8, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "image_size": 8}


CONFIG = {
    "name": "tiny",
    "model": {"arch": "ddim_unet", "checkpoint": "tiny.pt", "params": PARAMS | {"norm_groups": 2}},
    "sampler": {"name": "ddim", "steps": 3, "skip": "quad", "eta": 1.0},
    "sampling": {"count": 6, "batch_size": 2, "micro_batch": 2, "seed": 5},
    "calibration": {"samples": 48},  # enough for 120 end-to-end steps
    "quant": {
        "search": {"rounds": 2, "batch_size": 4},
        "reconstruct": {"finetune_iterations": 4, "finetune_batch_size": 4},
    },
}


RESULT = "quantized.safetensors"


def write_room(folder: Path) -> Path:
    """tiny.yaml and tiny.pt in a folder that everyone may read."""
    torch.manual_seed(0)
    model = build_denoiser("ddim_unet", CONFIG["model"]["params"])
    torch.save(model.state_dict(), folder / "tiny.pt")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_below(folder: Path) -> set[str]:
    """Names of everything in a folder and those below it."""
    return {path.name for path in folder.rglob("*")}


def flip(path: Path, at: int) -> None:
    """Changes a bit of the byte at this place of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
