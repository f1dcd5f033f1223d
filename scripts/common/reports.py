"""What the scripts write as JSON and read again. Keys that are not named here are shown at most."""

from typing import Any, TypedDict

Plain = dict[str, Any]


class LayerReport(TypedDict):
    name: str
    kind: str
    weights: int
    macs: int
    weight_bits: int | None
    activation_bits: list[float]
    note: str


class _CalibrationCore(TypedDict):
    name: str
    method: str
    weight_bits: int
    activation_bits: int
    size_mb: float
    float32_mb: float
    seconds: float


class CalibrationReport(_CalibrationCore, total=False):
    """report.json of calibrate.py."""

    ratio_to_float32: float
    weights_quantized: float
    macs_quantized: float
    seed: int
    threads: int
    versions: dict[str, str]
    sources: dict[str, str]
    identity: str
    phases: dict[str, Any]
    layers: list[LayerReport]


class _Images(TypedDict, total=False):
    made: int


class _Seconds(TypedDict, total=False):
    sample: float


class _ImagesCore(TypedDict):
    images_per_second: float | None


class ImagesReport(_ImagesCore, total=False):
    """NAME.report.json of sample_diffusion.py."""

    images: _Images
    seconds: _Seconds
    versions: dict[str, str]


class ImagesIdentity(TypedDict, total=False):
    """NAME.identity.json of sample_diffusion.py."""

    files_sha256: dict[str, str]


class Comparison(TypedDict, total=False):
    """comparison.json of compare.py."""

    rows: list[dict[str, Any]]


class RecordSection(TypedDict):
    settings: dict[str, Any]
    values: dict[str, Any]


class StatesSection(TypedDict):
    """What report.py measured along trajectories: a section of its record."""

    timesteps: list[int]
    trajectories: int
    eps_mse_of_steps: list[float] | None
    low: list[list[float | None]]
    high: list[list[float | None]]


class LayersSection(TypedDict):
    """What report.py measured of single layers: a section of its record."""

    timesteps: list[int]
    eps_mse: dict[str, float]
    eps_mse_of_all: float


class _ImageCounts(TypedDict):
    generated: int
    reference: int | None


class _ScoresCore(TypedDict):
    reference: str
    images: _ImageCounts


class Scores(_ScoresCore, total=False):
    fid: float | None
    sfid: float | None
    recall: float | None
    precision: float | None
    reference_sha256: str


class SamplerReport(TypedDict):
    name: str
    steps: int


class CellReport(TypedDict):
    table: str
    label: str
    bits: list[int]
    steps: int
    seed: int
    overrides: list[str]


class _RowCore(TypedDict):
    cell: CellReport
    sampler: SamplerReport
    calibrated: SamplerReport
    scores: Scores | None
    digest: str
    count: int
    trajectories: int
    calls: int
    distinct_calls: int


class RowReport(_RowCore, total=False):
    """A row of benchmark.py's results.json."""

    size_mb: float | None
    seconds: float | None
    code: str | None
    backend: str | None
    image_mse: list[float] | None
    eps_mse_of_trajectories: list[float] | None
    eps_weighted_of_trajectories: list[float] | None
    noise: int
    peak_bytes: float | None
    samples: int
    calibration_trajectories: int


class PlaceReport(TypedDict, total=False):
    commit: str | None
    cuda: str | None
    processor: str | None


class _ResultsCore(TypedDict):
    name: str
    rows: list[RowReport]


class ResultsReport(_ResultsCore, total=False):
    """results.json of benchmark.py."""

    environment: PlaceReport
