"""The benchmark: cells are measured once, joined into one table, and the same every time."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.narrow import BENCH, write_narrow
from tinydm.quant.backends.selection import int8_supported
from tinydm.scripts import benchmark
from tinydm.scripts.bench import leads, measure, methods, tables
from tinydm.scripts.bench.ablations import PARTS
from tinydm.scripts.bench.cells import Bench
from tinydm.scripts.bench.plan import (
    BASES,
    QUANTIZED,
    Cell,
    Plan,
    ablation_cells,
    is_current,
    read_bits,
    study_cells,
)
from tinydm.scripts.bench.studies import STUDIES
from tinydm.scripts.common import memory
from tinydm.scripts.common.errors import ConfigError, RunError
from tinydm.scripts.experiment.runs import locked

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("calibration s", "peak MiB")
SOFTMAX_4 = ("quant.activation.softmax=row", "quant.activation.softmax_bits=4")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with narrow.yaml and narrow.pt."""
    return write_narrow(tmp_path_factory.mktemp("bench"), BENCH)


def options(room: Path, out: str, *arguments: str) -> list[str]:
    place = ["--config", str(room / "narrow.yaml"), "--out", str(room / out)]
    return [*place, "--trajectories", "2", *arguments]


def run_command(room: Path, out: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += options(room, out, *arguments)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def table(path: Path, number: int = 0) -> list[dict[str, str]]:
    """One of the tables of a file, from 0."""
    blocks = [block for block in path.read_text().split("\n\n") if block.startswith("|")]
    lines = blocks[number].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def without_times(path: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in table(path)]


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
    assert all(rows[0][name] == "" for name in ("PSNR (dB)", "eps weighted", *TIMES))
    assert all(30 < float(row["peak MiB"]) < 5000 for row in rows[1:])  # of Python with PyTorch
    assert all(row[name] == "" for row in rows for name in tables.SCORES)
    for name in ("PSNR (dB)", "eps-MSE", "eps weighted"):
        assert all("[" in row[name] for row in rows[1:])
    assert (
        "Calibrated on 8 different samples of 3 trajectories." in (first / "results.md").read_text()
    )
    result = json.loads((first / "results.json").read_text())
    assert str(first) not in json.dumps(result)
    assert {row["cell"]["label"] for row in result["rows"]} == {"fp", "minmax", "tinydm"}
    assert result["environment"]["threads"] == 1
    for line in result["lines"][1:]:
        low, high = line["psnr_interval"]
        assert low <= line["psnr"] <= high and line["seeds"] == [0] and line["images"] == 2
    names = {path.name for path in (first / "plots").iterdir()}
    assert {"eps-mse-3-w4a8.png", "timesteps-3-w4a8.png", "psnr-3.png"} <= names


def test_lead_is_of_the_same_images(first: Path) -> None:
    (line,) = table(first / "results.md", 1)
    assert (line["Bit-width (W/A)"], line["against"], line["seeds"]) == ("4/8", "MinMax", "0")
    errors = {
        row["cell"]["label"]: np.array([row["image_mse"]])
        for row in json.loads((first / "results.json").read_text())["rows"]
        if row["cell"]["label"] != "fp"
    }
    gain = measure.pooled_psnr(errors["tinydm"]) - measure.pooled_psnr(errors["minmax"])
    assert line["PSNR (dB)"].startswith(f"{gain:+.2f} [")
    assert line["images won"] == f"{(errors['tinydm'] < errors['minmax']).sum()} of 2"


def row_of(label: str, steps: int, calibrated: int, seed: int, mse: np.ndarray) -> dict[str, Any]:
    """A row with the errors of images; of trajectories a thousandth of them."""
    return {
        "cell": Cell("benchmark", label, (4, 8), calibrated, seed).to_plain(),
        "sampler": {"name": "ddim", "steps": steps},
        "calibrated": {"name": "ddim", "steps": calibrated},
        "image_mse": mse.tolist(),
        "eps_mse_of_trajectories": (mse / 1000).tolist(),
        "eps_weighted_of_trajectories": (mse / 500).tolist(),
    }


def test_lead_over_common_seeds_and_samplers() -> None:
    """Ten times smaller errors are 10 dB, whatever the images; the interval has no width."""
    ours = np.random.default_rng(0).exponential(100.0, 64) + 1
    rows = [
        row_of("tinydm", 50, 50, 0, ours),
        row_of("tinydm", 50, 50, 1, ours),
        row_of("ptqd", 50, 50, 1, 10 * ours),
        row_of("ptqd", 50, 50, 2, ours / 10),  # a seed that only one side has
        row_of("tinydm", 20, 50, 1, ours),
        row_of("ptqd", 20, 20, 1, np.where(np.arange(64) < 16, 0.1, 1e4) * ours),
        row_of("qdiffusion", 20, 100, 1, ours),  # made for another sampler
    ]
    text = leads.lead_table(rows).splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text[2:]]
    ten = "+10.00 [+10.00, +10.00]"
    tenth = "0.100 [0.100, 0.100]"
    assert lines[0] == ["50", "4/8", "PTQD", "1", ten, ten, "64 of 64", tenth, tenth]
    assert lines[1][:4] == ["20 (calibrated at 50)", "4/8", "PTQD, calibrated there", "1"]
    assert lines[1][6] == "48 of 64" and len(lines) == 2
    assert leads.lead_table(rows[:2]) == ""


