"""Tiny pipelines of diffusers with random weights, as folders."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import nn

from tinydm.scripts.experiment.assembly import Assembly, assemble
from tinydm.scripts.experiment.folder_config import config_of_folder

WIDTHS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
PROMPTS = ["a b", "c d e"]
SEED = 7  # of sampled images


def pixel_unet(**more: Any) -> nn.Module:
    """With classes, heads and scale_shift, which DDIMUNet has not."""
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {"sample_size": 8, "attention_head_dim": 4}
    return diffusers.UNet2DModel(**(WIDTHS | blocks | sizes | more))


def text_unet(**more: Any) -> nn.Module:
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {"sample_size": 8, "attention_head_dim": 2, "cross_attention_dim": 8}
    return diffusers.UNet2DConditionModel(**(WIDTHS | blocks | sizes | more))


def decoder() -> nn.Module:
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    return diffusers.AutoencoderKL(
        **blocks, block_out_channels=[8], norm_num_groups=4, latent_channels=4, sample_size=8
    )


def text_parts(folder: Path) -> tuple[Any, Any]:
    """A text tower of 12 words and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = [*"abcde", *(f"{c}</w>" for c in "abcde"), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = CLIPTextConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=10,
        eos_token_id=11,
    )
    return CLIPTextModel(config), CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)


def make_pipeline(kind: str, folder: Path, scheduler: Any, **saved: Any) -> Path:
    """kind: pixels, classes, text, dit or consistency. saved: as of save_pretrained."""
    torch.manual_seed(0)
    if kind == "pixels":
        pipe = diffusers.DDPMPipeline(pixel_unet(), scheduler)
    elif kind == "classes":
        unet = pixel_unet(num_class_embeds=5, resnet_time_scale_shift="scale_shift")
        pipe = diffusers.DDPMPipeline(unet, scheduler)
    elif kind == "consistency":
        pipe = diffusers.ConsistencyModelPipeline(pixel_unet(), scheduler)
    elif kind == "text":
        text, tokenizer = text_parts(folder / "words")
        pipe = diffusers.StableDiffusionPipeline(
            decoder(), text, tokenizer, text_unet(), scheduler, None, None, None, False
        )
    else:
        pipe = diffusers.DiTPipeline(small_dit(), decoder(), scheduler)
    pipe.save_pretrained(folder, **saved)
    return folder


def small_dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )


def small_pixart() -> nn.Module:
    """Whose forward takes the text before the timestep."""
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        use_additional_conditions=False,
    )


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """dB, of values in [0, 1]."""
    return float(-10 * (a.double() - b.double()).square().mean().clamp(min=1e-15).log10())


def pictures(folder: Path) -> torch.Tensor:
    """The PNG files of a folder, in [0, 1]."""
    files = sorted(folder.glob("*.png"))
    images = [
        torch.frombuffer(bytearray(Image.open(f).tobytes()), dtype=torch.uint8) for f in files
    ]
    return torch.stack(images) / 255


def assembled(folder: Path, *overrides: str) -> Assembly:
    """The folder's pipeline with four steps, two rows a call."""
    ours = ["sampling.micro_batch=2", "sampler.steps=4", *overrides]
    return assemble(config_of_folder([f"model.checkpoint={folder}", *ours]))


def sampled(assembly: Assembly, count: int = 3, classes: list[int] | None = None) -> torch.Tensor:
    """In [0, 1], (B, C, H, W)."""
    x = assembly.pipeline.sample(assembly.denoiser, range(count), SEED, classes)
    return (x / 2 + 0.5).clamp(0, 1)
