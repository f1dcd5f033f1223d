"""benchmark.py --speed: cells are measured once, and every variant computes something."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.commands import ROOT
from tests.helpers.latent import CONFIG
from tinydm.scripts import benchmark
from tinydm.scripts.bench import speed, speed_tables
from tinydm.scripts.bench.speed_models import VARIANTS, Models, obstacle
from tinydm.scripts.common.errors import ConfigError, RunError
from tinydm.scripts.experiment.config import load_config
from tinydm.scripts.experiment.config_sections import calls_per_image


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed") / "narrow.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.mark.slow
def test_a_run_is_recorded_and_continued(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "speed"
    options = ["--speed", "--configs", str(path), "--variants", "fp32,fake-w4a8,int8-w8a8"]
    options += ["--batches", "1,2", "--threads", "1", "--repeats", "3", "--out", str(out)]
    command = [sys.executable, "scripts/benchmark.py", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    cells = json.loads((out / "speed.json").read_text())
    name = CONFIG["name"]
    for variant in ("fp32", "fake-w4a8"):
        memory = cells[f"{name}/{variant}/first call"]["values"]
        if memory["peak"] is not None:  # the system updates it a little late
            assert 1.01 * memory["peak"] >= memory["after"] > memory["before"] > 0
        for batch in (1, 2):
            values = cells[f"{name}/{variant}/{batch} images/1 threads"]["values"]
            assert len(values["seconds"]) == len(values["full_cpu"]) == 3
            assert min(values["seconds"]) > 0 and 0 < sum(values["operators"].values()) < 1.001
    text = (out / "speed.md").read_text()
    assert text in done.stdout and "fake W4A8" in text
    size = (out / "models" / f"{name}-w4a8.safetensors").stat().st_size
    assert f"{size / 2**20:.2f}" in text
    if reason := obstacle(VARIANTS["int8-w8a8"]):
        assert reason in text
    before = (out / "speed.json").read_bytes()
    benchmark.main(options)  # again: nothing is measured
    assert text in capsys.readouterr().out and (out / "speed.json").read_bytes() == before


@pytest.mark.slow
def test_variants_compute(path: Path, tmp_path: Path) -> None:
    models, outputs = Models(load_config(path), tmp_path), {}
    for name, variant in VARIANTS.items():
        slow = variant.compiled and variant.bits is None
        if not slow and obstacle(variant) is None:
            outputs[name] = models.call(models.build(variant), 3)()
            assert outputs[name].shape == (3, 3, 4, 4) and torch.isfinite(outputs[name]).all()
    if obstacle(VARIANTS["bf16"]) is None:
        difference = (outputs["bf16"] - outputs["fp32"]).abs().max()
        assert difference < 0.1 * outputs["fp32"].abs().max()
    for name in (n for n in outputs if n.startswith(("int8", "avx"))):
        fake = outputs[f"fake-{name.split('-')[1]}"]
        assert (outputs[name] - fake).square().mean() < 1e-3 * fake.square().mean()
    assert models.bytes(VARIANTS["fake-w4a8"]) < models.bytes(VARIANTS["fake-w8a8"])
    assert models.bytes(VARIANTS["fake-w8a8"]) < models.bytes(VARIANTS["fp32"])


class Event:
    """Of a CUDA stream, on a clock of its own: 0.002 s from one to the next."""

    clock = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        Event.clock += 2
        self.at = Event.clock

    def elapsed_time(self, other: "Event") -> float:
        return other.at - self.at


def test_a_device_has_a_clock_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two events around the call, the device idle before and done after."""
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(speed, "wait_for", lambda device: order.append("wait"))

    def call() -> torch.Tensor:
        order.append("call")
        return torch.zeros(1)

    seconds, _ = speed.seconds_of(call, torch.device("cuda", 0))
    assert seconds == 0.002 and order == ["wait", "call", "wait"]


def test_what_a_device_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert obstacle(VARIANTS["fp16-graph"], cuda) is None
    assert obstacle(VARIANTS["fp16-graph"]) == "needs a CUDA device"
    assert obstacle(VARIANTS["int8-w8a8-compiled"], cuda) in ("is for CPUs", "no C++ compiler")
    assert "CUDA" in (obstacle(VARIANTS["fake-w8a8-tf32"]) or "")


@pytest.mark.slow
def test_rows_of_a_card_join_the_table(path: Path, tmp_path: Path) -> None:
    row = {"model": "big", "variant": "int8", "label": "int8 W8A8", "reason": "no"}
    report = tmp_path / "gpu_report.json"
    report.write_text(json.dumps({"device": "NVIDIA X", "speed": [row]}))
    options = ["--configs", str(path), "--variants", "fp32", "--batches", "1", "--repeats", "1"]
    out = tmp_path / "out"
    speed.main([*options, "--threads", "1", "--merge", str(report), "--out", str(out)])
    text = (out / "speed.md").read_text()
    assert "big, NVIDIA X | int8 W8A8" in text and CONFIG["name"] in text


MEASURED = {
    "model": "big", "variant": "int8-w8a8", "label": "int8 W8A8", "batch": 4, "threads": 1,
    "bytes": 2**20, "calls": 50, "first": None, "seconds": [1.0, 1.0], "cpu": [1.0, 1.0],
    "full_seconds": [2.0, 2.0], "full_cpu": [2.0, 2.0], "device_bytes": None, "sqnr": None,
    "operators": {"aten::mul": 0.5},
}  # fmt: skip
NEEDED = MEASURED.keys() - {"model", "variant", "device_bytes", "sqnr"}


@pytest.mark.parametrize(
    "content",
    [
        *([], {}, {"speed": 3}, {"speed": [3]}, {"speed": [{"label": "x"}]}),
        *({"speed": [{k: v for k, v in MEASURED.items() if k != key}]} for key in sorted(NEEDED)),
        *({"speed": [MEASURED | {"seconds": value}]} for value in ("x", [], [0, 0], [1.0], None)),
        *({"speed": [MEASURED | {key: "x"}]} for key in ("batch", "first", "bytes", "operators")),
    ],
)
def test_a_damaged_report_of_a_card_is_refused_at_once(content: object, tmp_path: Path) -> None:
    """Not after the measurement, which takes long."""
    report, out = tmp_path / "gpu_report.json", tmp_path / "out"
    report.write_text(json.dumps({"speed": [MEASURED]}))
    assert speed.rows_of_report(report)[0]["model"] == "big, None"
    report.write_text(json.dumps(content))
    with pytest.raises((ConfigError, RunError), match=r"gpu_report.json: .*damaged"):
        speed.main(["--merge", str(report), "--out", str(out)])
    assert not out.exists()


def test_numbers_of_a_line(path: Path) -> None:
    assert speed_tables.ratio([1.0, 2.0, 1.0], [2.0, 2.0, 1.0]) == "1.00 (1.00-1.50)"
    config = load_config(path)
    assert calls_per_image(config) == config.sampler.steps * 2  # guidance
    assert obstacle(VARIANTS["fp32"]) is None


@pytest.mark.parametrize(
    "given, expected", [("--variants=fp64", "fp64"), ("--batches=0", "--batches")]
)
def test_bad_input(given: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        speed.main([given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
