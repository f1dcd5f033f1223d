"""Score images against images: `evaluate` (FID, sFID, IS, precision, recall) and `paired_psnr`.

`inputs` reads folders and npz files, `inception` gives features, `scores` turns them into numbers.
A side is "reference" or "generated".
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ...models.checkpoint import sha256_of
from ..common.errors import MetricError
from ..common.schema import printable
from ..experiment.processes import ALONE, Team, Tensors
from . import inception as net
from . import scores
from .inputs import Source, Statistics, list_images, open_source, read_image, save_statistics

METRICS = ("fid", "sfid", "is", "precision", "recall")
LEAST = {"fid": 2, "sfid": 2, "is": 1, "precision": 4, "recall": 4}  # images that each needs
FEW_IMAGES = 10_000  # with fewer images FID is so biased and noisy that it must be said


class Pass:
    """One pass over the images of one side; gathers only what `wanted` names.

    wanted: "pool" and "spatial" moments, pool "features" of every image, inception "score".
    """

    def __init__(self, wanted: Collection[str]):
        self.pool = scores.Moments(net.POOL_DIM) if "pool" in wanted else None
        self.spatial = scores.Moments(net.SPATIAL_DIM) if "spatial" in wanted else None
        self.score = scores.InceptionScore() if "score" in wanted else None
        self.features: list[torch.Tensor] | None = [] if "features" in wanted else None
        self.images, self.seconds = 0, 0.0

    def run(
        self,
        source: Source,
        network: net.InceptionFeatures,
        batch_size: int,
        bar: tqdm,
        team: Team = ALONE,
    ) -> None:
        """Stream the images of `source` through the network; rank 0 of the team gathers."""
        start = time.perf_counter()
        share = source.images.batches(batch_size, team.rank, team.world)  # uint8 (B, 3, H, W)

        def features_of(_: int) -> Tensors:
            features = network(next(share))
            return {"pool": features.pool.cpu(), "spatial": features.spatial.cpu()}

        for features in team.in_turn(-(-len(source.images) // batch_size), features_of):
            pool = features["pool"]
            if self.pool:
                self.pool.update(pool)
            if self.spatial:
                self.spatial.update(features["spatial"])
            if self.score:
                self.score.update(network.logits(pool))
            if self.features is not None:
                self.features.append(pool)
            self.images += len(pool)
            bar.update(len(pool))
        for _ in share:
            pass  # reads to the end of an archive, where its checksum is compared
        self.seconds = time.perf_counter() - start

    def statistics(self, preprocess: str) -> Statistics:
        """The gathered moments as statistics."""
        pool, spatial = self.pool, self.spatial
        return Statistics(
            mu=pool.mean if pool else None,
            sigma=pool.covariance if pool else None,
            mu_s=spatial.mean if spatial else None,
            sigma_s=spatial.covariance if spatial else None,
            n=self.images,
            preprocess=preprocess,
            precision=net.PRECISION,
        )


def evaluate(
    reference: str | Path,
    generated: str | Path | None,
    metrics: Sequence[str] = ("fid",),
    *,
    inception: net.InceptionFeatures | str | Path | None = None,
    batch_size: int = 50,
    device: str = "auto",
    preprocess: str = "pytorch-fid",
    save_stats: str | Path | None = None,
    progress: bool = True,
    team: Team = ALONE,
) -> dict | None:
    """Score `generated` against `reference`; the result can be written as JSON.

    Keys: one per metric (None: cannot be computed, a note says why), `images` of both sides (None:
    the statistics do not say), `notes`, and how the numbers were made. `inception` is a weights
    file, or a network to use again, whose device and preprocessing then count. `save_stats` keeps
    the statistics of the reference; `generated` may then be None. The images are spread over the
    team; the numbers are those of one process, rank 0 has them and the others None.
    """
    if isinstance(inception, net.InceptionFeatures):
        preprocess = inception.preprocess
    sides = {"reference": open_source(reference)}
    if generated is not None:
        sides["generated"] = open_source(generated)
    metrics = tuple(metrics) if generated is not None else ()
    check(sides, metrics, batch_size, preprocess, save_stats)

    wanted = {side: wants(source, side, metrics, save_stats) for side, source in sides.items()}
    network = inception if isinstance(inception, net.InceptionFeatures) else None
    if network is None and any(wanted.values()):
        network = net.InceptionFeatures(inception, device, preprocess)
    if network and not network.has_classifier:
        wanted = {side: names - {"score"} for side, names in wanted.items()}

    passes, statistics = {}, {}
    for side, source in sides.items():
        passes[side] = Pass(wanted[side])
        if wanted[side]:
            quiet = not progress or team.rank != 0
            with tqdm(total=len(source.images), desc=side, unit="img", disable=quiet) as bar:
                passes[side].run(source, network, batch_size, bar, team)
        if team.rank != 0:
            continue
        statistics[side] = source.statistics or passes[side].statistics(preprocess)
        if side == "reference" and save_stats is not None:
            save_statistics(save_stats, statistics[side])

    if team.rank != 0:
        return None
    result = compare(metrics, passes, statistics)
    counts = {side: count(source) for side, source in sides.items()}
    total, seconds = (sum(getattr(p, k) for p in passes.values()) for k in ("images", "seconds"))
    return result | {
        "images": counts,
        **{side: str(source.path) for side, source in sides.items()},
        "preprocess": preprocess,
        "inception": describe(network),
        "seconds": round(seconds, 3),
        "images_per_second": round(total / seconds, 3) if seconds else None,
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "numpy", "pytorch-fid")},
        "notes": notes(sides, metrics, counts, network, preprocess),
    }


def check(
    sides: dict[str, Source],
    metrics: Sequence[str],
    batch_size: int,
    preprocess: str,
    save_stats: str | Path | None,
) -> None:
    """Refuse, before any work, what cannot succeed."""
    for name in metrics:
        if name not in METRICS:
            raise MetricError(f"--metrics {name}: expected some of {','.join(METRICS)}")
    if batch_size < 1:
        raise MetricError(f"--batch-size {batch_size}: must be at least 1")
    if save_stats is not None and sides["reference"].statistics:
        raise MetricError(f"{sides['reference'].path}: is statistics already; no --save-stats")
    if save_stats is not None and any(
        os.path.realpath(save_stats) == os.path.realpath(source.path) for source in sides.values()
    ):
        raise MetricError(f"--save-stats {save_stats}: would overwrite what is scored")
    if save_stats is not None and Path(save_stats).suffix != ".npz":
        raise MetricError(f"--save-stats {save_stats}: the name must end in .npz")
    for side, source in sides.items():
        check_side(side, source, metrics, preprocess)


def check_side(side: str, source: Source, metrics: Sequence[str], preprocess: str) -> None:
    """Refuse a side that cannot give what the metrics need."""
    stored, path = source.statistics, source.path
    needs = {"precision", "recall"} | ({"is"} if side == "generated" else set())
    for name in metrics:
        if name in needs and source.images is None:
            raise MetricError(f"{path}: holds statistics only, but {name} needs the images")
        least = 1 if stored and name in ("fid", "sfid") else LEAST[name]
        if source.images is not None and len(source.images) < least:
            found = f"{len(source.images)} images"
            raise MetricError(f"{path}: {found}, but {name} needs at least {least}")
    if stored is None:
        return
    if "sfid" in metrics and stored.mu_s is None:
        raise MetricError(f"{path}: no mu_s and sigma_s for sfid; make it with --save-stats")
    for name, mean, dim in (
        ("mu", stored.mu, net.POOL_DIM),
        ("mu_s", stored.mu_s, net.SPATIAL_DIM),
    ):
        if mean is not None and len(mean) != dim:
            raise MetricError(f"{path}: {name} has {len(mean)} features instead of {dim}")
    if stored.preprocess not in (None, preprocess):
        raise MetricError(f"{path}: made with --preprocess {stored.preprocess}, not {preprocess}")
    if stored.precision not in (None, net.PRECISION):
        what = printable(stored.precision)
        raise MetricError(f"{path}: features in {what} instead of {net.PRECISION}; make it again")


def wants(
    source: Source, side: str, metrics: Sequence[str], save_stats: str | Path | None
) -> set[str]:
    """What a pass over the images of one side must gather; empty if no pass is needed."""
    saving = side == "reference" and save_stats is not None
    wanted = set()
    if saving or ("fid" in metrics and source.statistics is None):
        wanted.add("pool")
    if saving or ("sfid" in metrics and source.statistics is None):
        wanted.add("spatial")
    if "precision" in metrics or "recall" in metrics:
        wanted.add("features")
    if "is" in metrics and side == "generated":
        wanted.add("score")
    return wanted


def compare(
    metrics: Sequence[str], passes: dict[str, Pass], statistics: dict[str, Statistics]
) -> dict:
    """The metrics, in the order asked for."""
    result: dict[str, float | None] = dict.fromkeys(metrics)
    ref, gen = statistics["reference"], statistics.get("generated")
    if "fid" in metrics:
        result["fid"] = scores.frechet_distance(ref.mu, ref.sigma, gen.mu, gen.sigma)
    if "sfid" in metrics:
        result["sfid"] = scores.frechet_distance(ref.mu_s, ref.sigma_s, gen.mu_s, gen.sigma_s)
    if "is" in metrics and passes["generated"].score:
        result["is"] = passes["generated"].score.value
    if "precision" in metrics or "recall" in metrics:
        pair = scores.precision_recall(
            *(torch.cat(passes[side].features) for side in ("reference", "generated"))
        )
        result |= {k: v for k, v in zip(("precision", "recall"), pair, strict=True) if k in metrics}
    return result


def count(source: Source) -> int | None:
    """Images behind the statistics of a side."""
    return source.statistics.n if source.statistics else len(source.images)


def describe(network: net.InceptionFeatures | None) -> dict | None:
    """Which weights made the features."""
    if network is None:
        return None
    file = network.file
    return {
        "file": file.name,
        "sha256": sha256_of(file),
        "classifier": network.has_classifier,
        "precision": net.PRECISION,
    }


def notes(
    sides: dict[str, Source],
    metrics: Sequence[str],
    counts: dict[str, int | None],
    network: net.InceptionFeatures | None,
    preprocess: str,
) -> list[str]:
    """Remarks that a reader of the scores needs, one line each."""
    found = []
    for side, n in counts.items():
        if n is not None and n < FEW_IMAGES and {"fid", "sfid"} & set(metrics):
            found.append(f"{side}: {n} images; below {FEW_IMAGES} FID is biased upwards and noisy")
    for side, source in sides.items():
        stored = source.statistics
        if source.images is not None:
            found += [f"{side}: {note}" for note in source.images.notes]
        if stored and source.images and {"precision", "recall"} & set(metrics):
            found.append(f"{side}: precision and recall use the {len(source.images)} stored images")
        foreign = stored and stored.mu_s is not None and stored.preprocess is None
        if foreign and preprocess != "tf":
            found.append(f"{side}: looks like an ADM reference batch; compare with --preprocess tf")
    if "is" in metrics and not network.has_classifier:
        found.append(f"is: {net.NO_CLASSIFIER}")
    elif "is" in metrics and len(sides["generated"].images) % 5000:
        found.append("is: splits of 5000 images, of which the last is shorter")
    return found


def paired_psnr(folder_a: str | Path, folder_b: str | Path) -> dict:
    """PSNR in dB of the images that both folders hold under the same file name.

    `psnr` pools the squared error over all images; `psnr_min` and `psnr_median` are over images.
    None stands for infinity (no difference at all).
    """
    ours, theirs = (
        {f.relative_to(folder).as_posix(): f for f in list_images(folder)}
        for folder in (folder_a, folder_b)
    )
    names = sorted(ours.keys() & theirs.keys())
    if not names:
        raise MetricError(f"{folder_a} and {folder_b}: no file name in common")
    errors, pixels = [], []
    for name in names:
        a, b = (read_image(files[name]) for files in (ours, theirs))
        if a.shape != b.shape:
            raise MetricError(f"{ours[name]}: its size differs from that of {theirs[name]}")
        errors.append(scores.squared_error(a, b))
        pixels.append(a.size)
    mse = float(np.average(errors, weights=pixels))
    each = scores.psnr(np.array(errors))
    values = {"psnr": scores.psnr(mse), "psnr_min": each.min(), "psnr_median": np.median(each)}
    return {k: float(v) if np.isfinite(v) else None for k, v in values.items()} | {
        "mse": mse,
        "images": len(names),
        "identical": errors.count(0.0),
        "unpaired": len(ours.keys() ^ theirs.keys()),
    }
