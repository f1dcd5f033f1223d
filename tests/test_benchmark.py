"""The benchmark: cells are measured once, joined into one table, and the same every time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import benchmark
from scripts.bench import measure, methods, tables
from scripts.bench.ablations import PARTS
from scripts.bench.plan import Cell, Plan, ablation_cells, read_bits
from scripts.common.config import ConfigError
from tests.narrow import MODEL, write_narrow

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "name": "narrow",
    "model": MODEL,
    "sampler": {"name": "ddim", "steps": 3, "skip": "quad", "clip_denoised": True},
    "quant": {
        "search": {"rounds": 2, "batch_size": 2},
        "reconstruct": {
            "iterations": 2,
            "batch_size": 2,
            "finetune_iterations": 3,
            "finetune_batch_size": 2,
        },
    },
    "calibration": {"samples": 8, "trajectories": 2, "batch_size": 2},
    "sampling": {"count": 2, "batch_size": 2, "micro_batch": 2, "seed": 5},
}
TIMES = "calibration s"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with narrow.yaml and narrow.pt."""
    return write_narrow(tmp_path_factory.mktemp("bench"), CONFIG)


def options(room: Path, out: str, *arguments: str) -> list[str]:
    place = ["--config", str(room / "narrow.yaml"), "--out", str(room / out)]
    return [*place, "--trajectories", "2", *arguments]


def run_command(room: Path, out: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += options(room, out, *arguments)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def table(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def without_times(path: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != TIMES} for row in table(path)]


def made(folder: Path) -> dict[str, float]:
    """Everything that costs time, with when it was written."""
    files = [*folder.glob("cells/**/*"), *folder.glob("full-*/**/*")]
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in files if f.is_file()}


@pytest.fixture(scope="module")
def first(room: Path) -> Path:
    run_command(room, "first", "--methods", "fp,minmax,tinydm", "--bits", "w4a8")
    return room / "first"


def test_table_in_the_papers_layout(first: Path) -> None:
    rows = table(first / "results.md")
    assert tuple(rows[0]) == tables.COLUMNS
    named = [(r["Timesteps"], r["Bit-width (W/A)"], r["Method"]) for r in rows]
    assert named == [("3", "32/32", "FP"), ("3", "4/8", "MinMax"), ("3", "4/8", "TinyDM")]
    assert rows[0]["PSNR (dB)"] == "" and rows[0][TIMES] == ""
    assert all(row[name] == "" for row in rows for name in tables.SCORES)
    assert all("[" in row["PSNR (dB)"] and "[" in row["eps-MSE"] for row in rows[1:])
    result = json.loads((first / "results.json").read_text())
    assert str(first) not in json.dumps(result)
    assert {row["cell"]["label"] for row in result["rows"]} == {"fp", "minmax", "tinydm"}
    assert result["environment"]["threads"] == 1
    for line in result["lines"][1:]:
        low, high = line["psnr_interval"]
        assert low <= line["psnr"] <= high and line["seeds"] == [0] and line["images"] == 2
    names = {path.name for path in (first / "plots").iterdir()}
    assert {"eps-mse-3-w4a8.png", "timesteps-3-w4a8.png", "psnr-3.png"} <= names


