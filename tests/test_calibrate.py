"""calibrate.py as a command line: its file, kill -9 and --resume, refusals, sampling from the file.

python -m pytest tests/test_calibrate.py
"""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.commands import CONFIG, QUICK, command, done, refusal
from tinydm.models.ddim_unet import DDIMUNet
from tinydm.quant.runtime.packed_file import read_metadata

FINETUNE = ("quant.reconstruct.finetune_iterations=12", "quant.reconstruct.finetune_batch_size=8")
METHODS = ("tinydm", "e2e", "qdiffusion", "ptqd", "apqdm", "ptq4dm", "minmax")
FILES = {"quantized.safetensors", "config.yaml", "report.json", "layers.txt", "log.txt"}


def calibration(home: Path, out: str, *more: str, method: str = "tinydm") -> dict:
    values = (f"quant.method={method}", *QUICK, *(FINETUNE if method == "tinydm" else ()))
    arguments = ("--config", "narrow.yaml", "--out", out, "--set", *values, *more)
    return command("calibrate.py", home, *arguments)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and its checkpoint of 45 thousand random parameters."""
    folder = tmp_path_factory.mktemp("calibrate")
    torch.manual_seed(0)
    params = {"ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}
    model = DDIMUNet(ch=8, image_size=16, norm_groups=4, **params)
    torch.save(model.state_dict(), folder / "narrow.pt")
    (folder / "narrow.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The folder of an uninterrupted run of tinydm."""
    done(calibration(home, "whole"))
    return home / "whole"


