"""calibrate.py as a command line: its file, kill -9 and --resume, refusals, sampling from the file.

python -m pytest tests/test_calibrate.py
"""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import calibrate
import sample_diffusion
from tests.helpers import forks
from tests.helpers.commands import command, done
from tests.helpers.forks import refusal, succeed
from tests.helpers.rooms import RESULT
from tinydm.quant.calibration.run_state import RunState
from tinydm.quant.calibration.states import CalibrationStates
from tinydm.quant.runtime.packed_file import read_metadata
from tinydm.scripts.common.errors import RunError
from tinydm.scripts.experiment import resume
from tinydm.scripts.experiment.config import parse_config

METHODS = ("tinydm", "e2e", "qdiffusion", "ptqd", "apqdm", "ptq4dm", "minmax")
FILES = {RESULT, "config.yaml", "report.json", "layers.txt", "log.txt"}
BY_BLOCKS = ("quant.reconstruct.iterations=4", "quant.reconstruct.batch_size=4")
# Steps of learning; those of tinydm stand in tiny.yaml.
BRIEF = {"tinydm": (), "e2e": ("quant.reconstruct.finetune_iterations=4",)}


def calibration(room: Path, out: str, *more: str, method: str = "tinydm") -> list[object]:
    """Arguments of calibrate.py; more: keys, then options."""
    values = (f"quant.method={method}", *BRIEF.get(method, BY_BLOCKS))
    return ["--config", room / "tiny.yaml", "--out", room / out, "--set", *values, *more]


@pytest.fixture(scope="module")
def whole(room: Path) -> Path:
    """The folder of an uninterrupted run of tinydm, by a process as a user starts it."""
    done(command("calibrate.py", room, *map(str, calibration(room, "whole"))))
    return room / "whole"


def refused(room: Path, out: str, *more: str) -> str:
    return refusal(forks.run(calibrate.main, *calibration(room, out, *more)))


