"""Narrow latent diffusion models for tests: all parts of the public ones, few weights."""

from pathlib import Path
from typing import Any

import torch

from tinydm.models.autoencoder import VQAutoencoder, first_stage_from_upstream
from tinydm.models.conditioning import ClassEmbedder
from tinydm.models.pipeline import build_denoiser

FIRST_STAGE = {
    "target": "VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 32,
        "ddconfig": {
            "double_z": False,
            "z_channels": 3,
            "resolution": 16,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 4,
            "ch_mult": [1, 1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "norm_groups": 2,
        },
    },
}
PARAMS = {
    "image_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 8,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 2,
    "norm_groups": 2,
}
CLASSES = {"use_spatial_transformer": True, "context_dim": 8}
CONFIG: dict[str, Any] = {
    "name": "narrow",
    "model": {
        "arch": "ldm_unet",
        "params": PARAMS | CLASSES,
        "first_stage": FIRST_STAGE,
        "conditioning": {"n_classes": 4, "embed_dim": 8},
    },
    "schedule": {"betas": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    "sampler": {"name": "ldm_ddim", "steps": 4, "eta": 0.0, "guidance_scale": 1.5},
    "sampling": {"count": 6, "batch_size": 4, "micro_batch": 4, "seed": 5},
}


def narrow_first_stage() -> VQAutoencoder:
    torch.manual_seed(0)
    return first_stage_from_upstream(FIRST_STAGE)


def write_checkpoint(path: Path, config: dict[str, Any]) -> None:
    """All parts of a configuration in one file, named as in latent diffusion's."""
    model = config["model"]
    torch.manual_seed(0)
    parts = {
        "model.diffusion_model": build_denoiser("ldm_unet", model["params"]),
        "first_stage_model": first_stage_from_upstream(model["first_stage"]),
    }
    if "conditioning" in model:
        sizes = (model["conditioning"]["n_classes"], model["conditioning"]["embed_dim"])
        parts["cond_stage_model"] = ClassEmbedder(*sizes)
    state = {f"{p}.{n}": v for p, module in parts.items() for n, v in module.state_dict().items()}
    torch.save({"state_dict": state}, path)
