"""What a quantized file says of its denoiser, enough to build it again without weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .diffusers_denoiser import DiffusersDenoiser, build
from .dit_original import with_original_frequencies
from .pipeline import ARCHITECTURES, DIFFUSERS, build_denoiser


def describe(arch: str, params: Mapping[str, Any], denoiser: nn.Module) -> dict[str, Any]:
    """Plain values for built(). arch, params: of the configuration."""
    if isinstance(denoiser, DiffusersDenoiser):
        config = {k: v for k, v in denoiser.model.config.items() if not k.startswith("_")}
        found = {"arch": DIFFUSERS, "class": denoiser.class_name, "config": config}
        return found | ({"original_dit": True} if denoiser.is_original_dit else {})
    return {"arch": arch, "params": dict(params)}


def built(description: Mapping[str, Any]) -> nn.Module:
    """The denoiser, its weights on the meta device. Raises ValueError for a description that is
    none, and CheckpointError where diffusers is missing."""
    arch = description.get("arch")
    if arch == DIFFUSERS:
        config = description.get("config") or {}
        denoiser = build(str(description.get("class")), config, "the file")
        original = description.get("original_dit")
        return with_original_frequencies(denoiser) if original else denoiser
    if arch not in ARCHITECTURES:
        raise ValueError(f"describes no denoiser that is known here: {arch}")
    with torch.device("meta"):
        return build_denoiser(arch, description.get("params") or {})
