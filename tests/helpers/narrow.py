"""A checkpoint so narrow that a command on it takes seconds, and its configuration."""

from pathlib import Path

import torch
import yaml

from tinydm.models.pipeline import build_denoiser

PARAMS = {
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "norm_groups": 2,
    "image_size": 8,
}
MODEL = {"arch": "ddim_unet", "checkpoint": "narrow.pt", "params": PARAMS}
SAMPLER = {"name": "ddim", "steps": 3, "skip": "quad", "eta": 1.0, "clip_denoised": True}


def write_narrow(folder: Path, config: dict) -> Path:
    """Writes narrow.yaml and narrow.pt into the folder and returns it."""
    torch.manual_seed(0)
    torch.save(build_denoiser("ddim_unet", PARAMS).state_dict(), folder / "narrow.pt")
    (folder / "narrow.yaml").write_text(yaml.safe_dump(config))
    return folder


# Configurations of it: to be sampled, and to be benchmarked in seconds.
SAMPLING = {
    "name": "narrow",
    "model": MODEL,
    "sampler": SAMPLER,
    "sampling": {"count": 7, "batch_size": 4, "micro_batch": 4, "seed": 5},
}
BENCH = {
    "name": "narrow",
    "model": MODEL,
    "sampler": {"name": "ddim", "steps": 3, "skip": "quad", "clip_denoised": True},
    "quant": {
        "search": {"rounds": 2, "batch_size": 2},
        "reconstruct": {
            "iterations": 2,
            "batch_size": 2,
            "finetune_iterations": 3,
            "finetune_batch_size": 2,
        },
    },
    "calibration": {"samples": 8, "batch_size": 2},
    "sampling": {"count": 2, "batch_size": 2, "micro_batch": 2, "seed": 5},
}
