"""Image sets in, PNG files out."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .arrays import LIKELY_INFLATED, SMALL, check_images, first_line, opened
from .errors import ImageError
from .files import atomic
from .quiet_pillow import quiet_pillow

# What pytorch-fid counts as an image; here in capitals too, as ImageNet has them.
ENDINGS = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What may stand under these names. Others, such as EPS, would start programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PACKED = ("BGR;16", "RGB;16")  # 5 or 6 bits a channel, in 16 together
LARGEST_PICTURE = 2**26  # pixels, 8192 x 8192: decoded it takes 200 MB
quiet_pillow()  # what it would warn of is refused


def is_picture(path: Path) -> bool:
    """Whether a file is an image, by its name."""
    return path.suffix.lower() in ENDINGS


def is_other_picture(path: Path) -> bool:
    """A picture by its name, of a kind that is not read: pytorch-fid reads none of them either."""
    ending = path.suffix.lower()
    return ending in Image.registered_extensions() and ending not in ENDINGS


LAST_CHUNK = b"\0\0\0\0IEND\xaeB`\x82"  # of every PNG
# What Pillow raises for files that are no image or not a whole one.
DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError),
    *(zlib.error, struct.error, Image.DecompressionBombError),
)


def refuse_root(folder: Path) -> None:
    """Raises ImageError for the root of all files, below which every picture would be looked for:
    as of "$UNSET/"."""
    if folder.resolve() == Path(folder.resolve().anchor):
        raise ImageError(f"{folder}: is the root of all files, not a folder of images")


def load_images(source: str | Path, size: int) -> torch.Tensor:
    """All images of a folder (recursive) or of array `x` in a .npz, (N, 3, size, size) uint8.

    Other sizes are centre-cropped to a square and resampled (Lanczos). Raises ImageError.
    """
    source = Path(source)
    if source.suffix == ".npz" and not source.is_dir():
        return _load_array(source, size)
    if not source.is_dir():
        raise ImageError(f"{source}: not a folder of images and not a .npz file")
    refuse_root(source)
    paths = sorted(p for p in source.rglob("*") if is_picture(p) and not p.is_dir())
    if not paths:
        raise ImageError(f"{source}: no image in this folder ({' '.join(ENDINGS)})")
    images = [_square(read_rgb(path, background="white"), size) for path in paths]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _load_array(source: Path, size: int) -> torch.Tensor:
    """Image by image, so that memory is needed for what is kept alone."""
    with opened(source, ImageError) as archive:
        name = "x" if "x" in archive.names else "arr_0"
        header = check_images(archive, name)
        if header.nbytes > SMALL and header.inflated > LIKELY_INFLATED:
            archive.refuse(name, f"inflates {header.inflated:.0f} times; images do not")
        count, height, width, _ = header.shape
        if height * width > LARGEST_PICTURE:
            archive.refuse(name, f"holds {_too_large(width, height)}")
        images = np.empty((count, size, size, 3), np.uint8)
        with archive.open(name) as (stream, _):
            for i in range(count):
                data = stream.read(height * width * 3)
                if len(data) != height * width * 3:
                    archive.refuse(name, f"ends inside image {i}")
                image = np.frombuffer(data, np.uint8).reshape(height, width, 3)
                same = (height, width) == (size, size)
                images[i] = image if same else _square(Image.fromarray(image), size)
            stream.read(1)  # at its end the checksum is compared
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def read_rgb(
    path: Path, background: str | None = None, size: tuple[int, int] | None = None
) -> Image.Image:
    """An image file as 8 bits a channel. background: a colour behind what is transparent, else
    the hidden colours are shown, as pytorch-fid does. size: width and height that it must have.

    Raises ImageError, before it decodes anything, for deeper or too large images.
    """
    if path.exists() and not path.is_file():
        raise ImageError(f"{path}: is no file; take it out of the folder")  # a pipe would wait
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > LARGEST_PICTURE:
                raise ImageError(f"{path}: {_too_large(*image.size)}")
            if _is_deep(image):
                raise ImageError(f"{path}: has more than 8 bits a channel; save it with 8")
            if size is not None and image.size != size:
                what = f"size {image.width}x{image.height} differs from {size[0]}x{size[1]}"
                raise ImageError(f"{path}: {what}")
            return _on_background(image, background).convert("RGB")
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: has more pixels than the {LARGEST_PICTURE:,} allowed") from error
    except Exception as error:  # decoders raise many kinds; each means the same to the user
        raise ImageError(f"{path}: cannot be decoded as an image ({first_line(error)})") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height, from its header. Raises ImageError."""
    if path.exists() and not path.is_file():
        raise ImageError(f"{path}: is no file; take it out of the folder")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception as error:
        raise ImageError(f"{path}: cannot be decoded as an image ({first_line(error)})") from error


