"""scripts/gpu_check.py: its checks, run on a CPU with a tiny network, and what it makes of numbers.

python -m pytest tests/test_gpu_check.py
"""

import json
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import calibrate
import sample_diffusion
from tests.helpers.commands import ROOT
from tests.helpers.fake_cuda import CUDA, fake_cuda
from tinydm.scripts import gpu_check
from tinydm.scripts.bench import card_checks, card_report, speed
from tinydm.scripts.bench.card_checks import CHECKS, Card, Verdict, tiny_config, waits_by_place
from tinydm.scripts.bench.speed_models import VARIANTS
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.common.files import write_json
from tinydm.scripts.experiment.resume import STATE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Card:
    folder = tmp_path_factory.mktemp("card")
    return Card(CPU, folder, tiny_config(folder), 2, (16, 8))


def test_without_a_card_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device") as raised:
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_integers_in_tf32(card: Card) -> None:
    (verdict,) = card_checks.check_tf32(card)
    assert verdict.passed and verdict.values["wrong"] == 0
    assert 0 < verdict.values["dequantized"] < 1e-5  # float32 here


@pytest.mark.slow
def test_a_calibration_by_phase(card: Card) -> None:
    (verdict,) = card_checks.check_calibration(card)
    assert verdict.passed is None and {"search", "finetune"} <= verdict.values["phases"].keys()
    assert verdict.values["peaks"] is None