def test_ptqd_is_fitted_to_the_model_of_its_base(room: Path) -> None:
    """With Q-Diffusion there already, the same file as from nothing, and no reconstruction."""
    both = ("--methods", "qdiffusion,ptqd", "--bits", "w4a8")
    benchmark.main(options(room, "based", *both))
    benchmark.main(options(room, "alone", "--methods", "ptqd", "--bits", "w4a8"))
    files = [
        next((room / n).glob("cells/*-ptqd-*/quantized.safetensors")) for n in ("based", "alone")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    reports = [json.loads((f.parent / "report.json").read_text()) for f in files]
    assert reports[0]["identity"] == reports[1]["identity"]
    assert reports[0]["layers"] == reports[1]["layers"]
    base = next((room / "based").glob("cells/*-qdiffusion-*/report.json"))
    shared = json.loads(base.read_text())["phases"]["reconstruct"]
    assert reports[0]["phases"]["reconstruct"] == shared  # with its seconds
    before = made(room / "based")
    benchmark.main(options(room, "based", *both))
    assert made(room / "based") == before


def test_another_command_adds_and_keeps(first: Path, room: Path) -> None:
    before, rows = made(first), without_times(first / "results.md")
    run_command(room, "first", "--methods", "minmax,tinydm", "--bits", "w4a8")
    assert made(first) == before  # the second run makes nothing anew
    assert without_times(first / "results.md") == rows
    more = ("--methods", "minmax", "--bits", "w4a8", "--transfer", "2,ddpm")
    benchmark.main(options(room, "first", *more))
    assert made(first).items() >= before.items() - {
        item for item in before.items() if item[0].endswith("cell.json")
    }
    after = without_times(first / "results.md")
    assert [row for row in after if row in rows] == rows
    added = [row["Timesteps"] for row in after if row not in rows]
    assert added == ["2 (calibrated at 3)", "3 ddpm (calibrated at 3 ddim)"]


def test_a_fresh_folder_gives_the_same_numbers(first: Path, room: Path) -> None:
    run_command(room, "again", "--methods", "tinydm", "--bits", "w4a8", "--ablate", "split")
    tinydm = [row for row in without_times(first / "results.md") if row["Method"] == "TinyDM"]
    assert without_times(room / "again" / "results.md") == tinydm
    ablation = table(room / "again" / "ablation.md")
    assert [(row["Part"], row["Choice"]) for row in ablation] == [
        ("preset", "as it is"),
        ("split", "false"),
        ("split", "true"),
    ]
    assert ablation[0]["PSNR (dB)"] == tinydm[0]["PSNR (dB)"]
    assert ablation[2]["against preset (dB)"] == "+0.00 [+0.00, +0.00]"
    assert len(list((room / "again" / "cells").iterdir())) == 2  # equal cells are one


def test_mistakes_are_one_line(room: Path) -> None:
    for arguments, word in (
        (("--methods", "tinydn"), "tinydm"),
        (("--bits", "w9a8"), "--bits w9a8"),
        (("--fid",), "--reference"),
        (("--steps", "2000"), "sampler.steps"),
        (("--set", "quant.activation.group=3"), "groups"),
    ):
        with pytest.raises(ConfigError, match=word) as caught:
            benchmark.main(options(room, "mistakes", *arguments))
        assert "\n" not in str(caught.value)
    assert not (room / "mistakes" / "cells").exists()


def test_every_variant_is_a_configuration(room: Path) -> None:
    plan = Plan(str(room / "narrow.yaml"), [])
    for cell in ablation_cells(tuple(PARTS), read_bits("w8a8,w4a6"), [3], [0, 1]):
        config = plan.config(cell)
        bits = (config.quant.weight.bits, config.quant.activation.bits)
        assert (bits, config.calibration.seed) == (cell.bits, cell.seed)
        assert Cell.from_plain(json.loads(json.dumps(cell.to_plain()))) == cell
    with pytest.raises(ConfigError):
        read_bits("w4")


def test_intervals() -> None:
    random = np.random.default_rng(1)
    errors = random.exponential(100.0, size=(2, 400))
    value = measure.pooled_psnr(errors)
    low, high = measure.interval(measure.psnr_of_means, errors)
    assert low < value < high and high - low < 1.5
    exact = np.mean(10 * np.log10(255**2 / errors.mean(1)))
    assert value == pytest.approx(exact)
    assert measure.interval(measure.psnr_of_means, errors[:, :1]) is None
    same = measure.interval(measure.psnr_of_means, np.zeros((1, 5)))
    assert same == (np.inf, np.inf) and methods.finite({"psnr": same}) == {"psnr": [None, None]}
