"""sample_diffusion.py through its command line, on a narrow checkpoint made here.

Most commands run in this process through the wrapper that the script itself uses; those that are
killed, or that are compared with others, run as forks of it.
"""

import json
import os
import pickle
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.commands import command
from tests.helpers.narrow import SAMPLING, write_narrow
from tests.helpers.rooms import files_of
from tests.helpers.sampling import sample
from tinydm.scripts.common.files import remove_stale
from tinydm.scripts.common.images import is_whole_png
from tinydm.scripts.experiment import cli
from tinydm.scripts.experiment.runs import beside

pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with narrow.yaml and narrow.pt."""
    return write_narrow(tmp_path_factory.mktemp("narrow"), SAMPLING)


def names(count: int) -> set[str]:
    return {f"{index:06d}.png" for index in range(count)}


@pytest.fixture(scope="module")
def reference(room: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are compared with, made by a process of its own."""
    folder = tmp_path_factory.mktemp("reference") / "images"
    forks.succeed(sample_diffusion.main, "--config", room / "narrow.yaml", "--out", folder)
    return folder


# ---- images ----


def test_a_run_writes_images_alone_and_reports_beside(reference: Path) -> None:
    assert set(files_of(reference)) == names(7)
    assert Image.open(reference / "000006.png").size == (8, 8)
    contents = {path.read_bytes() for path in reference.iterdir()}
    assert len(contents) == 7
    report = json.loads(beside(reference, "report.json").read_text())
    assert report["images"] == {"count": 7, "made": 7, "found": 0}
    assert report["images_per_second"] > 0 and report["files_bytes"]["checkpoint"] > 1000
    assert yaml.safe_load(beside(reference, "config.yaml").read_text())["sampler"]["steps"] == 3
    assert "7 images made" in beside(reference, "log.txt").read_text()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_size_changes_no_byte(
    room: Path, reference: Path, tmp_path: Path, batch: int
) -> None:
    out = tmp_path / "images"
    arguments = ("--config", room / "narrow.yaml", "--out", out, "--batch_size", batch)
    assert sample(*arguments) == 0
    assert files_of(out) == files_of(reference)


