"""The benchmark as a command: cells are measured once, joined into one table, and the same every
time; the tables themselves are in test_benchmark_tables.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.commands import command, done
from tests.helpers.narrow import BENCH, write_narrow
from tinydm.quant.backends.selection import int8_supported
from tinydm.scripts import benchmark
from tinydm.scripts.bench import measure, tables
from tinydm.scripts.common import memory
from tinydm.scripts.common.errors import ConfigError, RunError
from tinydm.scripts.experiment.runs import locked

TIMES = ("calibration s", "peak MiB")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with narrow.yaml and narrow.pt."""
    return write_narrow(tmp_path_factory.mktemp("bench"), BENCH)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """`first`, which is a process of its own, draws them; others need not."""
    monkeypatch.setattr("tinydm.scripts.bench.plots.write_plots", lambda *_: [])


def options(room: Path, out: str, *arguments: str) -> list[str]:
    place = ["--config", str(room / "narrow.yaml"), "--out", str(room / out)]
    return [*place, "--trajectories", "2", *arguments]


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
    """Of a process as a user starts it; others of these tests run in this one."""
    given = options(room, "first", "--methods", "fp,minmax,tinydm", "--bits", "w4a8")
    done(command("scripts/benchmark.py", room, *given))
    return room / "first"


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_integer_backend(room: Path) -> None:
    """Its images and numbers stand beside those of the other backend; the model is the same."""
    if reason := int8_supported():
        pytest.skip(reason)
    both = ("--methods", "fp,minmax", "--bits", "w4a8")
    benchmark.main(options(room, "integers", *both))
    file = room / "integers" / "results.json"
    before, fake = made(room / "integers"), json.loads(file.read_text())["rows"]
    benchmark.main(options(room, "integers", *both, "--backend", "int8"))
    after, whole = made(room / "integers"), json.loads(file.read_text())["rows"]
    assert [row["backend"] for row in fake + whole] == [None, "fake", None, "int8"]
    new = {name for name in after if after[name] != before.get(name)}
    assert {Path(name).name for name in new} == {
        *("cell.json", "images-ddim-3-int8.identity.json", "000000.png", "000001.png")
    }
    assert "backend int8" in (room / "integers" / "results.md").read_text()
    assert whole[1]["image_mse"] == pytest.approx(fake[1]["image_mse"], rel=0.2)
    assert whole[1]["eps_mse_of_steps"] != fake[1]["eps_mse_of_steps"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_another_command_adds_and_keeps(first: Path, room: Path) -> None:
    before, rows = made(first), without_times(first / "results.md")
    benchmark.main(options(room, "first", "--methods", "minmax,tinydm", "--bits", "w4a8"))
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


@pytest.mark.slow
def test_a_fresh_folder_gives_the_same_numbers(first: Path, room: Path) -> None:
    more = ("--methods", "tinydm", "--bits", "w4a8", "--ablate", "split")
    benchmark.main(options(room, "again", *more))
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


@pytest.mark.slow
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
    lines = [line for line in result["lines"] if line["sampler"] == line["calibrated"]]
    lines = {line["cell"]["label"]: line for line in lines}
    assert lines["minmax"]["noise_seeds"] == [5, 77] and lines["tinydm"]["noise_seeds"] == [5]
    errors = np.array([own[0]["image_mse"] + own[1]["image_mse"]])
    assert lines["minmax"]["psnr"] == pytest.approx(measure.pooled_psnr(errors))
    text = (first / "results.md").read_text()
    assert "2 images of each of the noise seeds 5, 77" in text
    assert "TinyDM: seeds 0, noise seeds 5 alone." in text
    benchmark.main(options(room, "first", "--methods", "minmax", "--bits", "w4a8"))
    rows = json.loads((first / "results.json").read_text())["rows"]
    assert sum(row["cell"]["label"] == "minmax" and row["noise"] == 77 for row in rows) == 1


@pytest.mark.slow
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
        errors = [float(row["eps weighted"].split()[0]) for row in of_method]
        chosen = [row["chosen"] == "yes" for row in of_method]
        # Two rates may have the same error in three digits.
        assert sum(chosen) == 1 and errors[chosen.index(True)] == min(errors)
    assert not (room / "tuning" / "results.md").exists()


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
