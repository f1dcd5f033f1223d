"""What was lost or wrong without a word: damaged results, removed folders, other people's files.

python -m pytest tests/test_nothing_lost.py
"""

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.forks import refusal
from tests.helpers.rooms import RESULT, files_of, flip
from tinydm.scripts import evaluate
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.images import is_whole_png, write_png
from tinydm.scripts.common.schema import read_value
from tinydm.scripts.experiment import sampling_run
from tinydm.scripts.experiment.config import load_config, resolved_yaml


@pytest.fixture(scope="module")
def run(room: Path) -> Path:
    """A finished calibration."""
    arguments = ("--config", room / "tiny.yaml", "--out", room / "run")
    assert forks.run(calibrate.main, *arguments, "--set", "quant.method=minmax").code == 0
    return room / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


# ---- the user's YAML ----


def test_a_configuration_of_the_users_is_not_replaced(room: Path, tmp_path: Path) -> None:
    text = "# mine\n" + (room / "tiny.yaml").read_text()
    shutil.copy(room / "tiny.pt", tmp_path)
    for name, main, out in (
        ("x/config.yaml", calibrate.main, "x"),
        ("images.config.yaml", sample_diffusion.main, "images"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        for config in (path, room / "tiny.yaml"):
            ckpt = ("--ckpt", room / "tiny.pt")
            arguments = ("--config", config, *ckpt, "--out", tmp_path / out)
            assert "is a file of yours" in refusal(forks.run(main, *arguments))
        own = ("--config", path, "--ckpt", room / "tiny.pt", "--out", tmp_path / out)
        assert "is a file of yours" in refusal(forks.run(main, *own, "--overwrite"))
        assert path.read_text() == text


@pytest.mark.parametrize("name", ["report.json", "layers.txt", "log.txt"])
def test_reports_of_the_users_are_not_replaced(room: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path)
    line = refusal(forks.run(calibrate.main, *arguments))
    assert f"{name}: is a file of yours and would be replaced; give another --out" in line
    assert files_of(tmp_path) == {name: b"{}"}
    fast = ("--set", "quant.method=minmax")
    assert forks.run(calibrate.main, *arguments, *fast, "--overwrite").code == 0


def test_a_run_reads_its_own_configuration(copy: Path) -> None:
    """OUT/config.yaml as the run resolved it: resumed, and calibrated anew."""
    before = files_of(copy)
    arguments = ("--config", copy / "config.yaml", "--out", copy)
    fork = forks.run(calibrate.main, *arguments, "--resume")
    assert fork.code == 0 and "is there already" in fork.text()
    assert files_of(copy) == before
    assert forks.run(calibrate.main, *arguments, "--overwrite").code == 0
    assert (copy / RESULT).read_bytes() == before[RESULT]
    assert (copy / "config.yaml").read_bytes() == before["config.yaml"]


def test_resolving_is_repeatable(room: Path, tmp_path: Path) -> None:
    """What tells a resolved file from one that somebody wrote."""
    text = resolved_yaml(load_config(room / "tiny.yaml"))
    (tmp_path / "config.yaml").write_text(text)
    assert resolved_yaml(load_config(tmp_path / "config.yaml")) == text


def test_scores_do_not_replace_their_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 8, 8, 3), np.uint8))
    before = (tmp_path / "x.npz").read_bytes()
    for option in ("--save-stats", "--json"):
        line = refusal(forks.run(evaluate.main, tmp_path / "x.npz", option, tmp_path / "x.npz"))
        told = "would overwrite what is" if option == "--save-stats" else "must end in .json"
        assert option in line and told in line, line
    assert (tmp_path / "x.npz").read_bytes() == before


# ---- damaged results ----


