"""What sampling needs beside the denoiser, within the quantized file (`model.bundle`).

Of latent diffusion: the tensors of the first stage and of the class embedder or text tower, in half
precision, and the scale factor. Of a folder of diffusers: its files, with weights in half
precision.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.diffusers_pipeline import DiffusersPipeline
from ...quant.runtime.packed_file import PackedFileError

Tensors = dict[str, torch.Tensor]
FIRST_STAGE, CONDITIONING, SCALE_FACTOR = "first_stage", "conditioning", "scale_factor"
FILE = "file:"  # of a folder of diffusers: file:vae/config.json
ENDINGS = (".json", ".txt", ".model", ".safetensors")


def halved(prefix: str, state: Mapping[str, torch.Tensor]) -> Tensors:
    """A state dict with floats in half precision, but for what is too large for it."""
    found = {}
    for name, value in state.items():
        half = value.detach().cpu().half() if value.is_floating_point() else value
        found[f"{prefix}.{name}"] = half if torch.isfinite(half).all() else value.cpu()
    return found


def bundle_of(pipeline: Any, conditioning: nn.Module | None) -> Tensors:
    """What a quantized file carries beside the denoiser, for `to_bytes`.

    pipeline: of full precision; conditioning: the class embedder or text tower of latent diffusion.
    """
    if isinstance(pipeline, DiffusersPipeline):
        with tempfile.TemporaryDirectory() as folder:
            pipeline.write_parts(Path(folder))
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return {
                f"{FILE}{path.relative_to(folder).as_posix()}": torch.frombuffer(
                    bytearray(path.read_bytes()), dtype=torch.uint8
                )
                for path in files
                if path.suffix in ENDINGS
            }
    found: Tensors = {}
    if pipeline.first_stage is not None:
        found |= halved(FIRST_STAGE, pipeline.first_stage.state_dict())
        found[SCALE_FACTOR] = torch.tensor(pipeline.scale_factor, dtype=torch.float64)
    if conditioning is not None:
        found |= halved(CONDITIONING, conditioning.state_dict())
    return found


@contextmanager
def unpacked(beside: Tensors, source: Path) -> Iterator[Path]:
    """The files of a folder of diffusers in a temporary one. Raises PackedFileError for names that
    lead elsewhere or that nothing here reads."""
    with tempfile.TemporaryDirectory() as folder:
        for name, value in beside.items():
            place = Path(name.removeprefix(FILE))
            fits = name.startswith(FILE) and value.dtype == torch.uint8 and value.dim() == 1
            inside = not place.is_absolute() and ".." not in place.parts and len(place.parts) <= 2
            if not fits or not inside or place.suffix not in ENDINGS:
                raise PackedFileError(f"{source}: damaged: {name!r} is no file of a folder")
            (Path(folder) / place).parent.mkdir(exist_ok=True)
            (Path(folder) / place).write_bytes(value.numpy().tobytes())
        yield Path(folder)
