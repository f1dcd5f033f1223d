"""What a download may leave, and what it must not throw away."""

import hashlib
import io
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.commands import ROOT
from tests.helpers.narrow import MODEL
from tests.helpers.web import Web, serving
from tinydm.models.checkpoint_files import CheckpointError
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.models.hub_names import is_hub_id, no_path
from tinydm.scripts import download
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.experiment import downloads
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.config import Override, load_config
from tinydm.scripts.experiment.folder_config import config_of_folder


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server on this machine; attempts follow each other at once."""
    monkeypatch.setattr(downloads, "WAIT", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        yield server


def configured(folder: Path, url: str, name: str = "model.ckpt", **more: str) -> Path:
    model = MODEL | {"checkpoint": str(folder / name), "url": url} | more
    path = folder / "narrow.yaml"
    path.write_text(yaml.safe_dump({"name": "narrow", "model": model}))
    return path


@pytest.fixture(scope="module")
def whole() -> bytes:
    """A checkpoint."""
    buffer = io.BytesIO()
    torch.save(DDIMUNet(**MODEL["params"]).state_dict(), buffer)
    return buffer.getvalue()


def fetch(config: Path, *options: str) -> None:
    download.main(["--config", str(config), *options])


def refusal(config: Path, *options: str) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        fetch(config, *options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"narrow.yaml"}


def test_a_checkpoint_is_fetched_once(web: Web, whole: bytes, tmp_path: Path, capsys) -> None:
    web.files["/model.ckpt"] = whole
    config = configured(tmp_path, web.url("/model.ckpt"))
    fetch(config)
    assert (tmp_path / "model.ckpt").read_bytes() == whole
    assert hashlib.sha256(whole).hexdigest() in capsys.readouterr().out
    assert left_of(tmp_path) == {"model.ckpt"}
    fetch(config)
    assert "is there" in capsys.readouterr().out and len(web.asked) == 1


def test_a_broken_connection_is_continued(web: Web, whole: bytes, tmp_path: Path) -> None:
    """Three attempts, of which two break off: no byte comes twice."""
    web.files["/model.ckpt"], web.breaks = whole, [1000, 3000]
    fetch(configured(tmp_path, web.url("/model.ckpt")))
    assert (tmp_path / "model.ckpt").read_bytes() == whole
    assert [asked.get("Range") for asked in web.asked] == [None, "bytes=1000-", "bytes=4000-"]


def test_a_killed_download_is_continued_unless_the_file_changed(
    web: Web, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, web.url("/model.ckpt"))
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    web.files["/model.ckpt"], web.breaks = whole[::-1], [500]
    assert "the connection ended early" in refusal(config)
    assert not (tmp_path / "model.ckpt").exists()
    web.files["/model.ckpt"] = whole  # another version: asked for from 500 on, given from its start
    fetch(config)
    assert (tmp_path / "model.ckpt").read_bytes() == whole
    (tmp_path / "model.ckpt").rename(tmp_path / ".model.ckpt.part")  # killed before its last step
    (tmp_path / ".model.ckpt.part.of").write_text(f"{web.url('/model.ckpt')}\n{web.tag(whole)}\n")
    fetch(config)
    assert left_of(tmp_path) == {"model.ckpt"} and web.asked[-1]["Range"] == f"bytes={len(whole)}-"


def test_servers_that_are_busy_and_files_that_are_gone(
    web: Web, whole: bytes, tmp_path: Path
) -> None:
    web.files["/model.ckpt"], web.busy = whole, 2
    fetch(configured(tmp_path, web.url("/model.ckpt")))
    assert len(web.asked) == 3
    (tmp_path / "model.ckpt").unlink()
    line = refusal(configured(tmp_path, web.url("/gone.ckpt")))
    assert "Not Found" in line and f"put it at {tmp_path / 'model.ckpt'}" in line
    assert len(web.asked) == 4


def test_without_a_network_several_attempts_are_made(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each after twice the wait of the one before."""
    waits: list[float] = []
    monkeypatch.setattr(downloads, "WAIT", 2.0)
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    line = refusal(configured(tmp_path, "http://127.0.0.1:9/model.ckpt"))  # nobody listens there
    assert "Connection refused" in line and f"put it at {tmp_path / 'model.ckpt'}" in line
    assert waits == [2.0, 4.0, 8.0, 16.0]


def test_published_digests_are_compared(web: Web, whole: bytes, tmp_path: Path) -> None:
    web.files["/model.ckpt"] = whole
    for kind in ("sha256", "md5"):
        digest = f"{kind}:{hashlib.new(kind, whole).hexdigest()}"
        fetch(configured(tmp_path, web.url("/model.ckpt"), digest=digest))
        (tmp_path / "model.ckpt").unlink()
        config = configured(tmp_path, web.url("/model.ckpt"), digest=digest[:-4] + "0000")
        assert f"its {kind} is" in refusal(config) and left_of(tmp_path) == set()
    for wrong in ("crc:12", hashlib.sha256(whole).hexdigest(), "md5:", ":", ""):
        config = configured(tmp_path, web.url("/model.ckpt"), digest=wrong)
        assert "must be sha256:HEX or md5:HEX" in refusal(config)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("cifar10", "md5:1fa350b952534ae442b1d5235cce5cd3"),
        ("sd_v1", "sha256:fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556"),
    ],
)
def test_digests_are_pinned_where_they_are_published(name: str, digest: str) -> None:
    assert load_config(ROOT / f"configs/{name}.yaml").model.digest == digest


