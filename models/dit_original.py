"""The release of DiT (facebookresearch/DiT, one .pt) as the network that diffusers has of it.

    source = OriginalDiT.open("DiT-XL-2-256x256.pt", vae="path/of/sd-vae-ft-ema")
    denoiser = source.full_precision()

Two things differ from diffusers' own folders of DiT: the frequencies of the timestep's embedding,
and the learned variance, which the steps use (arXiv 2212.09748 samples with 250 steps of DDPM).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import load_state_dict
from .checkpoint_files import CheckpointError, State, failure
from .diffusers_denoiser import DiffusersDenoiser, build, library
from .diffusers_loading import DiffusersFolder, located

CLASS = "DiTTransformer2DModel"
INDEX = {
    "_class_name": "DiTPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "transformer": ["diffusers", CLASS],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "variance_type": "learned_range",
    "clip_sample": False,
    "timestep_spacing": "linspace",
}
# Its names -> those of diffusers. Of the embeddings each block has a copy there.
NAMES = (
    (r"^x_embedder\.proj\.", "pos_embed.proj."),
    (r"^blocks\.(\d+)\.adaLN_modulation\.1\.", r"transformer_blocks.\1.norm1.linear."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer_blocks.\1.ff.net.2."),
    (r"^final_layer\.adaLN_modulation\.1\.", "proj_out_1."),
    (r"^final_layer\.linear\.", "proj_out_2."),
)
EMBEDDINGS = (
    (r"^t_embedder\.mlp\.0\.", "timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "timestep_embedder.linear_2."),
    (r"^y_embedder\.embedding_table\.", "class_embedder.embedding_table."),
)
HEAD_SIZE, LARGEST_WIDTH, ITS_HEADS = 64, 1152, 16  # DiT-XL has heads of 72, the others of 64


def configuration(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of diffusers' class for a state dict. Raises KeyError for another network's."""
    patches = state["x_embedder.proj.weight"]  # (D, C, P, P)
    width, channels, patch, _ = patches.shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = ITS_HEADS if width == LARGEST_WIDTH else max(1, width // HEAD_SIZE)
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": len(state["final_layer.linear.bias"]) // patch**2,
        "num_layers": depth,
        "sample_size": round(state["pos_embed"].shape[1] ** 0.5) * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": len(state["y_embedder.embedding_table.weight"]) - 1,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }


def renamed(state: State, depth: int) -> State:
    """The tensors under diffusers' names; queries, keys and values apart. pos_embed, a constant,
    is left out."""
    found: State = {}
    for name, value in state.items():
        shared = [new for old, new in EMBEDDINGS if re.match(old, name)]
        qkv = re.match(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", name)
        if name == "pos_embed":
            continue
        if shared:
            leaf = name.rpartition(".")[2]
            for i in range(depth):
                found[f"transformer_blocks.{i}.norm1.emb.{shared[0]}{leaf}"] = value
        elif qkv:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                found[f"transformer_blocks.{qkv[1]}.attn1.to_{part}.{qkv[2]}"] = third
        else:
            for old, new in NAMES:
                name = re.sub(old, new, name)
            found[name] = value
    return found


def with_original_frequencies(denoiser: DiffusersDenoiser) -> DiffusersDenoiser:
    """Changes the timestep's embedding of diffusers, whose frequencies end at 1 / 10000, to that of
    the release, which stops one before."""
    for module in denoiser.modules():
        if hasattr(module, "downscale_freq_shift"):
            setattr(module, "downscale_freq_shift", 0)  # noqa: B010 - of no declared type
    denoiser.is_original_dit = True
    return denoiser


@dataclass(frozen=True)
class OriginalDiT(DiffusersFolder):
    """What DiffusersFolder is, of one file. vae: a folder of diffusers' AutoencoderKL."""

    vae: Path = Path()
    weights: str = "ema"

    @classmethod
    def open(  # type: ignore[override]
        cls, text: str | Path, weights: str = "ema", vae: str | Path | None = None
    ) -> "OriginalDiT":
        """Raises CheckpointError for a decoder that is not there."""
        path = Path(text)
        if vae is None:
            what = "a file of the original DiT, which holds no decoder"
            raise failure(path, what, "set model.first_stage.checkpoint to a folder of one")
        folder = located(vae)
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        return cls(path, INDEX, path, path, folder, weights)

    def files(self, with_denoiser: bool) -> list[Path]:
        used = [p for p in self.vae.glob("*") if p.suffix in (".json", ".safetensors", ".bin")]
        return sorted(used) + ([self.path] if with_denoiser else [])

    def full_precision(self) -> DiffusersDenoiser:
        state = load_state_dict(self.path, weights=self.weights)
        try:
            config = configuration(state)
            denoiser = with_original_frequencies(build(CLASS, config, self.path))
            ready = renamed(state, config["num_layers"])
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            what = f"holds no DiT of the original release ({error})"
            raise failure(self.path, what, "name such a file, or a folder of diffusers") from error
        model = denoiser.model
        constant = {n: v for n, v in model.state_dict().items() if n.startswith("pos_embed.pos")}
        self._check(model, ready, set(constant))
        model.load_state_dict({n: v.float() for n, v in ready.items()}, strict=False, assign=True)
        return denoiser.eval().requires_grad_(False)

    def _check(self, model: nn.Module, state: State, constant: set[str]) -> None:
        wanted = {n: v.shape for n, v in model.state_dict().items() if n not in constant}
        given = {n: v.shape for n, v in state.items()}
        odd = sorted({*wanted, *given} - {n for n in wanted if given.get(n) == wanted[n]})
        bad = sorted(n for n, v in state.items() if not torch.isfinite(v).all())
        if odd or bad:
            what = f"tensor {(odd or bad)[0]} is missing, of another shape, NaN or infinite"
            raise CheckpointError(f"{self.path}: {what}; download it again")

    def empty(self) -> DiffusersDenoiser:
        config = configuration(load_state_dict(self.path, weights=self.weights))
        return with_original_frequencies(build(CLASS, config, self.path))

    def scheduler_config(self) -> dict[str, Any]:
        return dict(SCHEDULER)

    def small_files(self) -> dict[Path, bytes]:
        return {
            Path("scheduler/scheduler_config.json"): json.dumps(SCHEDULER).encode(),
            Path("vae/config.json"): (self.vae / "config.json").read_bytes(),
        }

    def assembled(self, given: dict[str, Any]) -> Any:
        diffusers = library()
        more = {"torch_dtype": torch.float32, "local_files_only": True}
        vae = diffusers.AutoencoderKL.from_pretrained(self.vae, **more)
        return diffusers.DiTPipeline(given["transformer"], vae, given["scheduler"])