def test_a_calibration_that_was_not_made_at_once_here_is_made_anew(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its seconds would be those of a part, or of another card."""
    asked: list[bool] = []
    monkeypatch.setattr(
        card_checks, "calibrate_run", lambda run, overwrite: asked.append(overwrite)
    )
    folder = tmp_path / "calibrated"
    folder.mkdir()
    for device, begun in (("cpu", False), ("NVIDIA X", False), ("cpu", True)):
        write_json(folder / "report.json", {"device": device})
        if begun:
            (folder / STATE).touch()
        replace(card, folder=tmp_path).calibrated()
    assert asked == [False, True, True]


@pytest.mark.slow
def test_images_against_those_of_the_cpu(card: Card) -> None:
    found = {v.name: v for v in card_checks.check_images(card)}
    for name in ("images of tiny, full precision, float32", "images of tiny, fake, float32"):
        assert found[name].passed and found[name].values["psnr"] == 999
        assert found[name].text.startswith("the same images as ")
    assert found["images of tiny, fake, tf32"].passed is None
    half = found["images of tiny, full precision, bf16"]
    assert half.passed is None or 25 < half.values["psnr"] < 90


def test_images_are_judged_by_the_median_one() -> None:
    """Rounding leads single images elsewhere; a kernel that is wrong, all of them."""
    wanted = np.full((4, 2, 2, 3), 100, np.uint8)
    made = wanted.copy()
    made[0] = 200
    assert card_checks.nearness(made, wanted) == (999, pytest.approx(8.13, abs=0.01))
    made[:3] = 101
    assert card_checks.nearness(made, wanted) == pytest.approx((48.13, 48.13), abs=0.01)
    assert card_checks.nearness(made[2:], wanted[2:])[0] < 49


@pytest.mark.slow
def test_images_that_differ_fail(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    real = card_checks.images_of

    def other(card: Card, device: torch.device, *rest: str) -> object:
        made = real(card, device, *rest)
        return made if next(calls) == 0 else made // 2

    calls = iter([0, 1] * 9)
    monkeypatch.setattr(card_checks, "images_of", other)
    monkeypatch.setattr(card_checks, "obstacle", lambda p, d: None if p == "float32" else "no")
    found = {v.name: v for v in card_checks.check_images(card)}
    verdict = found["images of tiny, full precision, float32"]
    assert verdict.passed is False and verdict.line.startswith("FAILED: images of tiny, full")


@pytest.mark.slow
def test_what_is_made_twice(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [v.passed for v in card_checks.check_repeats(card)] == [True, True]

    def unlike(run: object, indices: list[int]) -> None:
        (run.folder / f"{len(list(run.folder.parent.glob('images*/*.png')))}.png").touch()

    monkeypatch.setattr(card_checks, "make_images", unlike)
    assert [v.passed for v in card_checks.check_repeats(card)] == [True, False]


def test_commands(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lines, as each script's own parser knows them."""
    asked = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
        asked.append(command[1:])
        failed = "calibrate" in command[1]
        return subprocess.CompletedProcess(command, int(failed), "a\nthe end\n", "x\nerror: no\n")

    monkeypatch.setattr(card_checks.subprocess, "run", run)
    found = {v.name: v for v in card_checks.check_commands(card)}
    assert found["calibrate.py"].line == "FAILED: calibrate.py: error: no"
    assert found["sample_diffusion.py"].line == "ok: sample_diffusion.py: the end"
    calibrate.parse_arguments(asked[0][1:])
    for command in asked[1:]:
        args = sample_diffusion.parse_arguments(command[1:])
        assert args.device == "cpu" and args.overwrite
        sample_diffusion.check_paths(args, Path(args.out))
    assert all(Path(command[0]).exists() for command in asked) and len(asked) >= 3


def test_waits(card: Card) -> None:
    (verdict,) = card_checks.check_waits(card)
    assert verdict.passed is None and verdict.values["places"] == {}

    def action() -> None:
        warnings.warn("something else", stacklevel=1)
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    counts = waits_by_place(action)
    assert counts.total() == 3 and next(iter(counts)).startswith("test_gpu_check.py:")


def test_tests_that_need_a_card(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    (verdict,) = card_checks.check_tests(card)
    assert verdict.passed is None
    assert 'm", "gpu"' in Path(card_checks.__file__).read_text()
    assert '"gpu: ' in (ROOT / "pyproject.toml").read_text()


def test_a_check_that_breaks_does_not_end_the_others(card: Card) -> None:
    def check_nothing(card: Card) -> list[Verdict]:
        raise RuntimeError("CUDA error: an illegal memory access\nmore lines")

    (verdict,) = gpu_check.attempt(check_nothing, card)
    assert verdict.line == "FAILED: nothing: RuntimeError: CUDA error: an illegal memory access"
    assert "check_nothing" in verdict.values["traceback"]


# ---- numbers ----


def row(model: str, variant: str, ms: float, batch: int = 10) -> dict:
    return {
        "model": model,
        "variant": variant,
        "label": VARIANTS[variant].label,
        "batch": batch,
        "calls": 100,
        "seconds": [ms / 1000] * 3,
        "full_seconds": [0.06] * 3,
        "device_bytes": 2**31,
    }


def test_times_and_hours() -> None:
    one = row("m", "fp32", 36.0)
    assert card_report.milliseconds(one) == pytest.approx(36)
    assert card_report.hours(one) == pytest.approx(5.0)  # 500,000 calls
    text = card_report.times([one, {"model": "m", "label": "x", "reason": "no such thing"}])
    assert "| m     | fp32    | 10   | 36            | 2.00 | 5     | 1.67" in text
    assert "no such thing" in text


@pytest.mark.parametrize(("ms", "passed"), [(10.0, True), (14.0, False)])
def test_integers_have_to_pay_in_wide_models(ms: float, passed: bool) -> None:
    """Against the fastest half precision, at the largest batch that both have."""
    rows = [
        row("wide", "fp16", 25.0, 16),
        row("wide", "fp16-graph", 15.0, 16),
        row("wide", "fp16-graph", 1.0, 64),
        row("wide", "int8-w8a8", ms, 16),
        row("wide", "int8-w8a8", 9.0, 4),
        row("narrow", "int8-w8a8", 90.0, 16),
        {"model": "wide", "variant": "bf16", "label": "bf16", "reason": "no"},
    ]
    ran, first, second = card_report.verdicts_of_speed(rows, {"wide"})
    assert ran.passed
    assert first.passed is passed and f"wide {15 / ms:.2f} times as fast" in first.text
    assert second.passed is None and "nothing measured" in second.text


def test_fake_quantization_in_tf32_has_to_pay() -> None:
    rows = [row("m", "fake-w8a8", 40.0), row("m", "fake-w8a8-tf32", 10.0)]
    assert card_report.verdicts_of_speed(rows, set())[2].passed
    assert not card_report.verdicts_of_speed([rows[0], row("m", "fake-w8a8-tf32", 20.0)], set())[
        2
    ].passed


@pytest.mark.parametrize(
    ("error", "broken"),
    [(RuntimeError("CUDA error: no kernel image"), True), (torch.OutOfMemoryError("CUDA"), False)],
)
def test_a_variant_that_breaks_has_a_row(
    card: Card, error: Exception, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are measured all the same, and the report says which one it was."""

    def of(bench: speed.Bench, name: str) -> Iterator[dict]:
        yield row("tiny", name, 1.0) | {"threads": 1}
        if name == "tf32":
            raise error

    monkeypatch.setattr(speed.Bench, "of", of)
    monkeypatch.setattr(gpu_check, "QUICK", ["fp32", "tf32", "bf16"])
    rows = list(gpu_check.measured(card, quick=True))
    assert [r["variant"] for r in rows] == ["fp32", "tf32", "tf32", "bf16"]
    ran = card_report.verdicts_of_speed(rows, set())[0]
    assert ran.passed is not broken and ("tiny TF32: RuntimeError: CUDA" in ran.text) == broken
    assert "TF32" in card_report.times(rows)


# ---- the whole ----


@pytest.mark.slow
def test_a_report(tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows join the tables of benchmark.py."""
    monkeypatch.setattr(gpu_check, "CHECKS", CHECKS[:1])
    monkeypatch.setattr(gpu_check, "QUICK", ["fp32", "tf32", "int8-w8a8-launches"])
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert gpu_check.main(options) == 0
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert report["device"] == "cpu" and len(report["speed"]) == 4
    text = (tmp_path / "gpu_report.md").read_text()
    assert "- ok: integers in TF32" in text and "not here: int8 against the best" in text
    rows = speed.rows_of_report(tmp_path / "gpu_report.json")
    assert rows[0]["model"] == "tiny, cpu" and rows[0]["label"] == "fp32"
    monkeypatch.setattr(gpu_check, "CHECKS", (lambda card: [Verdict("x", False, "y")],))
    assert gpu_check.main(options) == 1


class Event:
    """Of a CUDA stream, on the clock."""

    def __init__(self, enable_timing: bool):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


@pytest.mark.slow
def test_on_the_stand_in_for_a_card(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a CUDA device asks for, as far as a CPU can stand in for it (fake_cuda.py): not
    half precision, kernels and graphs."""

    def obstacle(precision: str, device: torch.device) -> str | None:
        return None if precision in ("float32", "tf32") else "not here"

    monkeypatch.setattr(card_checks, "obstacle", obstacle)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(card_checks, "int8_supported", lambda device: "not here")
    monkeypatch.setattr(gpu_check, "QUICK", ["tf32"])
    card.calibrated()
    with fake_cuda():
        there = replace(card, device=CUDA)
        checks = card_checks.check_tf32, card_checks.check_images
        found = [verdict for check in checks for verdict in gpu_check.attempt(check, there)]
        rows = list(gpu_check.measured(there, quick=True))
    assert len(found) == 9 and not [v.line for v in found if v.passed is False]
    assert sum(v.passed is True for v in found) == 5
    assert [row["batch"] for row in rows] == [1, 2] and all("seconds" in row for row in rows)


@pytest.mark.gpu
@pytest.mark.slow
def test_quick_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_check, "CHECKS", [c for c in CHECKS if c is not card_checks.check_tests]
    )
    assert gpu_check.main(["--quick", "--out", str(tmp_path)]) in (0, 1)
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    speed_alone = {"int8 against the best half precision"}
    failed = {v["name"] for v in report["verdicts"] if v["passed"] is False}
    assert failed <= speed_alone | {"fake quantization in TF32 against float32"}


def test_a_verdict_is_one_line() -> None:
    verdict = Verdict("a", True, "b")
    assert verdict.line == "ok: a: b" and replace(verdict, passed=None).line == "not here: a: b"
    measured = replace(verdict, passed=None, values={"seconds": 1.0})
    assert measured.line == "not judged here: a: b"