@pytest.mark.parametrize("at", [0.02, 0.5, 0.99])
def test_a_damaged_quantized_file_is_not_there_already(room: Path, copy: Path, at: float) -> None:
    flip(copy / RESULT, int(at * (copy / RESULT).stat().st_size))
    arguments = ("--config", copy / "config.yaml", "--out", copy)
    line = refusal(forks.run(calibrate.main, *arguments, "--resume"))
    assert RESULT in line and "--overwrite calibrates anew" in line
    assert forks.run(calibrate.main, *arguments, "--overwrite").code == 0
    assert (copy / RESULT).read_bytes() == (room / "run" / RESULT).read_bytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(pixels: bytes) -> bytes:
    """8 x 8 RGB with a right checksum everywhere, whatever the compressed pixels are."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_png_is_whole_where_it_can_be_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path, np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))
    whole = path.read_bytes()
    assert is_whole_png(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert not is_whole_png(path), at
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert not is_whole_png(path), length
    rows = (b"\0" + bytes(24)) * 8
    path.write_bytes(png_of(zlib.compress(rows)))
    assert is_whole_png(path)
    for pixels in (zlib.compress(rows[:100]), b"", b"no pixels"):
        path.write_bytes(png_of(pixels))
        assert not is_whole_png(path)
    path.unlink()
    os.mkfifo(path)
    assert not is_whole_png(path) and not is_whole_png(tmp_path)


def test_a_damaged_image_is_made_again(room: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "images", tmp_path / "grid.png"
    arguments = ("--config", room / "tiny.yaml", "--out", out, "--grid", picture)
    assert forks.run(sample_diffusion.main, *arguments).code == 0
    before, shown = files_of(out), picture.read_bytes()
    flip(out / "000002.png", len(before["000002.png"]) // 2)
    fork = forks.run(sample_diffusion.main, *arguments)
    assert fork.code == 0 and "5 of 6 images are there already" in fork.text()
    assert files_of(out) == before and picture.read_bytes() == shown
    Image.new("RGB", (9, 9)).save(out / "000003.png")
    line = refusal(forks.run(sample_diffusion.main, *arguments))
    assert "its images are not all of one size" in line


# ---- folders that go ----


@pytest.mark.parametrize("what", ["images", "one image", "everything"])
def test_images_that_go_while_others_are_made(room: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "room" / "images"
    arguments = ("--config", room / "tiny.yaml", "--out", out)

    def remove() -> None:
        gone = {"images": out, "one image": out / "000000.png"}.get(what, out.parent)
        gone.unlink() if gone.is_file() else shutil.rmtree(gone)

    before = forks.before_image(4, remove)
    line = refusal(forks.run(sample_diffusion.main, *arguments, before=before))
    assert "the same command makes what is missing" in line
    assert out.exists() == (what == "one image")  # nothing makes a folder again
    assert forks.run(sample_diffusion.main, *arguments).code == 0
    assert len(files_of(out)) == 6 and out.with_name("images.identity.json").exists()


def test_a_folder_that_is_gone_is_noticed_before_the_next_batch(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"

    def arm() -> None:
        real = sampling_run.to_uint8

        def remove(*args: object) -> torch.Tensor:
            shutil.rmtree(out, ignore_errors=True)  # the next batch may come before the look
            return real(*args)

        sampling_run.to_uint8 = remove

    arguments = ("--config", room / "tiny.yaml", "--out", out)
    line = refusal(forks.run(sample_diffusion.main, *arguments, before=arm))
    assert "was removed while images were made" in line and not out.exists()


# ---- numbers ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0", 0), ("10", 10), ("-3", -3), ("+7", 7), ("1_000", 1000), ("0x10", 16)),
        *(("1.5", 1.5), ("010.5", 10.5), ("1e-4", 1e-4), ("1.e3", 1000.0), (".5", 0.5)),
        *(("-1E+2", -100.0), ("010", "010"), ("0123", "0123"), ("08", "08"), ("-017", "-017")),
        *(("1:30", "1:30"), ("1:30.5", "1:30.5"), (".inf", float("inf")), ("1e", "1e")),
    ],
)
def test_numbers_are_decimal(text: str, value: object) -> None:
    assert read_value(text, "x") == value and type(read_value(text, "x")) is type(value)


@pytest.mark.parametrize(
    "option",
    [
        *(["--set", "sampling.seed=010"], ["--set", "model.params.ch=010"]),
        *(["--set", "model.params.ch_mult=[01]"], ["--classes", "01"], ["--seed", "0x"]),
    ],
)
def test_octal_numbers_are_refused(room: Path, tmp_path: Path, option: list[str]) -> None:
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "x", *option)
    assert "must be a" in refusal(forks.run(sample_diffusion.main, *arguments))


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("0123", 123), ("0", 0), ("000", 0), ("08", 8), ("+07", 7)]
)
def test_numbers_of_options_may_have_leading_zeros(room: Path, text: str, value: int) -> None:
    """As a loop over `seq -w` gives them."""
    args = sample_diffusion.parse_arguments(
        ["--config", str(room / "tiny.yaml"), "--out", "x", "--seed", text, "--eta", "00.5"]
    )
    config = load_config(room / "tiny.yaml", args.overrides)
    assert (config.sampling.seed, config.sampler.eta) == (value, 0.5)


def test_a_file_with_an_octal_number_is_refused(room: Path, tmp_path: Path) -> None:
    text = yaml.safe_dump(yaml.safe_load((room / "tiny.yaml").read_text()))
    (tmp_path / "octal.yaml").write_text(text.replace("seed: 5", "seed: 010"))
    with pytest.raises(ConfigError, match="sampling.seed must be a whole number, is '010'"):
        load_config(tmp_path / "octal.yaml")


@pytest.mark.parametrize(
    ("option", "key"),
    [
        *(("--seed", "calibration.seed=3"), ("--count", "calibration.trajectories=3")),
        *(("--batch-size", "calibration.batch_size=3"), ("-n", "calibration.trajectories=3")),
    ],
)
def test_options_of_sampling_are_no_options_of_calibration(
    room: Path, tmp_path: Path, option: str, key: str
) -> None:
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "x", option, "3")
    line = refusal(forks.run(calibrate.main, *arguments))
    assert f"{option} is of the images" in line and f"--set {key}" in line
    load_config(room / "tiny.yaml", [key])  # what is advised is accepted
    assert not (tmp_path / "x").exists()


# ---- pictures of the first images ----


@pytest.mark.parametrize("name", ["", "/", ".", "grid", "ROOM/tiny.yaml", "TMP/folder.png"])
def test_a_grid_that_is_no_png_file_is_refused(room: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    before = (room / "tiny.yaml").read_bytes()
    path = name.replace("ROOM", str(room)).replace("TMP", str(tmp_path))
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "x", "--grid", path)
    assert "must be a file that ends in .png" in refusal(
        forks.run(sample_diffusion.main, *arguments)
    )
    assert not (tmp_path / "x").exists() and (room / "tiny.yaml").read_bytes() == before