def test_a_variant_is_compared_with_its_own_preset() -> None:
    """Of the same calibrated steps, over the seeds that both have."""
    images = np.random.default_rng(0).exponential(100.0, 64) + 1

    def row(table: str, label: str, calibrated: int, seed: int, mse: np.ndarray) -> dict[str, Any]:
        made = row_of("tinydm", 20, calibrated, seed, mse) | {"size_mb": 1.0, "seconds": 1.0}
        cell = Cell(table, label, (4, 8), calibrated, seed).to_plain()
        return made | {"cell": cell, "scores": None}

    rows = [
        row("preset", "as it is", 50, 0, images),
        row("preset", "as it is", 50, 1, 10 * images),
        row("preset", "as it is", 20, 0, images / 100),
        row("softmax", "row, 8 bits", 50, 0, images),
    ]
    found = [line for line in tables.ablation_table(rows).splitlines() if "row, 8" in line]
    assert len(found) == 1 and "+0.00 [+0.00, +0.00]" in found[0]


def test_scores_of_another_reference_are_left_out(room: Path, tmp_path: Path) -> None:
    """FIDs in one column are of one reference; a reference may not know its images' number."""

    class Reference:
        name = "x.npz"

        def __init__(self, sha256: str):
            self.sha256 = sha256

    def scores(sha256: str, n: int | None) -> dict[str, Any]:
        images = {"generated": 2, "reference": n}
        return {"fid": 1.0, "reference": "x.npz", "reference_sha256": sha256, "images": images}

    plan = Plan(str(room / "narrow.yaml"), ["sampling.count=64"])
    bench = Bench(tmp_path, plan, torch.device("cpu"), 2, Reference("a"))
    made = row_of("minmax", 3, 3, 0, np.ones(64))
    made |= {"digest": bench.digest(Cell.from_plain(made["cell"]))}
    made |= {"count": 64, "trajectories": 2, "calls": 3, "distinct_calls": 3}
    made |= {"eps_mse_of_trajectories": [1.0, 1.0]}
    for sha256, kept in (("a", True), ("b", False)):
        (row,) = bench.merge([], [made | {"scores": scores(sha256, 5)}])
        assert (row["scores"] is not None) == kept
    for name, kept in (("x.npz", True), ("y.npz", False)):
        older = {k: v for k, v in scores("a", 5).items() if k != "reference_sha256"}
        (row,) = bench.merge([], [made | {"scores": older | {"reference": name}}])
        assert (row["scores"] is not None) == kept
    long = made | {"eps_mse_of_trajectories": [1.0] * 4, "scores": None}  # both halves of two
    assert bench.merge([], [long]) == [] and bench.most_trajectories == 2
    both = [made | {"scores": scores(s, n)} for s, n in (("a", None), ("b", 5))]
    both[1] = both[1] | {"cell": both[1]["cell"] | {"label": "ptqd"}}
    assert sum("of x.npz" in note for note in tables.notes(both)) == 2


def test_softmax_variants_are_what_they_say() -> None:
    assert not is_current(Cell("softmax", "row, 4 bits", (4, 8), 3, 0, SOFTMAX_4))
    assert is_current(Cell("softmax", "row, 4 bits", (4, 4), 3, 0, SOFTMAX_4))
    for bits, expected in (("w4a8", False), ("w4a4", True)):
        labels = {cell.label for cell in ablation_cells(["softmax"], read_bits(bits), [3], [0])}
        assert ("row, 4 bits" in labels) == ("uniform, 4 bits" in labels) == expected
        assert "row, 8 bits" in labels


def test_an_equal_image_does_not_make_the_mean_infinite() -> None:
    errors = np.array([[0.0, 650.25]])
    assert measure.mean_psnr(errors) == pytest.approx((58.92 + 20) / 2, abs=0.01)


