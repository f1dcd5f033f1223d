"""Folders and archives of images as people have them, and as hostile people make them."""

import io
import resource
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import forks
from tests.helpers.images import npz, write_images
from tests.helpers.narrow import SAMPLING, write_narrow
from tests.helpers.sampling import sample
from tinydm.scripts import compare, train_ldm
from tinydm.scripts.common.errors import ImageError, MetricError
from tinydm.scripts.common.images import load_images, read_rgb
from tinydm.scripts.common.reference import full_statistics
from tinydm.scripts.metrics import inputs, notes, paired_psnr

MEMORY = 600 * 2**20  # bytes that a refusal may take beside what the process has already


@pytest.fixture
def bounded():
    """Little more memory than now can be had."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def scored(path: Path) -> torch.Tensor:
    return torch.cat(list(inputs.open_source(path).images.batches(2)))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- folders ----


def test_endings_of_any_case_count_and_are_noted(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 4, 0)
    for name, ending in (("001", ".JPEG"), ("002", ".Png"), ("003", ".jpeg")):
        Image.open(folder / f"{name}.png").save(folder / f"{name}{ending}")
        (folder / f"{name}.png").unlink()
    found = inputs.open_source(folder)
    assert len(found.images) == len(scored(folder)) == len(load_images(folder, 32)) == 4
    sides = {"generated": found}
    (note,) = notes(sides, (), {"generated": None}, None, "pytorch-fid")
    assert note.startswith("generated: 2 of 4 images") and "001.JPEG" in note


def test_class_folders_are_read_and_noted(tmp_path: Path) -> None:
    for number in range(2):
        write_images(tmp_path / "classes" / f"n{number}", 2, number)
    found = inputs.open_source(tmp_path / "classes").images
    assert len(found) == len(scored(tmp_path / "classes")) == 4
    assert "4 images of sub-folders" in found.notes[0]
    assert paired_psnr(tmp_path / "classes", tmp_path / "classes")["images"] == 4
    mixed = write_images(tmp_path / "mixed", 3, 0)
    write_images(mixed / "thumbnails", 2, 0, size=8)
    found = inputs.open_source(mixed).images
    assert len(found) == 3 and "2 more images in sub-folders" in found.notes[0]
    assert "sub-folders" not in "".join(inputs.open_source(mixed / "thumbnails").images.notes)


def test_the_root_of_all_files_is_not_searched() -> None:
    for read in (inputs.open_source, lambda path: load_images(path, 8)):
        with pytest.raises((MetricError, ImageError), match="/: is the root of all files"):
            read(Path("/"))


def deep_pictures(folder: Path) -> list[Path]:
    """More than 8 bits a channel in every form that Pillow reads; some it would cut down."""
    folder.mkdir()
    grey = np.full((4, 4), 40_000, np.uint16)
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.float32)).save(folder / "float.tiff")
    Image.fromarray(grey.astype(np.int32)).save(folder / "whole.tif")
    rgb = b"P6 4 4 65535\n" + bytes(4 * 4 * 6)
    (folder / "colour.ppm").write_bytes(rgb)
    (folder / "colour.png").write_bytes(png_of_16_bits())
    return sorted(folder.iterdir())


def png_of_16_bits() -> bytes:
    """4 x 4 pixels of RGB with 16 bits a channel, which Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes((1 + 4 * 6) * 4))
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_deep_pictures_are_refused_everywhere(tmp_path: Path) -> None:
    for path in deep_pictures(tmp_path / "deep"):
        alone = tmp_path / f"of-{path.name}"
        alone.mkdir()
        path.rename(alone / path.name)
        expected = f"{path.name}: has more than 8 bits a channel"
        with pytest.raises(MetricError, match=expected) as error:
            scored(alone)
        one_line(error)
        with pytest.raises(ImageError, match=expected):
            load_images(alone, 4)
        with pytest.raises(MetricError, match=expected):
            paired_psnr(alone, alone)


