"""What calibrate.py, sample_diffusion.py and compare.py left in a run folder. None: not there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.checkpoint import sha256_of
from ...quant.runtime.packed_file import read_metadata
from ..common.errors import ConfigError, RunError
from ..common.files import regular
from ..common.json_files import read_json
from ..common.reports import CalibrationReport, Comparison, ImagesIdentity, ImagesReport, Plain
from ..experiment.calibration_run import RESULT
from ..experiment.config import Config, load_config, parse_config
from ..experiment.runs import beside
from ..metrics.inputs import list_images


@dataclass(frozen=True)
class ImageSet:
    """A folder of images with what sample_diffusion.py told about it."""

    folder: Path
    identity: Plain
    report: Plain | None

    @property
    def names(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in list_images(self.folder)]


@dataclass(frozen=True)
class Run:
    """metadata: of the quantized file, with its layer table; full and quantized: two sets of
    images from the same noise; notes: what is wrong with what is there."""

    folder: Path
    report: Plain | None
    config: Config | None
    config_text: str | None
    metadata: Plain | None
    comparison: Plain | None
    full: ImageSet | None
    quantized: ImageSet | None
    notes: tuple[str, ...]

    @property
    def file(self) -> Path:
        return self.folder / RESULT

    @property
    def title(self) -> str:
        report = self.report
        if report is None:
            return self.folder.resolve().name
        bits = f"W{report['weight_bits']}A{report['activation_bits']}"
        return f"{report['name']}, {report['method']}, {bits}"

    def common_images(self) -> list[str]:
        """Names of the images that both sets hold."""
        if self.full is None or self.quantized is None:
            return []
        return sorted(set(self.full.names) & set(self.quantized.names))


def read_run(folder: str | Path, full: str | None = None, quantized: str | None = None) -> Run:
    """full and quantized name the folders of images, in the run folder or elsewhere.

    Raises RunError for a folder that is no run, or with damaged files; PackedFileError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; give a run of calibrate.py")
    report = read_json(folder / "report.json", CalibrationReport)
    has_file = (folder / RESULT).exists()
    if report is None and not has_file:
        raise RunError(f"{folder}: neither report.json nor {RESULT}; give a run of calibrate.py")
    metadata = read_metadata(folder / RESULT) if has_file else None
    notes: list[str] = []
    text, config = _configuration(folder, metadata, notes)
    sets = _image_sets(folder, full, quantized, notes)
    made_from = sets[1].identity.get("files_sha256", {}).get("quantized") if sets[1] else None
    if has_file and made_from not in (None, sha256_of(folder / RESULT)):
        notes.append(f"{sets[1].folder.name} was sampled from another file than today's {RESULT}.")
    comparison = read_json(folder / "comparison.json", Comparison)
    return Run(folder, report, config, text, metadata, comparison, *sets, tuple(notes))


def _configuration(
    folder: Path, metadata: Plain | None, notes: list[str]
) -> tuple[str | None, Config | None]:
    """config.yaml, or what the quantized file holds: its text, and parsed if it can be."""
    path = folder / "config.yaml"
    text = (
        regular(path).read_text("utf-8", "replace")
        if path.exists()
        else (metadata or {}).get("config")
    )
    if text is None:
        return None, None
    try:
        return text, load_config(path) if path.exists() else parse_config(text, RESULT)
    except ConfigError as error:
        notes.append(f"The configuration does not fit this version of the program: {error}")
        return text, None


def _image_sets(
    folder: Path, full: str | None, quantized: str | None, notes: list[str]
) -> tuple[ImageSet | None, ImageSet | None]:
    """The named sets, else the first two of the folder that are of the same noise."""
    found = [_image_set(path) for path in sorted(folder.iterdir()) if _is_set(path)]
    fulls, others = (
        [s for s in found if ("quantized" in s.identity.get("files_sha256", {})) == is_quantized]
        for is_quantized in (False, True)
    )
    fulls = fulls if full is None else [_image_set(_placed(folder, full))]
    others = others if quantized is None else [_image_set(_placed(folder, quantized))]
    pairs = [(a, b) for a in fulls for b in others if _noise(a) == _noise(b)]
    if pairs:
        return pairs[0]
    if fulls and others:
        notes.append(
            f"{fulls[0].folder.name} and {others[0].folder.name} differ in seed, sampler or "
            "classes, so their images cannot be compared."
        )
        return None, None
    return (fulls or [None])[0], (others or [None])[0]


def _is_set(path: Path) -> bool:
    return path.is_dir() and beside(path, "identity.json").exists() and any(path.glob("*.png"))


def _placed(folder: Path, name: str) -> Path:
    inside = folder / name
    path = inside if inside.is_dir() else Path(name)
    if not path.is_dir():
        raise RunError(f"{name}: no such folder of images, neither in {folder} nor here")
    return path


def _image_set(path: Path) -> ImageSet:
    identity = read_json(beside(path, "identity.json"), ImagesIdentity) or {}
    return ImageSet(path, identity, read_json(beside(path, "report.json"), ImagesReport))


def _noise(images: ImageSet) -> list[Any]:
    """What must agree for an image to be comparable with that of the same number."""
    return [images.identity.get(name) for name in ("seed", "classes", "sampler", "schedule")]
