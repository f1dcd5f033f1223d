"""torchrun with 1, 2 and 4 processes: the same images, trajectories and scores, bit for bit.

python -m pytest tests/test_processes.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from models.pipeline import build_denoiser
from scripts.common.processes import rank_and_world
from scripts.common.strict import ConfigError
from tests.test_metrics import needs_package, weights, write_images  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
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


def torchrun(world: int, script: str, *arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={world}", str(ROOT / script), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def done(command: list[str]) -> str:
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_processes_gives_the_same_images(room: Path, tmp_path: Path) -> None:
    folders = {}
    for world in (1, 2, 4):
        folders[world] = tmp_path / f"images-{world}"
        arguments = ("--config", room / "tiny.yaml", "--out", folders[world])
        out = done(torchrun(world, "sample_diffusion.py", *arguments))
        assert out.count("images made") == 1  # rank 0 speaks
    assert set(files_of(folders[1])) == {f"{i:06d}.png" for i in range(11)}
    assert files_of(folders[1]) == files_of(folders[2]) == files_of(folders[4])
    assert not list(tmp_path.glob("*.lock"))


def test_any_number_of_processes_calibrates_to_the_same_file(room: Path, tmp_path: Path) -> None:
    """10 trajectories in calls of 2: five blocks, so that no world size divides them."""
    contents = []
    for world in (1, 2, 4):
        folder = tmp_path / f"run-{world}"
        arguments = ("--config", room / "tiny.yaml", "--out", folder)
        done(torchrun(world, "calibrate.py", *arguments))
        contents.append((folder / "quantized.safetensors").read_bytes())
    assert contents[0] == contents[1] == contents[2]
    out = done(torchrun(2, "calibrate.py", "--config", room / "tiny.yaml", "--out", folder))
    assert "is there already" in out


@needs_package
def test_any_number_of_processes_scores_the_same(weights: Path, tmp_path: Path) -> None:  # noqa: F811
    ref, gen = write_images(tmp_path / "ref", 5, 0), write_images(tmp_path / "gen", 7, 1)
    results = []
    for world in (1, 2, 4):
        out = tmp_path / f"{world}.json"
        arguments = (ref, gen, "--inception", weights, "--batch-size", 2, "--device", "cpu")
        scores = ("--metrics", "fid,sfid,precision,recall", "--json", out)
        done(torchrun(world, "scripts/evaluate.py", *arguments, *scores))
        result = json.loads(out.read_text())
        results.append({k: v for k, v in result.items() if "second" not in k})
    assert results[0] == results[1] == results[2]
    assert results[0]["images"] == {"reference": 5, "generated": 7}


def test_a_rank_that_dies_stops_the_job_and_the_rest_resumes(room: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "images"
    arguments = ("--config", room / "tiny.yaml", "--steps", 40, "-n", 60, "--batch_size", 2)
    done(
        [sys.executable, str(ROOT / "sample_diffusion.py"), *map(str, (*arguments, "--out", whole))]
    )
    process = subprocess.Popen(
        torchrun(2, "sample_diffusion.py", *arguments, "--out", out),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    victim = None
    limit = time.monotonic() + 120
    while (victim is None or len(list(out.glob("*.png"))) < 4) and time.monotonic() < limit:
        victim = rank_process(process.pid, 1)
        time.sleep(0.002)
    os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "rank      : 1" in stderr and "SIGKILL" in stderr, stderr
    assert 4 <= len(list(out.glob("*.png"))) < 60
    done(torchrun(2, "sample_diffusion.py", *arguments, "--out", out))
    assert files_of(out) == files_of(whole)


def rank_process(parent: int, rank: int) -> int | None:
    """The process that torchrun started as this rank."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in variables:
            return int(child)
    return None


def test_a_rank_that_fails_says_why(room: Path, tmp_path: Path) -> None:
    """Rank 1 meets a full disk (a limit on the size of files): the reason and the rank are told."""
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import os, resource, runpy, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = (ROOT / "sample_diffusion.py", "--config", room / "tiny.yaml")
    command = torchrun(2, str(starter), *arguments, "--out", tmp_path / "images")
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    line = next(li for li in result.stderr.splitlines() if li.startswith("error: rank 1: "))
    assert "000001.png: File too large; make room" in line
    assert "rank      : 1" in result.stderr
    assert result.stderr.count("File too large") == 2  # and in torchrun's summary


def test_calibration_without_its_helper_ends_with_one_line(room: Path, tmp_path: Path) -> None:
    """Without torchrun nobody stops rank 0: it must notice by itself."""
    ranks = []
    for rank in range(2):
        values = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
        keys = ("--set", "calibration.trajectories=4000", "sampler.steps=20")
        arguments = ("--config", room / "tiny.yaml", "--out", tmp_path / "run", *keys)
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "calibrate.py"), *map(str, arguments)],
                env=environment() | {k: str(v) for k, v in values.items()},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    seen = ""
    while "image/s" not in seen and ranks[0].poll() is None:  # the trajectories have begun
        seen += ranks[0].stderr.read(20)
    ranks[1].kill()
    _, stderr = ranks[0].communicate(timeout=120)
    ranks[1].communicate()
    assert ranks[0].returncode == 2
    assert stderr.splitlines()[-1].startswith("error: rank 0: rank 1 is gone")
    assert "Traceback" not in stderr


def port() -> int:
    return 20000 + os.getpid() % 20000


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("x", "1"), ("0", "0")])
def test_nonsense_places_are_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str, world: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match="torchrun"):
        rank_and_world()
