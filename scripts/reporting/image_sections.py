"""The sections about images: both sides, the worst pairs, PSNR."""

import base64
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..bench.measure import median_psnr, pooled_psnr
from ..common.errors import MetricError
from ..common.images import grid
from ..metrics.inputs import read_image
from ..metrics.scores import psnr, squared_error
from .figures import data_uri, sorted_psnr
from .page import Section, missing, paragraph, picture
from .run_folder import Run

SHOWN, COLUMNS = 64, 8
LARGEST_SIDE = 96  # of an image in a grid, in pixels
REMEDY = "sample_diffusion.py makes it (with and without --quantized, --out RUN/NAME)."


def errors_of(run: Run, names: Sequence[str]) -> np.ndarray:
    """Mean squared error of each pair of images, (N,). Raises MetricError."""
    errors = []
    for name in names:
        a, b = (read_image(s.folder / name) for s in (run.full, run.quantized))
        if a.shape != b.shape:
            raise MetricError(f"{run.quantized.folder / name}: another size than in full precision")
        errors.append(squared_error(a, b))
    return np.array(errors)


def images_section(run: Run, names: Sequence[str], errors: np.ndarray) -> Section:
    body = []
    for images, title in ((run.full, "full precision"), (run.quantized, "quantized")):
        if images is None:
            body.append(missing(f"images of the {title} model.", REMEDY))
            continue
        shown = (names or images.names)[:SHOWN]
        words = f"{title}: {images.folder.name}, {len(shown)} of {len(images.names)} images"
        body.append(picture(_grid_uri(images.folder, shown), words, "pixels"))
    parts = [f'<div class="pair">{"".join(body)}</div>']
    if len(names):
        worst = np.argsort(-errors, kind="stable")[:COLUMNS]
        parts.append(_worst(run, [names[i] for i in worst], psnr(errors[worst])))
    return Section("images", "Images", "".join(parts))


def _worst(run: Run, names: Sequence[str], psnr: np.ndarray) -> str:
    """Each pair with its number and PSNR below it."""
    pairs = [
        picture(
            _uri([run.full.folder / name, run.quantized.folder / name], columns=1),
            f"{Path(name).stem}: {value:.1f} dB",
            "pixels",
        )
        for name, value in zip(names, psnr, strict=True)
    ]
    words = paragraph("Full precision above, quantized below, with the PSNR of the pair.", "soft")
    return f'<h3>The most different pairs</h3>{words}<div class="worst">{"".join(pairs)}</div>'


def _grid_uri(folder: Path, names: Sequence[str]) -> str:
    return _uri([folder / name for name in names], min(COLUMNS, len(names)))


def _uri(paths: Sequence[Path], columns: int) -> str:
    images = [Image.fromarray(read_image(path)) for path in paths]
    side = min(LARGEST_SIDE, *(max(image.size) for image in images))
    if any(image.size != (side, side) for image in images):
        images = [image.resize((side, side), Image.Resampling.LANCZOS) for image in images]
    stacked = np.stack([np.asarray(image) for image in images])
    buffer = io.BytesIO()
    Image.fromarray(grid(stacked, columns)).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def psnr_section(names: Sequence[str], errors: np.ndarray) -> Section:
    if not len(names):
        lack = "a folder of full-precision and one of quantized images from the same noise."
        return Section("psnr", "PSNR per image", missing(lack, REMEDY))
    each, pooled = psnr(errors), pooled_psnr(errors[None])
    median = median_psnr(errors[None])
    words = (
        f"PSNR of {len(names)} quantized images to the full-precision images of the same noise: "
        f"pooled {pooled:.2f} dB, median {median:.2f} dB, worst {each.min():.2f} dB, "
        f"best {each.max():.2f} dB."
    )
    uri = data_uri(partial(sorted_psnr, psnr=each, pooled=pooled))
    hint = (
        "The pooled value averages the squared error first, so the few images that turned into "
        "another picture rule it."
    )
    return Section("psnr", "PSNR per image", picture(uri, words) + paragraph(hint, "soft"))
