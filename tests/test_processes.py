"""torchrun with 1, 2 and 4 processes: the same images, trajectories and scores, bit for bit.

python -m pytest tests/test_processes.py
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tqdm import tqdm

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.commands import ROOT
from tests.helpers.images import load_folder, needs_package, write_images
from tests.helpers.narrow import BENCH, write_narrow
from tests.helpers.rooms import files_of
from tinydm.models.pipeline import build_denoiser
from tinydm.quant.calibration import end_to_end
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.files import save_tensors
from tinydm.scripts.experiment.processes import rank_and_world, team_of_processes
from tinydm.scripts.metrics import Pass
from tinydm.scripts.metrics.inception import InceptionFeatures
from tinydm.scripts.metrics.inputs import open_source, save_statistics

PARAMS = {"ch": 8, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "image_size": 8}
CONFIG = {
    "name": "tiny",
    "model": {"arch": "ddim_unet", "checkpoint": "tiny.pt", "params": PARAMS | {"norm_groups": 2}},
    "sampler": {"name": "ddim", "steps": 3, "skip": "quad", "eta": 1.0, "clip_denoised": True},
    "sampling": {"count": 11, "batch_size": 3, "micro_batch": 2, "seed": 5},
    "quant": {"method": "minmax"},
    "calibration": {"samples": 16, "trajectories": 10},
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and tiny.pt."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = build_denoiser("ddim_unet", CONFIG["model"]["params"])
    torch.save(model.state_dict(), folder / "tiny.pt")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def torchrun(world: int, script: str | Path, *arguments: object) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, f"--nproc-per-node={world}", str(ROOT / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def port() -> int:
    """A free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(world: int, main: Callable, *arguments: object) -> list[str]:
    """What the ranks of a job print, each of which must succeed."""
    with forks.ended(forks.team(world, main, *arguments, port=port())) as team:
        for rank in team:
            assert rank.wait() == 0, rank.text()
        return [rank.text() for rank in team]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_images(room: Path, tmp_path: Path) -> None:
    folders = {}
    for world in (1, 2, 4):
        folders[world] = tmp_path / f"images-{world}"
        arguments = ("--config", room / "tiny.yaml", "--out", folders[world])
        printed = together(world, sample_diffusion.main, *arguments)
        assert ["images made" in text for text in printed] == [True] + [False] * (world - 1)
    assert set(files_of(folders[1])) == {f"{i:06d}.png" for i in range(11)}
    assert files_of(folders[1]) == files_of(folders[2]) == files_of(folders[4])
    assert not list(tmp_path.glob("*.lock"))