def _too_large(width: int, height: int) -> str:
    return f"{width}x{height} pixels, more than the {LARGEST_PICTURE:,} allowed"


def _is_deep(image: Image.Image) -> bool:
    """More than 8 bits a channel, which its mode does not always tell once it is decoded."""
    if image.mode.startswith(("I", "F")):
        return True
    for decoder, _, _, arguments in image.tile:
        parts = arguments if isinstance(arguments, tuple) else (arguments,)
        texts = [part for part in parts if isinstance(part, str) and part not in PACKED]
        if any(";16" in text for text in texts):
            return True
        largest = [part for part in parts if isinstance(part, int)]
        if decoder.startswith("ppm") and max(largest, default=0) > 255:
            return True
    return False


def _on_background(image: Image.Image, colour: str | None) -> Image.Image:
    if colour is None or not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image)


def _square(image: Image.Image, size: int) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)


def to_uint8(x: torch.Tensor, truncate: bool = False) -> torch.Tensor:
    """x in [-1, 1], (B, C, H, W) -> uint8 (B, H, W, C).

    Rounded to nearest as DDIM's writer does, or cut as latent and guided diffusion's do.
    """
    x = ((x.float() + 1) / 2).clamp(0, 1) * 255
    return (x if truncate else x + 0.5).floor().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Writes an image (H, W, 3) or (H, W, 1), uint8, into a folder that is there.

    Raises ImageError for other channels.
    """
    if image.shape[-1] not in (1, 3):
        raise ImageError(f"{path}: {image.shape[-1]} channels are no picture")
    with atomic(path, make_folder=False) as temporary:
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, "PNG")


def is_whole_png(path: str | Path) -> bool:
    """True if all of it is there, its checksums match, and every pixel can be decoded.

    0.2 ms for 32 x 32 pixels and 3 ms for 256 x 256: 10 s and two minutes for 50,000 images.
    """
    try:
        if not Path(path).is_file():  # a pipe would wait for a writer
            return False
        data = Path(path).read_bytes()
        if not data.endswith(LAST_CHUNK):
            return False
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()  # decoding alone does not compare the checksums
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()  # no error where a whole zlib stream ends before the last row
        return _has_all_rows(data)
    except DAMAGED:
        return False


def _has_all_rows(data: bytes) -> bool:
    """Whether the compressed bytes of a PNG unfold to as many as its header asks for."""
    width, height, depth, kind, *_, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    if interlaced:
        return True
    packed, at = b"", 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + size]
        at += 12 + size
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    wanted = height * (1 + -(-width * channels * depth // 8))  # each row behind its filter
    return len(zlib.decompressobj().decompress(packed, wanted)) == wanted


def grid(images: np.ndarray, columns: int, pad: int = 2) -> np.ndarray:
    """images (N, H, W, C) uint8 -> one picture, row by row on white."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    shape = (rows * (height + pad) + pad, columns * (width + pad) + pad, channels)
    picture = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        y, x = pad + (i // columns) * (height + pad), pad + (i % columns) * (width + pad)
        picture[y : y + height, x : x + width] = image
    return picture
