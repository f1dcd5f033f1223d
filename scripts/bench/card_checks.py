"""What gpu_check.py looks at on a card: the same images as on a CPU, the same bytes twice, integers
exact in TF32, waits for the device, the phases of a calibration, the tests that need a card.

Each check is a function of a Card and gives a Verdict. On a CPU they run as well, so that their
code is tested where there is no card.
"""

import json
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...models.pipeline import build_denoiser
from ...quant.backends.selection import int8_supported
from ...quant.backends.tensor_cores import EXACT_SUM, allow_tf32
from ..common.errors import MetricError
from ..common.files import save_tensors, write_json
from ..common.images import to_uint8
from ..common.json_files import read_json
from ..common.paths import ROOT
from ..experiment.assembly import assemble
from ..experiment.calibration_run import RESULT, CalibrationRun, calibrate_run
from ..experiment.cli import explain
from ..experiment.config import Config, load_config
from ..experiment.device_defaults import device_memory, for_calibration
from ..experiment.devices import device_name
from ..experiment.precision import obstacle
from ..experiment.resume import STATE
from ..experiment.runs import claim
from ..experiment.sampling_run import SamplingRun, make_images
from ..metrics.inception import InceptionFeatures
from ..metrics.scores import psnr, squared_error

CPU = torch.device("cpu")
# Between two backends, of the median image; between two devices float32 has more. Of all images
# together it would be less where both are right: rounding leads single ones to another image.
SAME_DB = 47.0
MOST_DB = 999.0  # of images that are the same
MOST_SECONDS = 120.0  # of a calibration of emoji32
MOST_WAITS = 1.0  # of a sampling step
FEATURES_APART = 1e-3  # of Inception, relative
WAITED = "called a synchronizing"  # how PyTorch begins its warning
TINY = {
    "name": "tiny",
    "model": {
        "arch": "ddim_unet",
        "checkpoint": "tiny.pt",
        "params": {
            "ch": 8,
            "ch_mult": [1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "image_size": 8,
            "norm_groups": 2,
        },
    },
    "sampler": {"name": "ddim", "steps": 3, "skip": "quad", "eta": 1.0},
    "sampling": {"count": 2, "micro_batch": 2, "seed": 5},
    "calibration": {"samples": 32},
    "quant": {
        "search": {"rounds": 2, "batch_size": 4},
        "reconstruct": {"finetune_iterations": 3, "finetune_batch_size": 4},
    },
}


@dataclass(frozen=True)
class Verdict:
    """What a check found. passed: None where it cannot be made here, or where what it measured is
    judged on a card alone."""

    name: str
    passed: bool | None
    text: str
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        unjudged = "not judged here" if self.values else "not here"
        word = {True: "ok", False: "FAILED", None: unjudged}[self.passed]
        return f"{word}: {self.name}: {self.text}"


@dataclass(frozen=True)
class Card:
    """What the checks share. config: of a small model with a checkpoint; count: images that are
    compared; size: channels and side of the layer whose integers are counted."""

    device: torch.device
    folder: Path
    config: Path
    count: int
    size: tuple[int, int]

    @property
    def is_one(self) -> bool:
        return self.device.type == "cuda"

    def load(self, *keys: str) -> Config:
        return load_config(self.config, keys, device_memory(self.device))

    def calibrated(self, name: str = "calibrated") -> Path:
        """A folder with the quantized file that the device makes, and its report. What was begun is
        begun anew, since the seconds are to be those of the whole, and so is what another made."""
        folder = self.folder / name
        config = for_calibration(self.load())
        run = CalibrationRun(config, assemble(config, device=self.device), folder, self.device)
        known = read_json(folder / "report.json", dict[str, Any]) or {}
        ours = known.get("device") == device_name(self.device) and not (folder / STATE).exists()
        calibrate_run(run, overwrite=not ours)
        return folder


def told(error: Exception) -> str:
    """One line."""
    return explain(error) or f"{type(error).__name__}: {error}".splitlines()[0]


def tiny_config(folder: Path) -> Path:
    """A configuration of a network of a few thousand random weights, for a quick look."""
    generator = torch.Generator().manual_seed(0)
    model = build_denoiser("ddim_unet", TINY["model"]["params"])
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "tiny.pt", model.state_dict())
    write_json(folder / "tiny.yaml", TINY)  # which YAML is too
    return folder / "tiny.yaml"