def test_only_the_web_is_fetched(web: Web, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "other.ckpt").write_bytes(whole)
    local = (tmp_path / "other.ckpt").as_uri()
    web.redirects |= {"/there.ckpt": "ftp://127.0.0.1/model.ckpt", "/here.ckpt": local}
    for url in (local, "ftp://127.0.0.1/model.ckpt", web.url("/there.ckpt")):
        assert "only http and https" in refusal(configured(tmp_path, url))
    assert "file:" in refusal(configured(tmp_path, web.url("/here.ckpt")))
    assert not (tmp_path / "model.ckpt").exists()


@pytest.mark.parametrize("url", ["https://[::1/model", "//host/model", ""])
def test_what_is_no_address_is_refused(tmp_path: Path, url: str) -> None:
    assert refusal(configured(tmp_path, url)).startswith("model.url")


def test_another_part_than_the_missing_one_is_not_kept(
    web: Web, whole: bytes, tmp_path: Path
) -> None:
    """A server that says it continues, and begins anew: the file is asked for as a whole."""
    web.files["/model.ckpt"], web.breaks, web.wrong_parts = whole, [1000], 1
    fetch(configured(tmp_path, web.url("/model.ckpt")))
    assert (tmp_path / "model.ckpt").read_bytes() == whole
    assert [asked.get("Range") for asked in web.asked] == [None, "bytes=1000-", None]


def test_a_part_that_is_a_link_is_not_followed(web: Web, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".model.ckpt.part").symlink_to(tmp_path / "precious")
    web.files["/model.ckpt"] = whole
    fetch(configured(tmp_path, web.url("/model.ckpt")))
    assert (tmp_path / "precious").read_text() == "kept"
    assert not (tmp_path / "model.ckpt").is_symlink()


def test_what_came_is_kept_where_it_can_be_used(web: Web, tmp_path: Path) -> None:
    """An archive of gigabytes is unpacked, not fetched again; of another answer is told whence."""
    config = configured(tmp_path, web.url("/model.ckpt"))
    for content in (b"\x1f\x8b" + bytes(600), b"GGUF" + bytes(600)):
        web.files["/model.ckpt"] = content
        assert str(tmp_path / "model.ckpt") in refusal(config)
        assert (tmp_path / "model.ckpt").read_bytes() == content
        (tmp_path / "model.ckpt").unlink()
    web.files["/model.ckpt"] = b'{"error": "too many requests"}'
    line = refusal(config)
    assert web.url("/model.ckpt") in line and str(tmp_path / "model.ckpt") in line
    assert left_of(tmp_path) == set()


def test_proxies_are_those_of_the_environment(
    web: Web, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files["http://example.invalid/model.ckpt"] = whole
    monkeypatch.setenv("http_proxy", web.url(""))
    monkeypatch.delenv("no_proxy", raising=False)
    fetch(configured(tmp_path, "http://example.invalid/model.ckpt"))
    assert (tmp_path / "model.ckpt").read_bytes() == whole


@pytest.mark.parametrize(
    ("page", "word"),
    [
        (b"<!DOCTYPE html><html>sign in</html>", "an HTML page"),
        (
            b"<html><title>Google Drive - Virus scan warning</title></html>",
            "Google Drive's warning",
        ),
    ],
)
def test_a_web_page_is_told_with_from_and_to(
    web: Web, tmp_path: Path, page: bytes, word: str
) -> None:
    web.files["/uc"] = page
    line = refusal(configured(tmp_path, web.url("/uc")))
    assert word in line and f"{web.url('/uc')}: " in line
    assert f"open it in a browser and put it at {tmp_path / 'model.ckpt'}" in line
    assert left_of(tmp_path) == set()


def test_what_is_damaged_is_fetched_again(web: Web, whole: bytes, tmp_path: Path) -> None:
    config = configured(tmp_path, web.url("/model.ckpt"))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], bytes(flipped)):
        web.files["/model.ckpt"] = damaged
        assert "download it again" in refusal(config)
        assert not (tmp_path / "model.ckpt").exists()
    web.files["/model.ckpt"] = whole
    fetch(config)
    assert (tmp_path / "model.ckpt").read_bytes() == whole


def zipped(content: bytes, name: str = "folder/model.ckpt") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr(name, content)
    return buffer.getvalue()


def damaged_zip(content: bytes) -> bytes:
    damaged = bytearray(zipped(content))
    damaged[200:400] = bytes(200)
    return bytes(damaged)


def test_a_damaged_archive_is_fetched_again(web: Web, whole: bytes, tmp_path: Path) -> None:
    web.files["/elsewhere.zip"] = damaged_zip(whole)
    config = configured(tmp_path, web.url("/elsewhere.zip"))
    assert "damaged, or holds no model.ckpt" in refusal(config)
    assert left_of(tmp_path) == set()