def test_integer_backend(room: Path) -> None:
    """Its images and numbers stand beside those of the other backend; the model is the same."""
    if reason := int8_supported():
        pytest.skip(reason)
    command = ("--methods", "fp,minmax", "--bits", "w4a8")
    benchmark.main(options(room, "integers", *command))
    file = room / "integers" / "results.json"
    before, fake = made(room / "integers"), json.loads(file.read_text())["rows"]
    benchmark.main(options(room, "integers", *command, "--backend", "int8"))
    after, whole = made(room / "integers"), json.loads(file.read_text())["rows"]
    assert [row["backend"] for row in fake + whole] == [None, "fake", None, "int8"]
    new = {name for name in after if after[name] != before.get(name)}
    assert {Path(name).name for name in new} == {
        *("cell.json", "images-ddim-3-int8.identity.json", "000000.png", "000001.png")
    }
    assert "backend int8" in (room / "integers" / "results.md").read_text()
    assert whole[1]["image_mse"] == pytest.approx(fake[1]["image_mse"], rel=0.2)
    assert whole[1]["eps_mse_of_steps"] != fake[1]["eps_mse_of_steps"]


@pytest.mark.parametrize(
    ("base", "method", "phase"),
    [
        ("qdiffusion", "ptqd", "reconstruct"),
        ("e2e_plain", "e2e", "finetune"),
    ],
)
def test_a_correction_is_fitted_to_the_model_of_its_base(
    room: Path, base: str, method: str, phase: str
) -> None:
    """With Q-Diffusion there already, PTQD is the same file as from nothing, and nothing is
    reconstructed again."""
    both = ("--methods", f"{method},{base}", "--bits", "w4a8")
    based, alone = (room / f"{method}-{name}" for name in ("based", "alone"))
    benchmark.main(options(room, based.name, *both))
    benchmark.main(options(room, alone.name, "--methods", method, "--bits", "w4a8"))
    files = [
        next(folder.glob(f"cells/*-{method}-*/quantized.safetensors")) for folder in (based, alone)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    reports = [json.loads((f.parent / "report.json").read_text()) for f in files]
    assert reports[0]["identity"] == reports[1]["identity"]
    assert reports[0]["layers"] == reports[1]["layers"]
    report = next(based.glob(f"cells/*-{base}-*/report.json"))
    shared = json.loads(report.read_text())["phases"][phase]
    assert reports[0]["phases"][phase] == shared  # with its seconds
    before = made(based)
    benchmark.main(options(room, based.name, *both))
    assert made(based) == before


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


def test_noise_seeds_share_the_calibrated_file(first: Path, room: Path) -> None:
    """Each has images of its own, and the interval is over all of them."""
    before = made(first)
    more = ("--methods", "fp,minmax", "--bits", "w4a8", "--noise-seeds", "5,77")
    benchmark.main(options(room, "first", *more))
    new = {name for name in made(first) if name not in before}
    assert len({name.split("/")[0] for name in new if name.startswith("full-")}) == 1
    assert not any(name.endswith((".safetensors", ".pt")) for name in new)
    result = json.loads((first / "results.json").read_text())
    own = [row for row in result["rows"] if row["cell"]["label"] == "minmax"]
    own = [row for row in own if row["sampler"]["steps"] == 3 and row["sampler"]["name"] == "ddim"]
    assert [row["noise"] for row in own] == [5, 77]
    assert own[0]["image_mse"] != own[1]["image_mse"]
    assert own[0]["eps_mse_of_steps"] == own[1]["eps_mse_of_steps"]
    same = {"name": "ddim", "steps": 3}
    lines = {r["cell"]["label"]: r for r in result["lines"] if r["sampler"] == same}
    assert lines["minmax"]["noise_seeds"] == [5, 77] and lines["tinydm"]["noise_seeds"] == [5]
    errors = np.array([own[0]["image_mse"] + own[1]["image_mse"]])
    assert lines["minmax"]["psnr"] == pytest.approx(measure.pooled_psnr(errors))
    text = (first / "results.md").read_text()
    assert "2 images of each of the noise seeds 5, 77" in text
    assert "TinyDM: seeds 0, noise seeds 5 alone." in text
    benchmark.main(options(room, "first", "--methods", "minmax", "--bits", "w4a8"))
    rows = json.loads((first / "results.json").read_text())["rows"]
    assert sum(row["cell"]["label"] == "minmax" and row["noise"] == 77 for row in rows) == 1


def test_the_weighted_error_counts_steps_by_importance() -> None:
    error = torch.tensor([[1.0, 2.0], [10.0, 20.0]])  # (S, N)
    assert measure.weighted_mean(error, torch.tensor([1.0, 1.0])) == [5.5, 11.0]
    assert measure.weighted_mean(error, torch.tensor([3.0, 1.0])) == [3.25, 6.5]
    assert measure.weighted_mean(error, torch.tensor([0.3, 0.1])) == pytest.approx([3.25, 6.5])


def test_intervals_are_over_calibration_seeds_too() -> None:
    """Seeds that differ more than their images make the interval wide; the mean stays within."""
    random = np.random.default_rng(1)
    images = random.exponential(100.0, size=400)
    together = measure.interval(measure.psnr_of_means, np.stack([images] * 3))
    apart = measure.interval(measure.psnr_of_means, np.stack([images / 4, images, 4 * images]))
    assert together[1] - together[0] < 1.5 and 6 < apart[1] - apart[0] <= 12.1 + 1.5
    # The lead of a method that is better by as much with every seed is as sure as with one.
    ours, theirs = (f * np.stack([images / 4, images, 4 * images]) for f in (1, 10))
    value, (low, high) = tables.paired(
        lambda a, b: measure.psnr_of_means(a) - measure.psnr_of_means(b), ours, theirs
    )
    assert value == pytest.approx(10) and high - low < 1e-9


def test_rates_are_chosen_on_seeds_that_no_table_uses(room: Path) -> None:
    tune = ("--tune", "e2e_plain,ptq4dm", "--bits", "w4a8", "--count", "1")
    for seeds, noise, word in (("0", "100", "--seeds"), ("100", "1234", "sampling.seed")):
        arguments = options(room, "tuning", *tune, "--seeds", seeds)
        with pytest.raises(ConfigError, match=word):
            benchmark.main([*arguments, "--set", f"sampling.seed={noise}"])
    arguments = options(room, "tuning", *tune, "--seeds", "100", "--set", "sampling.seed=100")
    benchmark.main(arguments)
    rows = table(room / "tuning" / "tuning.md")
    assert [row["Method"] for row in rows] == ["PTQ4DM"] * 2 + ["E2E, no correction"] * 3
    assert rows[2]["Choice"] == "quant.reconstruct.lr_scale=0.001"
    for of_method in (rows[:2], rows[2:]):
        best = min(of_method, key=lambda row: float(row["eps weighted"].split()[0]))
        assert [row["chosen"] for row in of_method].count("yes") == 1 and best["chosen"] == "yes"
    assert not (room / "tuning" / "results.md").exists()


def test_every_study_has_configurations(room: Path) -> None:
    plan = Plan(str(room / "narrow.yaml"), [])
    for study, methods_of in STUDIES.items():
        for cell in study_cells(study, tuple(methods_of), read_bits("w4a8"), [3], [100]):
            assert (cell.kind, is_current(cell)) == (study, True)
            assert plan.config(cell).quant.method == cell.method
            assert Cell.from_plain(json.loads(json.dumps(cell.to_plain()))) == cell
            assert not is_current(replace(cell, label="other"))
    with_correction = Cell("budget of ptqd", "600", (4, 8), 3, 0)
    assert with_correction.base == replace(with_correction, table="budget of qdiffusion")
    assert set(STUDIES["tuning"]) | set(BASES) | {"minmax"} == set(QUANTIZED)


def test_the_peak_of_the_memory_counts_anew() -> None:
    """What an earlier calibration needed is not the next one's."""
    if not memory.STATUS.exists():
        pytest.skip("Linux alone says how much memory a process has")
    block = torch.ones(200 * 2**18)  # 200 MiB
    del block
    assert memory.forget_peak()
    start = memory.resident("VmHWM")
    assert start - memory.resident("VmRSS") < 20 * 2**20
    block = torch.ones(100 * 2**18)
    del block
    assert 90 * 2**20 < memory.resident("VmHWM") - start < 150 * 2**20


def test_mistakes_are_one_line(room: Path) -> None:
    for arguments, word in (
        (("--methods", "tinydn"), "tinydm"),
        (("--bits", "w9a8"), "--bits w9a8"),
        (("--fid",), "--reference"),
        (("--compile",), "--backend"),
        (("--steps", "2000"), "sampler.steps"),
        (("--set", "quant.activation.group=3"), "groups"),
        (("--tune", "minmax"), "--tune minmax"),
        (("--noise-seeds", "x"), "--noise-seeds"),
        (("--set", "calibration.trajectories=1"), "3 trajectories are needed"),
    ):
        with pytest.raises(ConfigError, match=word) as caught:
            benchmark.main(options(room, "mistakes", *arguments))
        assert "\n" not in str(caught.value)
    assert not (room / "mistakes" / "cells").exists()


def test_a_second_process_on_the_same_folder_is_sent_away(room: Path) -> None:
    arguments = options(room, "busy", "--methods", "minmax", "--bits", "w4a8")
    with locked(room / "busy" / ".lock"), pytest.raises(RunError, match="held by"):
        benchmark.main(arguments)
    assert not (room / "busy" / "cells").exists()


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
