"""Images that threads write beside the device: all of them, the same bytes, errors told.

python -m pytest tests/test_writers.py
"""

import errno
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.rooms import files_of
from tinydm.scripts.common.errors import RunError
from tinydm.scripts.common.images import write_png
from tinydm.scripts.common.writers import Writers
from tinydm.scripts.experiment import sampling_run
from tinydm.scripts.experiment.assembly import assemble
from tinydm.scripts.experiment.config import load_config
from tinydm.scripts.experiment.runs import png_name
from tinydm.scripts.experiment.sampling_run import SamplingRun, make_images


def test_no_more_than_the_bound_wait() -> None:
    gate, begun, put = threading.Event(), [], []

    def call(i: int) -> None:
        begun.append(i)
        gate.wait(10)

    def fill() -> None:
        with Writers(threads=2, most=3) as writers:
            for i in range(5):
                writers.put(call, i)
                put.append(i)

    caller = threading.Thread(target=fill)
    caller.start()
    deadline = time.monotonic() + 5
    while len(put) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert put == [0, 1, 2] and begun == [0, 1]
    gate.set()
    caller.join(10)
    assert put == list(range(5)) and sorted(begun) == list(range(5))


def test_the_first_error_is_raised_and_the_rest_is_done() -> None:
    done = []

    def call(i: int) -> None:
        if i in (2, 3):
            raise OSError(errno.ENOSPC, "no room", str(i))
        done.append(i)

    with pytest.raises(OSError, match="no room") as raised, Writers(4, most=100) as writers:
        for i in range(6):
            writers.put(call, i)
    assert raised.value.filename == "2" and {0, 1} <= set(done)


def test_what_was_put_is_done_where_the_block_fails() -> None:
    done = []

    def call(i: int) -> None:
        time.sleep(0.02)
        done.append(i)

    with pytest.raises(KeyboardInterrupt), Writers(2, most=100) as writers:
        for i in range(6):
            writers.put(call, i)
        raise KeyboardInterrupt
    assert sorted(done) == list(range(6))


def test_the_files_are_the_same_with_any_number_of_threads(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(room / "tiny.yaml")
    assembly = assemble(config)
    folders = [tmp_path / name for name in ("one", "four", "alone")]
    for folder in folders:
        folder.mkdir()
    runs = [SamplingRun(config, assembly, folder, torch.device("cpu")) for folder in folders]
    make_images(runs[0], list(range(6)))
    monkeypatch.setattr(sampling_run, "Writers", lambda threads, most: Writers(4, most))
    make_images(runs[1], list(range(6)))
    truncate = False
    x = assembly.pipeline.sample(assembly.denoiser, range(2), config.sampling.seed)
    for i, image in enumerate(sampling_run.to_uint8(x, truncate).numpy()):
        write_png(folders[2] / png_name(i), image)
    one, four, alone = map(files_of, folders)
    assert len(one) == 6 and one == four and alone.items() <= one.items()


def test_a_full_disk_is_told_with_the_image(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images before it stay, and the folder holds no part of a file."""

    def write(path: Path, image: np.ndarray) -> None:
        if path.name == png_name(3):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_png(path, image)

    monkeypatch.setattr(sampling_run, "write_png", write)
    config = load_config(room / "tiny.yaml")
    run = SamplingRun(config, assemble(config), tmp_path, torch.device("cpu"))
    with pytest.raises(OSError, match="No space") as raised:
        make_images(run, list(range(6)))
    assert Path(raised.value.filename).name == png_name(3)
    assert {png_name(i) for i in range(3)} <= set(files_of(tmp_path)) < set(map(png_name, range(6)))


def test_a_folder_that_is_gone(room: Path, tmp_path: Path) -> None:
    config = load_config(room / "tiny.yaml")
    run = SamplingRun(config, assemble(config), tmp_path / "images", torch.device("cpu"))
    with pytest.raises(RunError, match="was removed"):
        make_images(run, [0])