def killed(made: dict, state: Path) -> list[str]:
    """Starts a calibration, kills it as soon as it has saved; returns the phases it had done."""
    before = state.stat().st_mtime_ns if state.exists() else None
    process = subprocess.Popen(**made)
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if state.exists() and state.stat().st_mtime_ns != before:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    return torch.load(state, weights_only=True)["state"]["done"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_file_and_a_complete_table(
    method: str, home: Path, whole: Path
) -> None:
    folder = whole
    if method != "tinydm":
        folder = home / method
        done(calibration(home, method, method=method))
    assert {path.name for path in folder.iterdir()} == FILES
    report = json.loads((folder / "report.json").read_text())
    state = torch.load(home / "narrow.pt", weights_only=True)
    weights = {n.removesuffix(".weight"): v.numel() for n, v in state.items() if v.dim() > 1}
    rows = {row["name"]: row for row in report["layers"]}
    assert {n: row["weights"] for n, row in rows.items() if row["weights"]} == weights
    assert report["weights_quantized"] == 1.0
    assert report["macs_quantized"] + report["macs_once_per_timestep"] == pytest.approx(1.0)
    assert report["macs_quantized"] > 0.95
    for name, row in rows.items():
        assert row["macs"] > 0, name
        if name in weights:
            kept = name.startswith("temb.") or name.endswith("temb_proj")
            edge = name in ("conv_in", "conv_out")
            assert row["weight_bits"] == (8 if kept or edge else 4), name
            assert bool(row["activation_bits"]) != kept, name
        else:
            assert row["weight_bits"] is None and row["activation_bits"] == [8, 8], name
    split = {n for n, row in rows.items() if len(row["activation_bits"]) == 2 and n in weights}
    assert bool(split) == (method not in ("ptq4dm", "minmax"))
    size = (folder / "quantized.safetensors").stat().st_size
    assert report["bytes"] == size
    assert report["ratio_to_float32"] == pytest.approx(size / (4 * sum(_numel(state))))
    table = (folder / "layers.txt").read_text()
    assert all(name in table for name in rows)
    metadata = read_metadata(folder / "quantized.safetensors")
    assert metadata["method"] == report["method"] == method
    assert len(metadata["timesteps"]) == 6
    by_blocks = ("qdiffusion", "ptqd", "apqdm", "ptq4dm")
    assert ("reconstruct" in report["phases"]) == (method in by_blocks)
    assert ("rounding" in report["phases"]) == (method == "tinydm")
    assert ("correction" in report["phases"]) == (method in ("tinydm", "ptqd", "e2e"))
    assert str(home) not in metadata["method"] + "".join(map(str, metadata["layers"]))


@pytest.mark.parametrize("method", ["tinydm", "tfmq"])
def test_the_time_embedding_is_a_layer_like_others_when_it_is_not_cached(
    method: str, home: Path
) -> None:
    name, keys = f"temporal-{method}", ("quant.time_embedding=reconstructed",)
    if method == "tinydm":  # which has none otherwise
        keys += ("quant.reconstruct.iterations=3",)
    done(calibration(home, name, *keys, method=method))
    report = json.loads((home / name / "report.json").read_text())
    rows = [r for r in report["layers"] if "temb" in r["name"]]
    assert rows and all((r["weight_bits"], r["activation_bits"]) == (4, [8]) for r in rows)
    assert set(report["phases"]["temporal"]["errors"]) == {r["name"] for r in rows}
    file = home / name / "quantized.safetensors"
    images = f"{name}-images"
    done(command("sample_diffusion.py", home, "--quantized", str(file), "--out", images))
    assert len(list((home / images).glob("*.png"))) == 3


def _numel(state: dict[str, torch.Tensor]) -> list[int]:
    return [v.numel() for v in state.values()]


def test_killed_twice_and_resumed_gives_the_same_bytes(home: Path, whole: Path) -> None:
    folder = home / "killed"
    state = folder / "calibration.pt"
    first = killed(calibration(home, "killed"), state)
    assert "correction" not in first  # [] if only the trajectories were there
    assert not (folder / "quantized.safetensors").exists()

    assert "--resume" in refusal(calibration(home, "killed"))
    other = calibration(home, "killed", "quant.weight.bits=3", "--resume")
    assert "another configuration" in refusal(other)
    assert torch.load(state, weights_only=True)["state"]["done"] == first  # refusals touch nothing

    second = killed(calibration(home, "killed", "--resume"), state)
    assert len(second) > len(first)
    result = done(calibration(home, "killed", "--resume"))
    assert f"resumed after: trajectories, {', '.join(second)}" in result.stdout
    name = "quantized.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == FILES  # no state, no temporaries
    report, expected = (json.loads((f / "report.json").read_text()) for f in (folder, whole))
    for timed in (report, expected):
        timed.pop("seconds")
        for phase in timed["phases"].values():
            if isinstance(phase, dict):
                phase.pop("seconds")
    assert report == expected


def test_a_finished_folder_is_kept_and_not_mixed(home: Path, whole: Path) -> None:
    file = whole / "quantized.safetensors"
    before = file.stat().st_mtime_ns
    assert "is there already" in done(calibration(home, "whole")).stdout
    line = refusal(calibration(home, "whole", "calibration.seed=1"))
    assert "another configuration" in line and "--overwrite" in line
    assert file.stat().st_mtime_ns == before


def test_an_overwriting_run_that_is_killed_can_be_resumed(home: Path, whole: Path) -> None:
    """The old result must not stand in the way of the new one, nor pass for it."""
    folder = home / "again"
    shutil.copytree(whole, folder)
    new = ("calibration.seed=1", "quant.reconstruct.finetune_iterations=0")
    killed(calibration(home, "again", *new, "--overwrite"), folder / "calibration.pt")
    assert not (folder / "quantized.safetensors").exists()
    done(calibration(home, "again", *new, "--resume"))
    name = "quantized.safetensors"
    assert (folder / name).read_bytes() != (whole / name).read_bytes()


def test_any_seed_will_do(home: Path) -> None:
    """Nanoseconds of the clock, and the largest that is allowed."""
    for seed in (1764000000000000000, 2**63 - 1):
        done(calibration(home, f"seed-{seed}", f"calibration.seed={seed}"))


def test_a_damaged_state_is_refused(home: Path, whole: Path) -> None:
    folder = home / "damaged"
    folder.mkdir()
    (folder / "calibration.pt").write_bytes(b"PK\3\4 not a state")
    assert "damaged" in refusal(calibration(home, "damaged", "--resume"))
    for value in ([1, 2], {"identity": "x", "state": {}}):
        torch.save(value, folder / "calibration.pt")
        assert "damaged" in refusal(calibration(home, "damaged", "--resume"))
    value = {"identity": "x", "settings": {}, "state": {}, "states": torch.ones(99)}
    torch.save(value, folder / "calibration.pt")
    assert "another configuration" in refusal(calibration(home, "damaged", "--resume"))
    content = bytearray((folder / "calibration.pt").read_bytes())
    content[content.index(torch.ones(9).numpy().tobytes())] ^= 1  # only the checksum tells
    (folder / "calibration.pt").write_bytes(content)
    assert "damaged" in refusal(calibration(home, "damaged", "--resume"))
    assert [path.name for path in folder.iterdir()] == ["calibration.pt"]


def test_sampling_needs_nothing_but_the_file(home: Path, whole: Path, tmp_path: Path) -> None:
    """In an empty folder, without the checkpoint and the configuration; images do depend on it."""
    shutil.copy(whole / "quantized.safetensors", tmp_path / "q.safetensors")
    away = home / "narrow.pt.away"
    (home / "narrow.pt").rename(away)
    try:
        done(command("sample_diffusion.py", tmp_path, "--quantized", "q.safetensors", "--out", "i"))
    finally:
        away.rename(home / "narrow.pt")
    images = sorted((tmp_path / "i").iterdir())
    assert [path.name for path in images] == ["000000.png", "000001.png", "000002.png"]
    pixels = np.stack([np.asarray(Image.open(path)) for path in images])
    assert pixels.shape == (3, 16, 16, 3) and pixels.std() > 5
    done(command("sample_diffusion.py", home, "--config", "narrow.yaml", "--out", "fp"))
    full = np.stack([np.asarray(Image.open(p)) for p in sorted((home / "fp").iterdir())])
    difference = np.abs(full.astype(int) - pixels)
    assert difference.any() and difference.mean() < 0.5 * pixels.std()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("quant.weight.bits=9", "quant.weight.bits"),
        ("model.params.ch=12", "narrow.pt"),
        ("model.checkpoint=nowhere.pt", "nowhere.pt"),
    ],
)
def test_bad_input_leaves_nothing(change: str, word: str, home: Path) -> None:
    assert word in refusal(calibration(home, "never", change))
    assert not (home / "never").exists()