def test_two_processes_make_the_same_folder(room: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    arguments = ("--config", room / "narrow.yaml", "--out", out)
    places = [{"RANK": rank, "WORLD_SIZE": 2} for rank in range(2)]
    ranks = [forks.start(sample_diffusion.main, *arguments, variables=v) for v in places]
    with forks.ended(ranks):
        assert [rank.wait() for rank in ranks] == [0, 0]
    assert files_of(out) == files_of(reference)


def test_another_seed_gives_other_images(room: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    assert sample("--config", room / "narrow.yaml", "--out", out, "--seed", 6, "-n", 2) == 0
    assert files_of(out)["000000.png"] != files_of(reference)["000000.png"]


def test_users_words_are_keys(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    words = [
        "--custom_steps",
        "2",
        "--skip-type",
        "uniform",
        "--eta",
        "0",
        "--n_samples",
        "2",
        "--batch-size",
        "2",
    ]
    arguments = ("--config", room / "narrow.yaml", "-l", out, *words)
    assert sample(*arguments, "--grid", tmp_path / "grid.png") == 0
    resolved = yaml.safe_load(beside(out, "config.yaml").read_text())
    assert resolved["sampler"]["steps"] == 2 and resolved["sampler"]["skip"] == "uniform"
    assert set(files_of(out)) == names(2)
    assert Image.open(tmp_path / "grid.png").size == (8 * 10 + 2, 12)


def test_quantized_file_alone_is_enough(room: Path, tmp_path: Path) -> None:
    keys = ("quant.method=minmax", "calibration.samples=12", "calibration.trajectories=4")
    config = ("--config", room / "narrow.yaml")
    forks.succeed(calibrate.main, *config, "--out", tmp_path, "--set", *keys)
    quantized = tmp_path / "quantized.safetensors"
    gone = ("--ckpt", tmp_path / "gone.pt", "--quantized", quantized)
    assert sample(*gone, "--out", tmp_path / "a", "--batch_size", 3) == 0
    assert sample(*gone, "--out", tmp_path / "b") == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert set(files_of(tmp_path / "a")) == names(7)


# ---- resuming ----


def test_a_killed_run_is_continued(room: Path, tmp_path: Path) -> None:
    """Killed, and with a file cut short: the end is the same, whole files are not touched."""
    arguments = ("--config", room / "narrow.yaml", "-n", 22, "--batch_size", 4)
    assert sample(*arguments, "--out", tmp_path / "whole") == 0
    out = tmp_path / "images"
    deadly = forks.before_image(6, forks.signal_itself(signal.SIGKILL))
    fork = forks.run(sample_diffusion.main, *arguments, "--out", out, before=deadly)
    assert fork.code == -signal.SIGKILL, fork.text()
    found = sorted(out.glob("*.png"))
    assert len(found) == 5
    found[0].write_bytes(found[0].read_bytes()[:-9])
    (out / f".000009.png.{cli.os.uname().nodename}.{fork.pid}.tmp").write_bytes(b"half")
    times = {path.name: path.stat().st_mtime_ns for path in found[1:]}
    assert sample(*arguments, "--out", out) == 0
    assert files_of(out) == files_of(tmp_path / "whole")
    assert times == {name: (out / name).stat().st_mtime_ns for name in times}


def test_more_images_are_added_and_fewer_leave_them(
    room: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "images"
    config = ("--config", room / "narrow.yaml", "--out", out)
    assert sample(*config, "-n", 3) == 0
    assert sample(*config) == 0
    assert files_of(out) == files_of(reference)
    capsys.readouterr()
    assert sample(*config, "-n", 5) == 0
    assert "holds 2 more image files (000005.png, ...)" in capsys.readouterr().out
    assert set(files_of(out)) == names(7)


def test_terminated_is_130_and_whole(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    arguments = ("--config", room / "narrow.yaml", "-n", 1000, "--steps", 50, "--out", out)
    fork = forks.start(sample_diffusion.main, *arguments)
    with forks.ended([fork]):
        while not list(out.glob("*.png")):
            assert fork.running(), fork.text()
            time.sleep(0.005)
        fork.send(signal.SIGTERM)
        assert fork.wait() == 130
    assert fork.text().splitlines()[-1].startswith("error: interrupted")
    assert all(is_whole_png(path) for path in out.iterdir())


def test_another_run_is_refused_and_overwritten(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "images"
    config = ("--config", room / "narrow.yaml", "--out", out)
    assert sample(*config, "-n", 4) == 0
    before = files_of(out)
    capsys.readouterr()
    assert sample(*config, "-n", 2, "--steps", 4) == 2
    error = one_line(capsys)
    assert "sampler.steps is 3, asked 4" in error
    assert files_of(out) == before
    assert sample(*config, "-n", 2, "--steps", 4, "--overwrite") == 0
    assert set(files_of(out)) == names(2)
    capsys.readouterr()  # its bar
    beside(out, "identity.json").unlink()
    assert sample(*config, "-n", 2, "--steps", 4) == 2
    assert "unknown run" in one_line(capsys)
    (out / "holiday.png").write_bytes(b"mine")
    assert sample(*config, "-n", 2, "--overwrite") == 2
    assert "holiday.png" in one_line(capsys) and (out / "holiday.png").exists()


def test_temporaries_of_the_living_stay(tmp_path: Path) -> None:
    host = cli.os.uname().nodename
    (tmp_path / f".a.png.{host}.{os.getppid()}.tmp").touch()
    (tmp_path / f".b.png.{host}.{2**22 + 1}.tmp").touch()
    old, new = tmp_path / ".c.png.elsewhere.7.tmp", tmp_path / ".d.png.elsewhere.7.tmp"
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    assert remove_stale(tmp_path) == 2
    assert {path.name[:3] for path in tmp_path.iterdir()} == {".a.", ".d."}


# ---- bad input ----


def one_line(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


class _Code:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("ran",))


def bad_checkpoints(folder: Path, good: Path) -> dict[str, Path]:
    """Files that are no checkpoint of the narrow model."""
    whole = good.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    contents = {
        "truncated": whole[:-2000],
        "flipped": flipped,
        "empty": b"",
        "html": b"<!DOCTYPE html><html>quota exceeded</html>",
        "garbage": bytes(range(256)) * 40,
        "code": pickle.dumps({"a": _Code()}),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    state = torch.load(good, weights_only=True)
    torch.save({**state, "conv_in.weight": torch.zeros(8, 3, 5, 5)}, folder / "shapes")
    torch.save({**state, "conv_in.bias": torch.full((8,), torch.nan)}, folder / "nan")
    torch.save({"model": state}, folder / "foreign")
    torch.save([_Code()], folder / "code2")
    return {name: folder / name for name in (*contents, "shapes", "nan", "foreign", "code2")}


@pytest.mark.slow
def test_bad_checkpoints(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = bad_checkpoints(tmp_path, room / "narrow.pt") | {"missing": tmp_path / "missing"}
    before = set(tmp_path.iterdir())
    for name, path in paths.items():
        for option in ("--ckpt", "--quantized"):
            arguments = ("--config", room / "narrow.yaml", option, path)
            assert sample(*arguments, "--out", tmp_path / "out" / "images") == 2, name
            assert str(path.name) in one_line(capsys)
    assert set(tmp_path.iterdir()) == before  # nothing was run, nothing written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--set model.params.chh=8", "unknown key model.params.chh (did you mean ch?)"),
        ("--set sampler.name=3", "sampler.name must be text, is 3"),
        ("--steps 1001", "sampler.steps must be within 1..1000, is 1001"),
        ("--steps ten", "sampler.steps must be a whole number"),
        ("--weight_bit 9", "quant.weight.bits must be within 2..8, is 9"),
        ("--aq 1", "quant.activation.bits must be within 2..8, is 1"),
        ("--count 0", "sampling.count must be within"),
        ("--classes 1,2", "sampling.classes is for class-conditional models only"),
        ("--scale 3", "sampler.guidance_scale needs model.conditioning"),
        ("--set model.params.norm_groups=3", "model.params build no denoiser"),
        ("--set model.params.ch=16", "does not fit DDIMUNet"),
        ("--backend int8", "--backend int8: needs --quantized"),
        ("--compile --precision bf16", "--compile: computes in float32; leave --precision out"),
        ("--device tpu", "must be auto, cpu, cuda or cuda:N"),
        ("--stesp 3", "unrecognized arguments: --stesp 3"),
    ],
)
def test_bad_arguments(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: str, message: str
) -> None:
    out = tmp_path / "out" / "images"
    assert sample("--config", room / "narrow.yaml", "--out", out, *arguments.split()) == 2
    assert message in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bad_configuration_as_a_process(room: Path, tmp_path: Path) -> None:
    text = (room / "narrow.yaml").read_text().replace("eta:", "etta:")
    (tmp_path / "bad.yaml").write_text(text)
    line = text.splitlines().index("  etta: 1.0") + 1
    made = command("sample_diffusion.py", tmp_path, "--config", "bad.yaml", "--out", "images")
    done = subprocess.run(**made)
    assert done.returncode == 2 and done.stdout == ""
    expected = f"error: bad.yaml:{line}: unknown key sampler.etta (did you mean eta?)\n"
    assert done.stderr == expected
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_output_that_cannot_be_written(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "images"):
        assert sample("--config", room / "narrow.yaml", "--out", out) == 2
        assert str(tmp_path / "file") in one_line(capsys)
    out = tmp_path / "images"
    inside = ("--config", room / "narrow.yaml", "--out", out, "--grid", out / "grid.png")
    assert sample(*inside) == 2
    assert "must not lie among the images" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_exhausted_memory_and_defects() -> None:
    assert "out of memory" in cli.explain(MemoryError())
    assert "out of memory" in cli.explain(torch.OutOfMemoryError("CUDA"))
    assert "No space left" in cli.explain(OSError(28, "No space left on device", "x.png"))
    assert cli.explain(KeyError("a defect")) is None


def test_a_link_to_a_folder_is_that_folder(room: Path, tmp_path: Path) -> None:
    arguments = ("--config", room / "narrow.yaml", "--count", 2)
    assert sample(*arguments, "--out", tmp_path / "images") == 0
    (tmp_path / "link").symlink_to(tmp_path / "images")
    assert sample(*arguments, "--out", tmp_path / "link") == 0
    assert beside(tmp_path / "link", "identity.json") == tmp_path / "images.identity.json"