def images_of(
    card: Card, device: torch.device, quantized: Path | None, backend: str, precision: str
) -> np.ndarray:
    """uint8 (N, H, W, C). Calls have no more rows than images: a CPU makes them, too."""
    config = card.load(f"sampling.micro_batch={card.count}")
    assembly = assemble(config, quantized, backend, device, precision=precision)
    pipeline, sampling = assembly.pipeline, config.sampling
    numbers = range(card.count)
    x = pipeline.sample(assembly.denoiser, numbers, sampling.seed, sampling.classes, device=device)
    return to_uint8(x).numpy()


def check_images(card: Card) -> list[Verdict]:
    """Full precision and the quantized file: the device's images against the CPU's."""
    file, of = card.calibrated() / RESULT, card.load().name
    found = []
    for quantized, backend, precisions in (
        (None, "fake", ("float32", "tf32", "bf16", "fp16")),
        (file, "fake", ("float32", "tf32")),
        (file, "int8", ("float32", "fp16") if card.is_one else ("float32",)),
    ):
        what = "full precision" if quantized is None else backend
        wanted = None
        for precision in precisions:
            name = f"images of {of}, {what}, {precision}"
            reason = obstacle(precision, card.device)
            if reason is None and backend == "int8":
                reason = int8_supported(card.device)
            if reason is not None:
                found.append(Verdict(name, None, reason))
                continue
            if wanted is None:
                wanted = images_of(card, CPU, quantized, "fake", "float32")
            try:
                made = images_of(card, card.device, quantized, backend, precision)
            except Exception as error:  # of one kernel: the other images are compared all the same
                values = {"traceback": traceback.format_exc()}
                found.append(Verdict(name, False, told(error), values))
                continue
            decibel, least = nearness(made, wanted)
            # Full precision in fewer bits is another result, which is told, not judged.
            judged = precision == "float32" or backend == "fake" and quantized is not None
            other = "float32" if quantized is None else "fake quantization in float32"
            text = f"{decibel:.1f} dB to {other} on the CPU in the median, {least:.1f} at least"
            if np.array_equal(made, wanted):
                text = f"the same images as {other} on the CPU"
            elif judged:
                text += f"; a median of {SAME_DB:.0f} expected"
            passed = decibel >= SAME_DB if judged else True
            found.append(Verdict(name, passed, text, {"psnr": decibel, "least": least}))
    return found


def nearness(made: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """PSNR of the median image, of two in the middle the lower one, and of the furthest; MOST_DB at
    most. Both (N, H, W, C) uint8."""
    pairs = zip(made, wanted, strict=True)
    each = np.minimum([psnr(squared_error(*pair)) for pair in pairs], MOST_DB)
    return float(np.quantile(each, 0.5, method="lower")), float(each.min())


def check_tf32(card: Card) -> list[Verdict]:
    """Sums of integers as tensor cores make them, against exact ones."""
    reason = obstacle("tf32", card.device)
    channels, side = card.size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (channels, channels, 3, 3), generator=generator)
    codes = torch.randint(-128, 128, (2, channels, side, side), generator=generator)
    assert channels * 9 * 8 * 128 < EXACT_SUM or channels > 1820
    exact = nn.functional.conv2d(codes.double(), weight.double(), padding=1)
    operands = [
        value.float().to(card.device).contiguous(memory_format=torch.channels_last)
        for value in (codes, weight)
    ]
    with allow_tf32(True):
        sums = nn.functional.conv2d(*operands, padding=1)
        lossy = nn.functional.conv2d(operands[0], operands[1] * 0.0137, padding=1)
    wrong = int((sums.double().cpu() != exact).sum())
    gap = float((lossy.double().cpu() - exact * 0.0137).abs().max() / exact.abs().max() / 0.0137)
    text = (
        f"{wrong} of {exact.numel()} sums of integers differ; dequantized weights lose {gap:.1e}"
        + ("" if reason is None else f" (without TF32, which {reason})")
    )
    return [Verdict("integers in TF32", wrong == 0, text, {"wrong": wrong, "dequantized": gap})]


def check_repeats(card: Card) -> list[Verdict]:
    """A quantized file and a folder of images, made twice."""
    files = [(card.calibrated(name) / RESULT).read_bytes() for name in ("calibrated", "again")]
    folders = []
    config = card.load(f"sampling.count={card.count}")
    for name in ("images", "images-again"):
        assembly = assemble(config, card.folder / "calibrated" / RESULT, device=card.device)
        run = SamplingRun(config, assembly, card.folder / name, card.device, "fake")
        claim(run.folder, run.identity, overwrite=True)
        make_images(run, list(range(card.count)))
        folders.append({path.name: path.read_bytes() for path in run.folder.glob("*.png")})
    pairs = {
        "a quantized file made twice": files[0] == files[1],
        f"{card.count} images made twice": folders[0] == folders[1] and bool(folders[0]),
    }
    return [
        Verdict(name, same, "the same bytes" if same else "other bytes")
        for name, same in pairs.items()
    ]