def bitmap_of_16_bits(path: Path) -> None:
    """2 x 2 red pixels of 5, 6 and 5 bits, which are fewer than 8 a channel."""
    pixels = struct.pack("<HH", 0xF800, 0xF800) * 2
    head = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    head += struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    start = 14 + len(head)
    path.write_bytes(b"BM" + struct.pack("<IHHI", start + 8, 0, 0, start) + head + pixels)


def test_pictures_of_fewer_bits_are_read(tmp_path: Path) -> None:
    bitmap_of_16_bits(tmp_path / "a.bmp")
    assert scored(tmp_path)[0, :, 0, 0].tolist() == [255, 0, 0]


def test_pictures_of_other_endings_are_noted(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 4, 0)
    for name, ending in (("001", ".gif"), ("002", ".jfif")):
        form = "GIF" if ending == ".gif" else "JPEG"
        Image.open(folder / f"{name}.png").save(folder / f"{name}{ending}", form)
        (folder / f"{name}.png").unlink()
    (folder / "notes.txt").write_text("no picture")
    found = inputs.open_source(folder).images
    assert len(found) == 2
    assert found.notes == ["2 files are not counted for their endings, such as 001.gif"]


def test_damaged_tiffs_say_nothing_besides_the_error(tmp_path: Path) -> None:
    """Pillow warns and logs, libtiff prints to stderr itself."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "TIFF", compression="tiff_lzw")
    for end in range(10, len(content.getvalue()), 7):
        for damaged in (content.getvalue()[:end], flipped(content.getvalue(), end)):
            (tmp_path / f"{end}.tif").write_bytes(damaged)

    def read(_: list[str]) -> None:
        for path in tmp_path.iterdir():
            with suppress(ImageError):
                read_rgb(path)

    fork = forks.run(read)
    assert (fork.code, fork.text()) == (0, "")


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


def test_a_picture_that_would_start_a_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EOF\n")
    with pytest.raises(MetricError, match=r"a\.png: cannot be decoded"):
        scored(tmp_path)


def test_foreign_pictures_in_the_samples_are_refused_or_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_narrow(tmp_path, SAMPLING)
    out, holiday = tmp_path / "images", tmp_path / "images" / "holiday.jpg"
    write_images(out, 1, 0)
    (out / "000.png").rename(holiday)
    command = ("--config", tmp_path / "narrow.yaml", "--out", out, "--count", 2)
    assert sample(*command) == 2
    assert "holds other images, such as holiday.jpg" in capsys.readouterr().err
    assert sample(*command, "--overwrite") == 2 and holiday.exists()
    kept = holiday.rename(tmp_path / "holiday.jpg")
    assert sample(*command) == 0
    kept.rename(holiday)
    capsys.readouterr()
    assert sample(*command) == 0
    assert "holds 1 more image files (holiday.jpg), which a score" in capsys.readouterr().out


def test_pictures_of_two_sizes_give_one_line(tmp_path: Path) -> None:
    full, quantized = write_images(tmp_path / "a", 2, 0), write_images(tmp_path / "b", 2, 0, size=8)
    with pytest.raises(ImageError, match="size 8x8 differs from 32x32"):
        compare.picture(full, quantized, 2)


def test_more_columns_than_images_make_no_empty_ones(tmp_path: Path, bounded: None) -> None:
    folder = write_images(tmp_path / "a", 2, 0)
    wide, fitting = (compare.picture(folder, folder, columns) for columns in (10**6, 2))
    assert np.array_equal(wide, fitting)


# ---- bombs ----


def bomb(path: Path) -> None:
    """20 kB that stand for 13,000 x 13,000 pixels: 500 MB as RGB."""
    Image.new("1", (13_000, 13_000)).save(path)


def test_a_bomb_among_the_pictures_is_named(tmp_path: Path, bounded: None) -> None:
    folder = write_images(tmp_path / "images", 3, 0)
    bomb(folder / "001.png")
    assert (folder / "001.png").stat().st_size < 30_000
    for read in (scored, lambda path: load_images(path, 8), lambda path: paired_psnr(path, path)):
        with pytest.raises(
            (MetricError, ImageError), match=r"001\.png: 13000x13000 pixels"
        ) as error:
            read(folder)
        one_line(error)


def inflating(path: Path, **arrays: tuple) -> Path:
    """An npz of zeros that are stored as next to nothing. arrays: name=(shape, type)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (shape, kind) in arrays.items():
            kind = np.dtype(kind)
            header = io.BytesIO()
            form = {"descr": kind.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(header, form)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(header.getvalue())
                left = int(np.prod(shape)) * kind.itemsize
                while left > 0:
                    file.write(bytes(min(left, 2**22)))
                    left -= 2**22
    return path


def test_archives_that_inflate_are_refused_by_member(tmp_path: Path, bounded: None) -> None:
    side = 3000  # a covariance of 72 MB in 70 kB
    statistics = inflating(tmp_path / "s.npz", mu=((side,), "f8"), sigma=((side, side), "f8"))
    with pytest.raises(MetricError, match=r"s\.npz: member mu\.npy has 3000 features") as error:
        inputs.open_source(statistics)
    one_line(error)
    images = inflating(tmp_path / "x.npz", x=((30_000, 32, 32, 3), "u1"))
    with pytest.raises(ImageError, match=r"x\.npz: member x\.npy inflates") as error:
        load_images(images, 32)
    one_line(error)
    compact = inflating(
        tmp_path / "t.npz", mu=((2048,), "f8"), triangle=((10**7,), "f8"), n=((), "i8")
    )
    with pytest.raises(ImageError, match=r"t\.npz: member triangle\.npy claims 80,000,000 bytes"):
        full_statistics(compact)
    labels = inflating(tmp_path / "y.npz", y=((10**7,), "i8"))
    with pytest.raises(ImageError, match=r"y\.npz: member y\.npy claims 80,000,000 bytes"):
        train_ldm.read_labels(str(labels), 12, 3)


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_without_bounds_is_refused(tmp_path: Path, bounded: None, how: int) -> None:
    """A header of 128 bytes, behind which 4 kB of bzip2 stand for 700 MB."""
    header = io.BytesIO()
    form = {"descr": "|u1", "fortran_order": False, "shape": (2, 8, 8, 3)}
    np.lib.format.write_array_header_1_0(header, form)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", how) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(2**22))
    for read in (inputs.open_source, lambda path: load_images(path, 8)):
        with pytest.raises(
            (MetricError, ImageError), match=r"x\.npy is compressed as NumPy"
        ) as error:
            read(tmp_path / "x.npz")
        one_line(error)
    empty = tmp_path / "empty.npz"
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(ImageError, match="the file holds nothing"):
        load_images(empty, 8)


def test_archives_that_are_none_are_named_alike(tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "plain.npy").rename(tmp_path / "plain.npz")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("x.npy", "no array at all")
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as archive:
        header = io.BytesIO()
        form = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(header, form)
        archive.writestr("x.npy", header.getvalue() + bytes(3 * 32 * 32))
    objects = npz(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
    cases = {
        tmp_path / "plain.npz": "plain.npz: one .npy array under the name .npz; save it with",
        tmp_path / "text.npz": "text.npz: member x.npy is no array",
        tmp_path / "many.npz": "many.npz: member x.npy claims 1000000000 images",
        objects: "objects.npz: member x.npy holds Python objects",
        npz(tmp_path / "float.npz", x=np.zeros((2, 8, 8, 3))): "member x.npy is float64",
    }
    for path, message in cases.items():
        for read in (inputs.open_source, lambda path: load_images(path, 8)):
            with pytest.raises((MetricError, ImageError)) as error:
                read(path)
            assert message in one_line(error)


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    mu, sigma = rng.normal(size=4), np.asfortranarray(np.diag(np.arange(1.0, 5.0)))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=pixels, mu=mu, sigma=sigma, n=7, preprocess="tf")
        found = inputs.open_source(tmp_path / "a.npz")
        np.testing.assert_array_equal(found.statistics.mu, mu)
        np.testing.assert_array_equal(found.statistics.sigma, sigma)
        assert (found.statistics.n, found.statistics.preprocess) == (7, "tf")
        assert torch.equal(
            load_images(tmp_path / "a.npz", 8), torch.cat(list(found.images.batches(2)))
        )
