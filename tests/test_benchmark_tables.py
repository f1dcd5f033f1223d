"""The benchmark's tables, of rows made by hand: leads, intervals, scores, and the cells of a plan.

python -m pytest tests/test_benchmark_tables.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from tests.helpers.narrow import BENCH, write_narrow
from tinydm.scripts.bench import leads, measure, methods, plots, speed, tables
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
    read_numbers,
    study_cells,
)
from tinydm.scripts.bench.studies import STUDIES
from tinydm.scripts.common.errors import ConfigError

SOFTMAX_4 = ("quant.activation.softmax=row", "quant.activation.softmax_bits=4")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with narrow.yaml and narrow.pt."""
    return write_narrow(tmp_path_factory.mktemp("bench"), BENCH)


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


@pytest.mark.parametrize("text", ["9" * 5000, "\u00b2", "\u0663", "-1", "1.0", "0x1", "nan", ""])
def test_numbers_that_are_none(text: str) -> None:
    """Python reads no more than 4300 digits, and calls other digits decimal too."""
    with pytest.raises(ConfigError, match="--seeds"):
        read_numbers("--seeds", text)


def test_more_threads_than_a_process_can_have(tmp_path: Path) -> None:
    """OpenMP ends the process by a signal."""
    with pytest.raises(ConfigError, match="--threads 99999: must be whole numbers from 1 to 1024"):
        speed.main(["--threads", "99999", "--out", str(tmp_path)])


def test_files_of_several_sizes_have_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One point for each width of weights, from the smallest file on."""
    rows = []
    for bits, size, error in ((8, 2.0, 10.0), (4, 1.0, 100.0)):
        row = row_of("tinydm", 50, 50, 0, np.full(4, error))
        row["cell"] = Cell("benchmark", "tinydm", (bits, 8), 50, 0).to_plain()
        steps = {"eps_timesteps": [0], "eps_mse_of_steps": [error]}
        rows.append(row | steps | {"size_mb": size, "folder": f"w{bits}"})
    names: list[str] = []
    monkeypatch.setattr(plots, "_save", lambda path, draw, **_: names.append(path.name))
    plots.write_plots(tmp_path, rows)
    assert "size-50-a8.png" in names
    names.clear()
    plots.write_plots(tmp_path, rows[:1])
    assert "size-50-a8.png" not in names
    axes = Figure().subplots()
    plots.psnr_of_sizes(axes, tables.lines_of(rows))
    (curve,) = axes.lines
    assert np.allclose(curve.get_xydata(), [[1.0, 28.13], [2.0, 38.13]], atol=0.01)
    assert [text.get_text() for text in axes.texts] == ["W4", "W8"]