def check_waits(card: Card) -> list[Verdict]:
    """How often the host waits for the device while it samples, by place."""
    file = card.calibrated() / RESULT
    counts = []
    for steps in (3, 6):
        config = card.load(f"sampler.steps={steps}")
        assembly = assemble(config, file, device=card.device)

        def sample(assembly: Any = assembly, config: Config = config) -> None:
            given = range(card.count), config.sampling.seed, config.sampling.classes
            assembly.pipeline.sample(assembly.denoiser, *given, device=card.device)

        sample()  # fills look-ups
        counts.append(waits_by_place(sample))
    more = (counts[1].total() - counts[0].total()) / 3
    places = ", ".join(f"{place} {n}" for place, n in counts[1].most_common(5)) or "nowhere"
    text = f"{more:.2g} a step; in 6 steps: {places}"
    passed = more <= MOST_WAITS if card.is_one else None
    return [Verdict("waits for the device", passed, text, {"places": dict(counts[1])})]


def waits_by_place(action: Callable[[], Any]) -> Counter[str]:
    """Calls that made the host wait for a CUDA device, by the line that made them."""
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode(before)
    told = [w for w in caught if str(w.message).startswith(WAITED)]
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told)


def check_calibration(card: Card) -> list[Verdict]:
    """Seconds, and memory on the device, of each phase."""
    report = json.loads((card.calibrated() / "report.json").read_text(encoding="utf-8"))
    phases = {
        name: values["seconds"]
        for name, values in report["phases"].items()
        if isinstance(values, dict) and "seconds" in values
    }
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
    text = f"{report['seconds']:.0f} s with the trajectories ({parts})"
    passed = report["seconds"] <= MOST_SECONDS if card.is_one else None
    values = {"phases": phases, "seconds": report["seconds"], "peaks": report["peak_device_bytes"]}
    return [Verdict(f"calibration of {report['name']}", passed, text, values)]


def check_commands(card: Card) -> list[Verdict]:
    """The commands themselves, each in a process of its own, on a few images."""
    of, place = ["--config", str(card.config)], ["--device", str(card.device), "--overwrite"]
    run, images = card.folder / "commands", card.folder / "commands" / "images"
    file = ["--quantized", str(run / RESULT), "--count", str(card.count)]
    commands = {
        "calibrate.py": ["--set", "quant.method=minmax", "--out", str(run)],
        "sample_diffusion.py": ["--count", str(card.count), "--out", f"{images}-full"],
        "sample_diffusion.py, quantized": [*file, "--out", f"{images}-fake"],
    }
    if int8_supported(card.device) is None:
        commands["sample_diffusion.py, int8"] = [*file, "--backend", "int8", "--out", str(images)]
    found = []
    for name, options in commands.items():
        script = ROOT / name.partition(",")[0]
        command = [sys.executable, str(script), *of, *place, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        found.append(Verdict(name, done.returncode == 0, (lines or ["no output"])[-1]))
    return found


def check_inception(card: Card) -> list[Verdict]:
    """Features for FID, against the CPU's."""
    name = "features for FID"
    try:
        networks = [InceptionFeatures(device=str(place)) for place in (card.device, CPU)]
    except MetricError as error:
        return [Verdict(name, None, str(error))]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    found, wanted = (network(images).pool.double().cpu() for network in networks)
    gap = float((found - wanted).abs().max() / wanted.abs().max())
    return [Verdict(name, gap < FEATURES_APART, f"{gap:.1e} apart, relative", {"gap": gap})]


def check_tests(card: Card) -> list[Verdict]:
    """The tests that need a card, in a process of their own."""
    name = "tests that need a card"
    if not card.is_one:
        return [Verdict(name, None, f"the device is {device_name(card.device)}")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return [Verdict(name, done.returncode == 0, last, {"output": done.stdout[-20_000:]})]


CHECKS: tuple[Callable[[Card], list[Verdict]], ...] = (
    check_tf32,
    check_calibration,
    check_images,
    check_repeats,
    check_waits,
    check_commands,
    check_inception,
    check_tests,
)
