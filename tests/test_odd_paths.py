"""Names that are no files or folders: pipes, devices, links that lead nowhere, empty ones.

python -m pytest tests/test_odd_paths.py
"""

import os
import re
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.images import write_images
from tinydm.scripts import (
    benchmark,
    compare,
    evaluate,
    fill_tables,
    report,
    size_table,
    train_ddim,
    train_ldm,
)
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.files import append_lines, check_output, load_tensors, write_text
from tinydm.scripts.common.json_files import read_json
from tinydm.scripts.experiment.config import keep_written


def make_device(path: Path) -> None:
    """As /dev/full."""
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "nothing" / "here")


def make_file(path: Path) -> None:
    path.write_text("of the user")


ODD = [os.mkfifo, make_link_to_itself, make_link_to_nothing]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
ODD_WITH_DEVICE = [*ODD, pytest.param(make_device, marks=AS_ROOT)]
Make = Callable[[Path], None]


def only_line(fork: forks.Fork) -> str:
    """All that a refused command printed."""
    assert fork.code == 2, fork.text()
    lines = fork.text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), fork.text()
    return lines[0]


def run(main: Callable, *arguments: object) -> forks.Fork:
    """A command that waits for ever is ended by its alarm."""
    return forks.run(main, *arguments, before=lambda: signal.alarm(20))


@pytest.mark.parametrize("make", ODD_WITH_DEVICE)
def test_what_is_no_file_is_neither_written_nor_replaced(tmp_path: Path, make: Make) -> None:
    images = write_images(tmp_path / "images", 2, 0)
    for name in ("x.json", "x.npz", "x.png"):
        make(tmp_path / name)
        before = (tmp_path / name).lstat()
        with pytest.raises(ConfigError, match="something else than a file"):
            write_text(tmp_path / name, "text")
        assert os.path.samestat((tmp_path / name).lstat(), before)
    for option, name in (("--json", "x.json"), ("--save-stats", "x.npz")):
        line = only_line(run(evaluate.main, images, images, option, tmp_path / name))
        assert f"argument {option}: {tmp_path / name}: there is something else" in line


def test_a_file_in_place_of_a_folder_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for option, name in (("--json", "file/x.json"), ("--save-stats", "file/below/x.npz")):
        line = only_line(run(evaluate.main, "no images", option, tmp_path / name))
        assert f"{tmp_path / 'file'} is no folder" in line


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_the_name_of_the_output_is_not_replaced(tmp_path: Path, path: str) -> None:
    """It is a file where the output goes to one; root could rename another over it."""

    def check(_: list[str]) -> None:
        os.dup2(os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT), 1)
        check_output(path)

    assert "something else than a file" in only_line(forks.run(check))


@pytest.mark.parametrize("make", [*ODD, Path.mkdir])
def test_a_grid_that_is_no_file(room: Path, tmp_path: Path, make: Make) -> None:
    make(tmp_path / "x.png")
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "images")
    line = only_line(run(sample_diffusion.main, *arguments, "--grid", tmp_path / "x.png"))
    assert str(tmp_path / "x.png") in line and not (tmp_path / "images").exists()


@pytest.mark.parametrize("name", ["", ".", "/"])
@pytest.mark.parametrize("option", ["--json", "--save-stats"])
def test_names_of_no_file(tmp_path: Path, option: str, name: str) -> None:
    images = write_images(tmp_path / "images", 2, 0)
    line = only_line(run(evaluate.main, images, images, option, name))
    assert f"argument {option}: '{name}' is no name of a file" in line


def test_too_long_a_name_is_told_before_the_work(tmp_path: Path) -> None:
    """What is written has a longer name until it is whole."""
    for name in ("x" * 300 + ".json", "x" * 245 + ".json"):
        line = only_line(run(evaluate.main, "no images", "none", "--json", tmp_path / name))
        assert "File name too long; give another name" in line


def test_a_line_about_a_long_name_still_says_what_is_wrong() -> None:
    for length in (240, 5000):
        line = only_line(run(sample_diffusion.main, "--config", "none", "--out", "x" * length))
        assert "File name too long; give another name" in line and len(line) < 600
    line = only_line(run(sample_diffusion.main, "--config", "x" * 5000, "--out", "x"))
    assert line.endswith("(File name too long)") and "xxx...xxx" in line