def killed(arguments: list[object], state: Path, phase: str) -> list[str]:
    """A calibration that is killed as soon as it has saved this phase; the phases it had done."""
    deadly = forks.after_phase(phase, forks.signal_itself(signal.SIGKILL))
    fork = forks.run(calibrate.main, *arguments, before=deadly)
    assert fork.code == -signal.SIGKILL, fork.text()
    return torch.load(state, weights_only=True)["state"]["done"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_file_and_a_complete_table(
    method: str, room: Path, whole: Path
) -> None:
    folder = whole
    if method != "tinydm":
        folder = room / method
        succeed(calibrate.main, *calibration(room, method, method=method))
    assert {path.name for path in folder.iterdir()} == FILES
    report = json.loads((folder / "report.json").read_text())
    state = torch.load(room / "tiny.pt", weights_only=True)
    weights = {n.removesuffix(".weight"): v.numel() for n, v in state.items() if v.dim() > 1}
    rows = {row["name"]: row for row in report["layers"]}
    assert {n: row["weights"] for n, row in rows.items() if row["weights"]} == weights
    assert report["weights_quantized"] == 1.0
    assert report["macs_quantized"] + report["macs_once_per_timestep"] == pytest.approx(1.0)
    assert report["macs_quantized"] > 0.95
    alike = used = 0
    for name, row in rows.items():
        assert row["macs"] > 0, name
        if name in weights:
            kept = name.startswith("temb.") or name.endswith("temb_proj")
            edge = name in ("conv_in", "conv_out")
            bits = 8 if kept or edge else 4
            alike, used = alike + bits * weights[name], used + row["weight_bits"] * weights[name]
            if edge or method != "tinydm":
                assert row["weight_bits"] == bits, name
            else:  # its layers share out their bits
                assert 4 <= row["weight_bits"] <= 8, name
            assert bool(row["activation_bits"]) != kept, name
        else:
            assert row["weight_bits"] is None and row["activation_bits"] == [8, 8], name
    assert 0.98 * alike < used <= alike
    split = {n for n, row in rows.items() if len(row["activation_bits"]) == 2 and n in weights}
    assert bool(split) == (method not in ("ptq4dm", "minmax"))
    size = (folder / RESULT).stat().st_size
    assert report["bytes"] == size
    assert report["ratio_to_float32"] == pytest.approx(size / (4 * sum(_numel(state))))
    table = (folder / "layers.txt").read_text()
    assert all(name in table for name in rows)
    metadata = read_metadata(folder / RESULT)
    assert metadata["method"] == report["method"] == method
    assert len(metadata["timesteps"]) == 3
    by_blocks = ("qdiffusion", "ptqd", "apqdm", "ptq4dm")
    assert ("reconstruct" in report["phases"]) == (method in by_blocks)
    assert ("rounding" in report["phases"]) == (method == "tinydm")
    assert ("correction" in report["phases"]) == (method in ("tinydm", "ptqd", "e2e"))
    assert str(room) not in metadata["method"] + "".join(map(str, metadata["layers"]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tinydm", "tfmq"])
def test_the_time_embedding_is_a_layer_like_others_when_it_is_not_cached(
    method: str, room: Path
) -> None:
    name, keys = f"temporal-{method}", ("quant.time_embedding=reconstructed",)
    if method == "tinydm":  # which has none otherwise
        keys += ("quant.reconstruct.iterations=3",)
    succeed(calibrate.main, *calibration(room, name, *keys, method=method))
    report = json.loads((room / name / "report.json").read_text())
    rows = [r for r in report["layers"] if "temb" in r["name"]]
    assert rows and all((r["weight_bits"], r["activation_bits"]) == (4, [8]) for r in rows)
    assert set(report["phases"]["temporal"]["errors"]) == {r["name"] for r in rows}
    file = room / name / RESULT
    images = f"{name}-images"
    succeed(sample_diffusion.main, "--quantized", file, "--out", room / images)
    assert len(list((room / images).glob("*.png"))) == 6


def _numel(state: dict[str, torch.Tensor]) -> list[int]:
    return [v.numel() for v in state.values()]


@pytest.mark.slow
def test_killed_twice_and_resumed_gives_the_same_bytes(room: Path, whole: Path) -> None:
    folder = room / "killed"
    state = folder / "calibration.pt"
    first = killed(calibration(room, "killed"), state, "trajectories")
    assert first == []
    assert not (folder / RESULT).exists()

    assert "--resume" in refused(room, "killed")
    assert "another configuration" in refused(room, "killed", "quant.weight.bits=3", "--resume")
    assert torch.load(state, weights_only=True)["state"]["done"] == first  # refusals touch nothing

    second = killed(calibration(room, "killed", "--resume"), state, "search")
    assert len(second) > 1
    printed = succeed(calibrate.main, *calibration(room, "killed", "--resume"))
    assert f"resumed after: trajectories, {', '.join(second)}" in printed
    assert (folder / RESULT).read_bytes() == (whole / RESULT).read_bytes()
    assert {path.name for path in folder.iterdir()} == FILES  # no state, no temporaries
    report, expected = (json.loads((f / "report.json").read_text()) for f in (folder, whole))
    for timed in (report, expected):
        timed.pop("seconds")
        for phase in timed["phases"].values():
            if isinstance(phase, dict):
                phase.pop("seconds")
    assert report == expected


@pytest.mark.slow
def test_a_finished_folder_is_kept_and_not_mixed(room: Path, whole: Path) -> None:
    file = whole / RESULT
    before = file.stat().st_mtime_ns
    assert "is there already" in succeed(calibrate.main, *calibration(room, "whole"))
    line = refused(room, "whole", "calibration.seed=1")
    assert "another configuration" in line and "--overwrite" in line
    assert file.stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_overwriting_run_that_is_killed_can_be_resumed(room: Path, whole: Path) -> None:
    """The old result must not stand in the way of the new one, nor pass for it."""
    folder = room / "again"
    shutil.copytree(whole, folder)
    new = ("calibration.seed=1", "quant.reconstruct.finetune_iterations=0")
    arguments = calibration(room, "again", *new, "--overwrite")
    killed(arguments, folder / "calibration.pt", "trajectories")
    assert not (folder / RESULT).exists()
    succeed(calibrate.main, *calibration(room, "again", *new, "--resume"))
    assert (folder / RESULT).read_bytes() != (whole / RESULT).read_bytes()


@pytest.mark.slow
def test_any_seed_will_do(room: Path) -> None:
    """Nanoseconds of the clock, and the largest that is allowed."""
    for seed in (1764000000000000000, 2**63 - 1):
        keys = (f"calibration.seed={seed}", "quant.method=minmax")
        succeed(calibrate.main, *calibration(room, f"seed-{seed}", *keys))


def test_a_damaged_state_is_refused(room: Path) -> None:
    folder = room / "damaged"
    folder.mkdir()
    (folder / "calibration.pt").write_bytes(b"PK\3\4 not a state")
    assert "damaged" in refused(room, "damaged", "--resume")
    for value in ([1, 2], {"identity": "x", "state": {}}):
        torch.save(value, folder / "calibration.pt")
        assert "damaged" in refused(room, "damaged", "--resume")
    value = {"device": "cpu", "identity": "x", "settings": {}, "state": {}}
    value["states"] = torch.ones(99)
    torch.save(value, folder / "calibration.pt")
    assert "another configuration" in refused(room, "damaged", "--resume")
    content = bytearray((folder / "calibration.pt").read_bytes())
    content[content.index(torch.ones(9).numpy().tobytes())] ^= 1  # only the checksum tells
    (folder / "calibration.pt").write_bytes(content)
    assert "damaged" in refused(room, "damaged", "--resume")
    assert [path.name for path in folder.iterdir()] == ["calibration.pt"]


@pytest.mark.parametrize(("key", "kept"), [("lr_scale=0.001", True), ("weigh_steps=false", False)])
def test_what_a_finished_phase_has_read_may_not_change(
    key: str, kept: bool, tmp_path: Path
) -> None:
    """Ranges and groups are chosen with weights of the steps; end-to-end steps alone have rates."""
    text = "{name: any, model: {arch: ddim_unet}}"
    began, other = (
        parse_config(text, "any.yaml", given) for given in ([], [f"quant.reconstruct.{key}"])
    )
    states = CalibrationStates(torch.zeros(1, 1, 3, 2, 2), torch.zeros(1, 1, 3, 2, 2), [0])
    resume.save_state(tmp_path, began, {}, RunState(["equivalent", "bits", "ranges"]), states)
    if kept:
        assert resume.load_state(tmp_path, other, {}, resume=True) is not None
    else:
        with pytest.raises(RunError, match="another configuration"):
            resume.load_state(tmp_path, other, {}, resume=True)


@pytest.mark.slow
def test_sampling_needs_nothing_but_the_file(room: Path, whole: Path, tmp_path: Path) -> None:
    """In an empty folder, without the checkpoint and the configuration; images do depend on it."""
    shutil.copy(whole / RESULT, tmp_path / "q.safetensors")
    arguments = ("--quantized", "q.safetensors", "--out", "i")
    away = room / "tiny.pt.away"
    (room / "tiny.pt").rename(away)
    try:
        succeed(sample_diffusion.main, *arguments, before=lambda: os.chdir(tmp_path))
    finally:
        away.rename(room / "tiny.pt")
    images = sorted((tmp_path / "i").iterdir())
    assert [path.name for path in images] == [f"00000{i}.png" for i in range(6)]
    pixels = np.stack([np.asarray(Image.open(path)) for path in images])
    assert pixels.shape == (6, 8, 8, 3) and pixels.std() > 5
    succeed(sample_diffusion.main, "--config", room / "tiny.yaml", "--out", room / "fp")
    full = np.stack([np.asarray(Image.open(p)) for p in sorted((room / "fp").iterdir())])
    difference = np.abs(full.astype(int) - pixels)
    assert difference.any() and difference.mean() < 0.5 * pixels.std()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("quant.weight.bits=9", "quant.weight.bits"),
        ("model.params.ch=12", "tiny.pt"),
        ("model.checkpoint=nowhere.pt", "nowhere.pt"),
    ],
)
def test_bad_input_leaves_nothing(change: str, word: str, room: Path) -> None:
    assert word in refused(room, "never", change)
    assert not (room / "never").exists()
