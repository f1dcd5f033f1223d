"""One cell: calibrate, sample, measure. What is there already is not made again.

cells/<steps>-<bits>-<method>-s<seed>-<digest>/   quantized.safetensors and the rest of
                                                  calibrate.py's run folder
                              images-<sampler>/   images alone; of another backend than fake
                                                  images-<sampler>-<backend>/, of another noise
                                                  than sampling.seed ...-n<seed>/
                              cell.json           what was measured
"""

from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..common.errors import ConfigError
from ..common.json_files import read_json
from ..common.memory import forget_peak, resident
from ..common.paths import ROOT
from ..common.reports import CalibrationReport
from ..experiment.assembly import Assembly, assemble
from ..experiment.backend import Backend
from ..experiment.calibration_run import (
    RESULT,
    CalibrationRun,
    calibrate_run,
    correct_run,
    step_importance,
)
from ..experiment.config import Config
from ..experiment.resume import identity_of as identity_of_calibration
from ..experiment.runs import digest_of
from . import measure
from .full import FullPrecision, sample_images
from .plan import BENCHMARK, Cell, Plan, Sampler, is_current
from .record import Record
from .scoring import Scorer

FULL_BITS = (32, 32)
Row = dict[str, Any]  # one cell with one sampler, plain values


def code_digest() -> str:
    """Digest of the source files that a quantized file depends on."""
    files = sorted(path for room in ("models", "quant") for path in (ROOT / room).rglob("*.py"))
    digest = sha256()
    for file in sorted(files):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class Bench:
    """Everything that the cells of one folder share.

    trajectories: of the fresh states; backend: of every quantized model.
    """

    def __init__(
        self,
        root: Path,
        plan: Plan,
        device: torch.device,
        trajectories: int,
        scorer: Scorer | None = None,
        backend: Backend | None = None,
    ):
        self.root, self.plan, self.device = root, plan, device
        self.trajectories, self.scorer = trajectories, scorer
        self.backend = Backend() if backend is None else backend
        self.count = plan.base.sampling.count
        self.code = code_digest()
        self._full: dict[Any, FullPrecision] = {}

    @property
    def most_trajectories(self) -> int:
        """trajectories rounded up to whole network calls."""
        size = self.plan.base.sampling.micro_batch
        return -(-self.trajectories // size) * size

    def full(self, config: Config) -> FullPrecision:
        """Full precision with the sampler of this configuration."""
        key = (config.sampler, config.sampling)
        if key not in self._full:
            self._full[key] = FullPrecision(self.root, config, self.device)
        return self._full[key]

    def digest(self, cell: Cell) -> str:
        """Digest of everything but the code that the cell's images depend on."""
        config = self.plan.config(cell)
        full = self.full(config)
        calibration = identity_of_calibration(config, full.sources)
        return digest_of({"full": full.identity, "calibration": calibration})

    def full_row(self, sampler: Sampler, noise: int) -> Row:
        """Full precision itself: its size and, where asked for, its scores."""
        full = self.full(self.plan.full_config(sampler, noise))
        images = full.images()
        cell = Cell(BENCHMARK, "fp", FULL_BITS, sampler.steps, 0)
        return self._row(cell, sampler, noise, full, full.digest, full.folder) | {
            "calibrated": vars(sampler),
            "backend": None,
            "size_mb": full.parameters * 4 / 2**20,
            "scores": self._scores(full.record, "scores", images),
        }

    def rows(self, cell: Cell, transfers: list[Sampler], noises: list[int]) -> list[Row]:
        """The rows of a cell: of the calibrated sampler and each of `transfers`, one for each of
        `noises`, the seeds of the images."""
        config, digest = self.plan.config(cell), self.digest(cell)
        folder = self._folder(cell)
        record = Record(folder / "cell.json")
        base = self._base(cell, config)
        made = record.section("calibration", {}, lambda: self._calibrate(config, folder, base))
        rows = []
        for sampler in [self.plan.sampler(cell.steps), *transfers]:
            errors = self._eps(self.plan.config(cell, sampler), folder, record, sampler)
            for noise in noises:
                config = self.plan.config(cell, sampler, noise)
                row = self._row(cell, sampler, noise, self.full(config), digest, folder)
                images = self._images(config, folder, record, sampler, noise)
                rows.append(row | made | errors | images)
        return rows

    def _row(
        self,
        cell: Cell,
        sampler: Sampler,
        noise: int,
        full: FullPrecision,
        digest: str,
        folder: Path,
    ) -> Row:
        return {
            "cell": cell.to_plain(),
            "sampler": vars(sampler),
            "noise": noise,
            "calibrated": vars(self.plan.sampler(cell.steps)),
            "digest": digest,
            "folder": folder.relative_to(self.root).as_posix(),
            "backend": self.backend.label,
            "count": self.count,
            "trajectories": self.trajectories,
            "calls": len(full.calls),
            "distinct_calls": len(set(full.calls)),
        }

    def _base(self, cell: Cell, config: Config) -> Path | None:
        """The finished run that this cell differs from in the correction alone, if any."""
        other, kind = cell.base, config.quant.correction
        if other is None or kind == "none":
            return None
        base = self.plan.config(other)
        if base.quant.correction != "none":
            return None
        corrected = replace(base.quant, method=cell.method, correction=kind)
        folder = self._folder(other)
        same = replace(base, quant=corrected) == config
        return folder if same and (folder / RESULT).exists() else None

    def _folder(self, cell: Cell) -> Path:
        return self.root / "cells" / f"{cell.name}-{self.digest(cell)[:8]}"

    def _calibrate(self, config: Config, folder: Path, base: Path | None) -> Row:
        full = self.full(config)
        measurable = not (folder / RESULT).exists() and forget_peak()
        states, seconds = full.calibration_states(config)
        assembly = assemble(config, device=self.device)
        run = CalibrationRun(config, assembly, folder, self.device)
        corrected = assembly.pipeline.uncorrected(config.quant.correction) is None
        if base is not None and corrected and not (folder / RESULT).exists():
            correct_run(run, base, states)
        calibrate_run(run, resume=True, states=states)
        report = read_json(folder / "report.json", CalibrationReport)
        phases = report.get("phases", {})
        in_phases = sum(p.get("seconds", 0) for p in phases.values() if isinstance(p, dict))
        # A resumed run reports its own seconds only; those of the phases are kept over resumes.
        calibrating = max(report["seconds"], in_phases)
        peaks = [resident("VmHWM") if measurable else None]
        if base is not None:
            found = Record(base / "cell.json").find("calibration", {}) or {}
            peaks.append(found.get("peak_bytes"))
        return {
            "size_mb": report["size_mb"],
            "seconds": round(seconds + calibrating, 2),
            "peak_bytes": None if None in peaks else max(peaks),
            "samples": config.calibration.samples,
            "calibration_trajectories": full.trajectories(config),
            "threads": report.get("threads"),
            "tuples_per_step": phases.get("tuples_per_step"),
            "code": self.code,
        }

    def _label(self, sampler: Sampler) -> str:
        backend = self.backend.label
        if backend == Backend().label:
            return sampler.label
        return f"{sampler.label}-{backend.replace(', ', '-')}"

    def _quantized(self, config: Config, folder: Path) -> Assembly:
        name, code = self.backend.name, self.backend.code
        return assemble(config, folder / RESULT, name, self.device, code)

    def _images(
        self, config: Config, folder: Path, record: Record, sampler: Sampler, noise: int
    ) -> Row:
        """The errors of the images with this noise, and their scores."""
        label = self._label(sampler)
        if noise != self.plan.noise:
            label = f"{label}-n{noise}"
        images = folder / f"images-{label}"

        def pairs() -> Row:
            reference = self.full(config).images()
            quantized = self._quantized(config, folder)
            sample_images(config, quantized, images, self.backend.label, self.device)
            return {"image_mse": measure.image_errors(images, reference, self.count)}

        return {
            **record.section(f"{label}/images", {"count": self.count}, pairs),
            "scores": self._scores(record, f"{label}/scores", images),
        }

    def _eps(self, config: Config, folder: Path, record: Record, sampler: Sampler) -> Row:
        """The errors of the predicted noise, on fresh states."""
        full = self.full(config)

        def errors() -> Row:
            states = full.fresh_states(self.trajectories)
            quantized = self._quantized(config, folder)
            error = measure.eps_error_table(quantized.denoiser, states, quantized.pipeline)
            importance = step_importance(quantized, states)
            return {
                "eps_timesteps": states.timesteps,
                "eps_mse_of_steps": error.mean(1).tolist(),
                "eps_mse_of_trajectories": error.mean(0).tolist(),
                "eps_weighted_of_trajectories": measure.weighted_mean(error, importance),
            }

        of_states: Row = {"trajectories": self.trajectories, "weighted": "of mean 1"}
        if full.guided:  # earlier versions had the errors of both halves of a trajectory
            of_states |= {"halves": "averaged"}
        return record.section(f"{self._label(sampler)}/eps", of_states, errors)

    def _scores(self, record: Record, section: str, images: Path) -> Row | None:
        scorer = self.scorer
        if scorer is None:
            return None
        settings = scorer.settings(self.count)
        found = record.section(section, settings, lambda: scorer.score(images, self.count))
        return found | {"reference_sha256": scorer.sha256}  # which earlier versions left out

    def merge(self, rows: list[Row], earlier: Iterable[Row]) -> list[Row]:
        """`rows` and those earlier ones that still are what this command would measure."""

        def key_of(row: Row) -> tuple[Any, ...]:
            return (Cell.from_plain(row["cell"]).key, *row["sampler"].values(), row["noise"])

        merged = {key_of(row): row for row in rows}
        for row in earlier:
            row = {"noise": self.plan.noise} | row  # earlier versions had this one alone
            new = merged.get(key_of(row))
            if (row["count"], row["trajectories"]) != (self.count, self.trajectories):
                continue
            # A row of full precision, which has None, is the same with every backend.
            if row.get("backend", Backend().label) not in (None, self.backend.label):
                continue
            if len(row.get("eps_mse_of_trajectories") or ()) > self.most_trajectories:
                continue  # of an earlier version, with guidance: of both halves of each
            row = row | {"scores": self._comparable(row["scores"])}
            if new is not None:
                if new["scores"] is None and new["digest"] == row["digest"]:
                    new["scores"] = row["scores"]  # of a command with --fid
            elif self._is_current(row):
                merged[key_of(row)] = row
        return list(merged.values())

    def _comparable(self, scores: Row | None) -> Row | None:
        """None for scores against another reference than this command's."""
        if scores is None or self.scorer is None:
            return scores
        if "reference_sha256" not in scores:  # of an earlier version
            return scores if scores["reference"] == self.scorer.name else None
        return scores if scores["reference_sha256"] == self.scorer.sha256 else None

    def _is_current(self, row: Row) -> bool:
        """True if the row's cell has the same configuration and checkpoint today."""
        cell, sampler = Cell.from_plain(row["cell"]), Sampler(**row["sampler"])
        if not is_current(cell):
            return False
        try:
            if cell.method == "fp":
                config = self.plan.full_config(sampler, row["noise"])
                return row["digest"] == self.full(config).digest
            return row["digest"] == self.digest(cell)
        except ConfigError:
            return False
