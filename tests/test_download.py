"""What a download may leave, and what it must not throw away."""

import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.narrow import MODEL
from tinydm.models.checkpoint_files import CheckpointError
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.scripts import download


def configured(folder: Path, source: Path, name: str = "model.ckpt") -> Path:
    model = MODEL | {"checkpoint": str(folder / name), "url": source.as_uri()}
    path = folder / "narrow.yaml"
    path.write_text(yaml.safe_dump({"name": "narrow", "model": model}))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere.ckpt"
    torch.save(DDIMUNet(**MODEL["params"]).state_dict(), path)
    return path


def fetch(config: Path) -> None:
    download.main(["--config", str(config)])


def test_a_checkpoint_is_fetched_once(source: Path, tmp_path: Path, capsys) -> None:
    config = configured(tmp_path, source)
    fetch(config)
    assert (tmp_path / "model.ckpt").read_bytes() == source.read_bytes()
    fetch(config)
    assert "is there" in capsys.readouterr().out


def test_a_web_page_is_removed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><html>sign in</html>")
    with pytest.raises(CheckpointError, match="HTML page"):
        fetch(configured(tmp_path, page))
    assert not (tmp_path / "model.ckpt").exists()


def test_what_is_damaged_is_fetched_again(source: Path, tmp_path: Path) -> None:
    whole = source.read_bytes()
    config = configured(tmp_path, source)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], bytes(flipped)):
        source.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="download it again"):
            fetch(config)
        assert not (tmp_path / "model.ckpt").exists()
    source.write_bytes(whole)
    fetch(config)
    assert (tmp_path / "model.ckpt").read_bytes() == whole


def test_a_damaged_archive_is_fetched_again(source: Path, tmp_path: Path) -> None:
    archive = tmp_path / "elsewhere.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
        members.write(source, "model.ckpt")
        start = members.infolist()[0].header_offset + 60
    damaged = bytearray(archive.read_bytes())
    damaged[start : start + 200] = bytes(200)
    archive.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged, or holds no model.ckpt"):
        fetch(configured(tmp_path, archive))
    assert not (tmp_path / "model.zip").exists() and not (tmp_path / "model.ckpt").exists()


def test_a_checkpoint_that_cannot_be_used_now_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises(CheckpointError, match="not enough memory"):
            fetch(configured(tmp_path, source))
    assert (tmp_path / "model.ckpt").read_bytes() == source.read_bytes()


def test_an_archive_stays_until_its_content_is_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "elsewhere.zip"
    with zipfile.ZipFile(archive, "w") as members:
        members.write(source, "folder/model.ckpt")
    config = configured(tmp_path, archive)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "copyfileobj", full)
        with pytest.raises(OSError, match="No space"):
            fetch(config)
    kept = tmp_path / "model.zip"
    assert kept.read_bytes() == archive.read_bytes()
    archive.unlink()  # the second run does not fetch it again
    fetch(config)
    assert (tmp_path / "model.ckpt").read_bytes() == source.read_bytes() and not kept.exists()