BRIEF = (
    "quant.method=tinydm",
    "quant.search.rounds=2",
    "quant.search.batch_size=4",
    "quant.reconstruct.finetune_iterations=2",
    "calibration.batch_size=3",
)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [("quant.method=minmax",), BRIEF], ids=["minmax", "tinydm"])
def test_any_number_of_processes_calibrates_to_the_same_file(
    room: Path, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """10 trajectories in calls of 2: five blocks, so that no world size divides them. tinydm has
    channel scales when the ranges are found, and batches of 3, 3 and 2 trajectories a step."""
    contents = []
    for world in (1, 2, 3):
        out = tmp_path / f"run-{world}"
        arguments = ("--config", room / "tiny.yaml", "--out", out, "--set", *keys)
        together(world, calibrate.main, *arguments)
        contents.append((out / "quantized.safetensors").read_bytes())
    assert contents[0] == contents[1] == contents[2]
    printed = together(2, calibrate.main, *arguments)
    assert "is there already" in printed[0] and printed[1] == ""


@pytest.mark.slow
def test_two_ranks_of_torchrun_calibrate_to_the_bytes_of_one(tmp_path: Path) -> None:
    """Of a network with attention and two resolutions, by the command that a user types."""
    config = write_narrow(tmp_path, BENCH) / "narrow.yaml"
    more = ("--set", "calibration.trajectories=4")
    together(1, calibrate.main, "--config", config, "--out", tmp_path / "one", *more)
    process = torchrun(2, "calibrate.py", "--config", config, "--out", tmp_path / "two", *more)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert printed.count("quantized.safetensors: ") == 1
    one, two = (tmp_path / name / "quantized.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_rank_ends_all_alike(room: Path, tmp_path: Path) -> None:
    def broken(arguments: list[str]) -> None:
        real, factor = end_to_end._loss, math.nan if os.environ["RANK"] == "1" else 1.0
        end_to_end._loss = lambda *given: real(*given) * factor
        calibrate.main(arguments)

    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "run", "--set", *BRIEF)
    with forks.ended(forks.team(2, broken, *arguments, port=port())) as team:
        for number, rank in enumerate(team):
            rank.wait()
            line = forks.refusal(rank)
            assert line.startswith(f"error: rank {number}: calibration diverged, finetune: ")
            assert "nan at iteration 1 of 2" in line


@pytest.mark.slow
def test_another_number_of_processes_goes_on_behind_any_phase(room: Path, tmp_path: Path) -> None:
    """One process is killed as soon as the phase is saved; two go on."""
    arguments = ("--config", room / "tiny.yaml", "--set", *BRIEF, "--out")
    together(1, calibrate.main, *arguments, tmp_path / "whole")
    whole = (tmp_path / "whole" / "quantized.safetensors").read_bytes()
    for phase in ("trajectories", "equivalent", "search"):
        out = tmp_path / phase
        deadly = forks.after_phase(phase, forks.signal_itself(signal.SIGKILL))
        fork = forks.run(calibrate.main, *arguments, out, before=deadly)
        assert fork.code == -signal.SIGKILL, fork.text()
        printed = together(2, calibrate.main, *arguments, out, "--resume")
        assert "resumed after: trajectories" in printed[0] and f"{phase}\n" in printed[0]
        assert (out / "quantized.safetensors").read_bytes() == whole


@pytest.mark.slow
@needs_package
def test_any_number_of_processes_scores_the_same(
    network: InceptionFeatures,
    tmp_path: Path,
) -> None:
    """Everything that the scores are made of; the scores themselves see rank 0 alone."""
    folder = write_images(tmp_path / "images", 7, 1)
    np.savez(tmp_path / "images.npz", x=load_folder(folder))

    def gather(arguments: list[str]) -> None:
        source, out = arguments
        found = Pass({"pool", "spatial", "features"})
        with team_of_processes() as team:
            found.run(open_source(source), network, 2, tqdm(disable=True), team)
        if team.rank == 0:
            save_statistics(out, found.statistics("pytorch-fid"))
            save_tensors(f"{out}.pt", torch.cat(found.features))

    made = []
    for number, (world, name) in enumerate([(1, "images"), (3, "images.npz")]):
        out = tmp_path / f"{number}.npz"
        together(world, gather, tmp_path / name, out)
        made.append((vars(open_source(out).statistics), torch.load(f"{out}.pt", weights_only=True)))
    for statistics, features in made[1:]:
        assert torch.equal(features, made[0][1]) and features.shape == (7, 2048)
        for name, value in made[0][0].items():
            np.testing.assert_array_equal(statistics[name], value)


@pytest.mark.slow
def test_a_rank_that_dies_stops_the_job_and_the_rest_resumes(room: Path, tmp_path: Path) -> None:
    """Under torchrun itself; then 4 processes go on where its 2 stopped."""
    whole, out, starter = tmp_path / "whole", tmp_path / "images", tmp_path / "starter.py"
    arguments = ("--config", room / "tiny.yaml", "--batch_size", 2)
    together(1, sample_diffusion.main, *arguments, "--out", whole)
    starter.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import sample_diffusion\n"
        "from tinydm.scripts.experiment import sampling_run\n"
        "def write_png(path, image, real=sampling_run.write_png):\n"
        "    if path.name == '000009.png':\n"  # of rank 1
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(path, image)\n"
        "sampling_run.write_png = write_png\n"
        "sample_diffusion.main()\n"
    )
    process = torchrun(2, starter, *arguments, "--out", out)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "rank      : 1" in stderr and "SIGKILL" in stderr, stderr
    assert 0 < len(list(out.glob("*.png"))) < 11
    together(4, sample_diffusion.main, *arguments, "--out", out)
    assert files_of(out) == files_of(whole)


@pytest.mark.slow
def test_a_rank_that_fails_says_why(room: Path, tmp_path: Path) -> None:
    """Only its machine lacks the checkpoint: torchrun's summary has the rank and the reason."""
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import os, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv += ['--ckpt', 'gone.pt']\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = (ROOT / "sample_diffusion.py", "--config", room / "tiny.yaml")
    process = torchrun(2, starter, *arguments, "--out", tmp_path / "images")
    _, stderr = process.communicate(timeout=600)
    assert process.returncode != 0
    before, _, summary = stderr.partition("Root Cause")
    assert "error: rank 1: gone.pt: no such file" in before
    assert "rank      : 1" in summary and "gone.pt: no such file" in summary, summary


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "sent", "keys"),
    [
        ("image/s", signal.SIGKILL, ("calibration.trajectories=4000",)),
        (
            "eps error",
            signal.SIGINT,
            ("calibration.trajectories=20", "calibration.samples=400", "quant.method=e2e"),
        ),
    ],
    ids=["trajectories", "steps"],
)
def test_calibration_without_its_helper_ends_with_one_line(
    room: Path, tmp_path: Path, begun: str, sent: signal.Signals, keys: tuple[str, ...]
) -> None:
    """Without torchrun nobody stops rank 0: it must notice by itself."""
    keys = ("--set", "sampler.steps=20", *keys)
    arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "run", *keys)
    started = forks.team(2, calibrate.main, *arguments, port=port())
    with forks.ended(started) as (first, helper):
        while begun not in first.text():
            assert first.running(), first.text()
            time.sleep(0.01)
        helper.send(sent)
        assert helper.wait() == (130 if sent == signal.SIGINT else -sent), helper.text()
        assert first.wait() == 2
        assert first.errors() == [first.text().splitlines()[-1]]
        assert first.errors()[0].startswith("error: rank 0: rank 1 is gone")


@pytest.mark.parametrize(
    ("rank", "world"), [("2", "2"), ("9" * 5000, "2"), ("-1", "2"), ("x", "1"), ("0", "0")]
)
def test_nonsense_places_are_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str, world: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match="torchrun"):
        rank_and_world()