@pytest.mark.parametrize("name", ["model.zip", "elsewhere.zip"])
def test_a_users_own_archive_is_used_and_stays(
    web: Web, whole: bytes, tmp_path: Path, name: str
) -> None:
    config = configured(tmp_path, web.url("/elsewhere.zip"))
    for content in (damaged_zip(whole), zipped(b"else", "a.txt")):
        (tmp_path / name).write_bytes(content)
        line = refusal(config)
        assert "it is kept" in line and (tmp_path / name).read_bytes() == content
    (tmp_path / name).write_bytes(own := zipped(whole))
    fetch(config)
    assert (tmp_path / "model.ckpt").read_bytes() == whole
    assert (tmp_path / name).read_bytes() == own and web.asked == []


def test_a_checkpoint_that_cannot_be_used_now_is_kept(
    web: Web, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    web.files["/model.ckpt"] = whole
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        assert "not enough memory" in refusal(configured(tmp_path, web.url("/model.ckpt")))
    assert (tmp_path / "model.ckpt").read_bytes() == whole


def test_an_archive_stays_until_its_content_is_there(
    web: Web, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files["/elsewhere.zip"] = zipped(whole)
    config = configured(tmp_path, web.url("/elsewhere.zip"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "copyfileobj", full)
        with pytest.raises(OSError, match="No space"):
            fetch(config)
    fetch(config)  # does not fetch it again
    assert (tmp_path / "model.ckpt").read_bytes() == whole and len(web.asked) == 1
    assert left_of(tmp_path) == {"model.ckpt"}


def test_a_full_disk_keeps_what_has_arrived(
    web: Web, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files["/model.ckpt"] = whole

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = configured(tmp_path, web.url("/model.ckpt"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space"):
            fetch(config)
    assert len(web.asked) == 1 and (tmp_path / ".model.ckpt.part").read_bytes() == whole


# ---- the hub ----


def test_models_of_the_hub_are_recognised() -> None:
    assert is_hub_id("google/ddpm-cifar10-32")
    for path in ("model", "a/b/c", "a/model.ckpt", "/a/b", "../b", "a/b.safetensors", "a b/c"):
        assert not is_hub_id(path)


@pytest.mark.parametrize(
    "text",
    [
        "./google/x",
        "google/x/",
        "https://huggingface.co/google/x",
        "hf.co/google/x",
        "hf://google/x",
    ],
)
def test_other_spellings_of_a_model_of_the_hub(tmp_path: Path, text: str) -> None:
    """As a shell completes the name, or as a browser shows it: the configuration's address is none
    of theirs."""
    config = configured(tmp_path, "https://example.invalid/model.ckpt")
    loaded = load_config(config, [Override("model.checkpoint", text, "--ckpt")])
    for fetching in (lambda: fetch(config, "--ckpt", text), lambda: assemble(loaded)):
        with pytest.raises(CheckpointError, match=r"OWNER/NAME: --ckpt google/x$"):
            fetching()
    with pytest.raises(CheckpointError, match=r"OWNER/NAME: --ckpt google/x$"):
        config_of_folder([f"model.checkpoint={text}"])


def test_revisions_of_a_model_of_the_hub() -> None:
    for text in ("google/x@v1.0", "https://huggingface.co/google/x/tree/v1.0"):
        assert "hf download google/x --revision v1.0 --local-dir FOLDER" in str(no_path(text))
    assert no_path("models/x.ckpt") is no_path("../a/b") is no_path("a/b/c") is None


def test_a_model_of_the_hub_needs_its_library(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    config = configured(tmp_path, "https://example.invalid/model.ckpt")
    line = refusal(config, "--ckpt", "google/ddpm-cifar10-32")
    assert "pip install huggingface_hub" in line and "example.invalid" not in line
    loaded = load_config(config, [Override("model.checkpoint", "google/ddpm-cifar10-32", "--ckpt")])
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        assemble(loaded)


def test_a_model_of_the_hub_is_fetched(tmp_path: Path, monkeypatch, capsys) -> None:
    """The library is replaced; where there is no .safetensors, torch's files are asked for too."""
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    config = configured(tmp_path, "https://example.invalid/model.ckpt")
    fetch(config, "--ckpt", "google/ddpm-cifar10-32")
    assert f"google/ddpm-cifar10-32: {tmp_path}" in capsys.readouterr().out
    assert asked == [downloads.HUB_FILES, downloads.HUB_FILES_OF_TORCH]


def test_reference_images_that_are_there_stay(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.npz").write_bytes(b"mine")
    download.main(["--cifar10-reference", str(tmp_path / "mine.npz")])
    assert "mine.npz: is there" in capsys.readouterr().out
    assert (tmp_path / "mine.npz").read_bytes() == b"mine"


def test_help_holds_what_the_command_uses(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        download.main(["--help"])
    told = capsys.readouterr().out
    assert "--ckpt" in told
    for option in ("--prompt", "--steps", "--weight_bit", "--device", "--method"):
        assert option not in told
