"""Readers of images, archives and statistics; paired PSNR."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid import fid_score

from tests.helpers.images import gaussian, load_folder, lying_npz, moments_of, npz, write_images
from tinydm.scripts.common.errors import MetricError
from tinydm.scripts.metrics import inputs, paired_psnr


def test_folder_order_and_batches_equal_the_array(folders, tmp_path):
    pixels = load_folder(folders[0])
    (folders[0] / "notes.txt").write_text("not an image")
    np.savez_compressed(tmp_path / "x.npz", x=pixels)
    for path in (folders[0], tmp_path / "x.npz"):
        images = inputs.open_source(path).images
        batches = list(images.batches(4))
        assert len(images) == 6 and [len(b) for b in batches] == [4, 2]
        assert batches[0].dtype == torch.uint8
        assert torch.equal(torch.cat(batches), torch.from_numpy(pixels).permute(0, 3, 1, 2))


def bad_folder(tmp_path: Path, kind: str) -> Path:
    folder = write_images(tmp_path / kind, 3, 0)
    if kind == "truncated":
        (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:200])
    elif kind == "text":
        (folder / "002.png").write_text("<html>")
    elif kind == "sizes":
        write_images(tmp_path / "big", 1, 0, size=40)
        (tmp_path / "big" / "000.png").rename(folder / "002.png")
    elif kind == "empty":
        for file in folder.iterdir():
            file.rename(file.with_suffix(".gif"))
    return folder


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "001.png: cannot be decoded"),
        ("text", "002.png: cannot be decoded"),
        ("sizes", "002.png: size 40x40 differs from 32x32 of 000.png"),
        ("empty", "empty: no images"),
    ],
)
def test_bad_folders_are_named(tmp_path, kind, message):
    with pytest.raises(MetricError, match=message):
        list(inputs.open_source(bad_folder(tmp_path, kind)).images.batches(2))


def test_bad_npz_files_are_named(tmp_path):
    nan = np.full((4, 4), np.nan)
    objects = np.array([{"a": 1}], dtype=object)
    good = npz(tmp_path / "good.npz", x=np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:300])
    (tmp_path / "text.npz").write_text("<html>")
    flipped = bytearray(good.read_bytes())
    flipped[400] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)  # one pixel: only the checksum tells
    cases = {
        npz(tmp_path / "pickle.npz", x=objects): "pickle.npz",
        npz(tmp_path / "picklemu.npz", mu=objects, sigma=objects): "picklemu.npz",
        npz(tmp_path / "float.npz", x=np.zeros((4, 8, 8, 3))): "float64",
        npz(tmp_path / "grey.npz", x=np.zeros((4, 8, 8), np.uint8)): r"expected uint8 \(N, H, W, 3",
        npz(tmp_path / "none.npz", x=np.zeros((0, 8, 8, 3), np.uint8)): "N > 0",
        npz(tmp_path / "keys.npz", other=np.zeros(3)): "holds other",
        npz(tmp_path / "nan.npz", mu=np.zeros(4), sigma=nan): "sigma is not finite",
        npz(tmp_path / "fit.npz", mu=np.zeros(3), sigma=np.eye(4)): "do not fit",
        npz(tmp_path / "minus.npz", mu=np.zeros(4), sigma=-np.eye(4)): "minus.*not a covariance",
        npz(tmp_path / "vast.npz", mu=np.zeros(2), sigma=np.eye(2) * 1e308): "sigma is not finite",
        npz(tmp_path / "skew.npz", mu=np.zeros(2), sigma=np.tri(2)): "skew.*not a covariance",
        npz(tmp_path / "n.npz", mu=np.zeros(2), sigma=np.eye(2), n=-3): "n is not a number of im",
        lying_npz(tmp_path / "minus-n.npz", (-5, 8, 8, 3)): "N > 0",
        lying_npz(tmp_path / "vast-n.npz", (10**30, 8, 8, 3)): "ends inside image 0",
        tmp_path / "cut.npz": "cut.npz",
        tmp_path / "text.npz": "text.npz",
        tmp_path / "flipped.npz": "flipped.npz",
        lying_npz(tmp_path / "short.npz", (9, 8, 8, 3)): "short.npz.*ends inside image 0",
        tmp_path / "absent.npz": "no such file",
        tmp_path / "absent": "no such folder",
        good.with_suffix(".npz") / "inside": "no such folder",
    }
    for path, message in cases.items():
        with pytest.raises(MetricError, match=message) as caught:
            list(inputs.open_source(path).images.batches(3))
        assert "\n" not in str(caught.value)


def test_statistics_survive_saving(tmp_path):
    x = gaussian(9, 6, 8)
    saved = inputs.Statistics(*moments_of(x), *moments_of(x[:, :4]), n=9, preprocess="tf")
    inputs.save_statistics(tmp_path / "new" / "s.npz", saved)
    found = inputs.open_source(tmp_path / "new" / "s.npz").statistics
    for name, value in vars(saved).items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["s.npz"]
    m, s = fid_score.compute_statistics_of_path(str(tmp_path / "new" / "s.npz"), None, 1, 2048, "")
    np.testing.assert_array_equal(m, saved.mu)
    np.testing.assert_array_equal(s, saved.sigma)


def test_paired_psnr(tmp_path):
    rng = np.random.default_rng(9)
    a = rng.integers(0, 200, (3, 8, 8, 3)).astype(np.uint8)
    b = a.copy()
    b[1] += 10
    b[2] += 20
    for folder, images in (("a", a), ("b", b)):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / folder / f"{i}.png")
    write_images(tmp_path / "a", 1, 0)  # 000.png has no partner
    found = paired_psnr(tmp_path / "a", tmp_path / "b")
    mse = (0 + 100 + 400) / 3
    assert found["mse"] == pytest.approx(mse)
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / mse))
    assert found["psnr_min"] == pytest.approx(10 * math.log10(255**2 / 400))
    assert found["psnr_median"] == pytest.approx(10 * math.log10(255**2 / 100))
    assert (found["images"], found["identical"], found["unpaired"]) == (3, 1, 1)
    same = paired_psnr(tmp_path / "b", tmp_path / "b")
    assert same["psnr"] is None and same["mse"] == 0
    json.dumps(same, allow_nan=False)
    with pytest.raises(MetricError, match="no file name in common"):
        paired_psnr(tmp_path / "b", write_images(tmp_path / "c", 2, 0))