@pytest.mark.parametrize("option", ["--json", "--save-stats"])
def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path, option: str) -> None:
    images = write_images(tmp_path / "images", 2, 0)
    (tmp_path / "mine.yaml").write_text("name: mine")
    line = only_line(run(evaluate.main, images, images, option, tmp_path / "mine.yaml"))
    assert re.search(r"mine.yaml: must end in .(json|npz);", line)
    assert (tmp_path / "mine.yaml").read_text() == "name: mine"


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (train_ddim.main, ["--data", "", "--out", "x"]),
        (train_ldm.main, ["--config", "x.yaml", "--data", "", "--out", "x"]),
        (evaluate.main, ["", "images", "--metrics", "none"]),
        (evaluate.main, ["images", "images", "--paired", ""]),
        (compare.main, ["--run", "", "--full", "a", "--quantized", "b"]),
        (report.main, [""]),
        (sample_diffusion.main, ["--config", "", "--out", "x"]),
        (sample_diffusion.main, ["--quantized", "", "--out", "x"]),
        (benchmark.main, ["--config", "x.yaml", "--out", "x", "--fid", "--reference", ""]),
        (benchmark.main, ["--speed", "--out", "x", "--configs", ""]),
        (fill_tables.main, [""]),
        (size_table.main, ["--configs", ""]),
    ],
)
def test_a_variable_that_is_not_set_is_not_the_folder_of_today(
    tmp_path: Path, main: Callable, arguments: list[str]
) -> None:
    images = write_images(tmp_path / "images", 2, 0)
    fork = forks.run(main, *arguments, before=lambda: os.chdir(images))
    assert "'' is no name of a file or folder" in only_line(fork)


@pytest.mark.parametrize("below", ["", "below/it"])
@pytest.mark.parametrize("make", [*ODD, make_file])
@pytest.mark.parametrize("command", [calibrate, sample_diffusion, train_ddim, train_ldm])
def test_a_folder_that_cannot_be_one(
    tmp_path: Path, command: ModuleType, make: Make, below: str
) -> None:
    make(tmp_path / "x")
    source = "--data" if command in (train_ddim, train_ldm) else "--config"
    line = only_line(run(command.main, source, "x", "--out", tmp_path / "x" / below))
    assert f"{tmp_path / 'x'} is no folder; give another name" in line


@pytest.mark.parametrize("command", [calibrate, sample_diffusion, train_ddim])
def test_an_empty_name_is_not_the_folder_of_today(command: ModuleType) -> None:
    """As of --out "$UNSET"."""
    assert "'' is no name of a folder" in only_line(run(command.main, "--out", "", "--data", "x"))


@pytest.mark.parametrize("root", ["/", "//", "/tmp/.."])
def test_the_root_of_all_files_is_no_folder_for_results(root: str) -> None:
    """As of --out "$UNSET/"."""
    line = only_line(run(sample_diffusion.main, "--config", "x.yaml", "--out", root))
    assert f"{root}: is the root of all files; give another name" in line


def test_no_metrics_need_a_device_all_the_same(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 2, 0)
    arguments = (images, images, "--metrics", "none", "--device", "gpu")
    assert "--device gpu: must be auto" in only_line(run(evaluate.main, *arguments))


@pytest.mark.parametrize("make", ODD_WITH_DEVICE)
@pytest.mark.parametrize("option", ["--config", "--prompts", "--ckpt", "--quantized"])
def test_what_is_no_file_is_not_read(room: Path, tmp_path: Path, option: str, make: Make) -> None:
    make(tmp_path / "x")
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "images")
    line = only_line(run(sample_diffusion.main, *arguments, option, tmp_path / "x"))
    assert str(tmp_path / "x") in line


@pytest.mark.parametrize("make", ODD_WITH_DEVICE)
def test_results_that_are_no_file(tmp_path: Path, make: Make) -> None:
    make(tmp_path / "results.json")
    assert "results.json: " in only_line(run(fill_tables.main, tmp_path / "results.json"))


def test_results_that_no_memory_holds(tmp_path: Path) -> None:
    with open(tmp_path / "results.json", "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    line = only_line(run(fill_tables.main, tmp_path / "results.json"))
    assert "results.json: not a results.json" in line and "larger than 256 MiB" in line


def test_pipes_in_place_of_what_a_run_has_written(tmp_path: Path) -> None:
    """Reading one would wait for a writer, adding to one for a reader."""
    os.mkfifo(tmp_path / "pipe")
    readers = (
        lambda path: read_json(path, dict),
        load_tensors,
        lambda path: append_lines(path, ["a line"]),
        lambda path: keep_written(path, None, None, False),
    )
    for read in readers:
        with pytest.raises(OSError, match="is no file") as caught:
            read(tmp_path / "pipe")
        assert caught.value.filename == str(tmp_path / "pipe")


@pytest.mark.parametrize("make", [*ODD, make_file])
def test_a_report_of_what_is_no_folder(tmp_path: Path, make: Make) -> None:
    make(tmp_path / "x")
    assert only_line(run(report.main, tmp_path / "x")).endswith("give a run of calibrate.py")


@pytest.mark.parametrize(
    ("ckpt", "words"),
    [
        ("", "model.checkpoint is not set"),
        ("https://example.org/x.ckpt", "is an address; download it"),
        ("nowhere/at/all.ckpt", "no such file; check the path"),
    ],
)
def test_a_checkpoint_that_is_no_path(room: Path, tmp_path: Path, ckpt: str, words: str) -> None:
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "images")
    assert words in only_line(run(sample_diffusion.main, *arguments, "--ckpt", ckpt))


def test_no_metrics_need_no_network(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 2, 0)
    arguments = (images, images, "--metrics", "none", "--inception", tmp_path / "no such file")
    assert run(evaluate.main, *arguments).code == 0
