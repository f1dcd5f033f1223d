"""A sampling run: a folder of images, continued where an earlier run left it."""

import dataclasses
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...models.pipeline import DIFFUSERS
from ...models.protocols import rows_are_independent
from ...quant.calibration.parking import is_large
from ..common.errors import ConfigError, ImageError, RunError
from ..common.files import append_lines, write_json, write_text
from ..common.images import grid, is_whole_png, to_uint8, write_png
from ..common.memory import return_freed_memory
from ..common.progress import ImageBar
from ..common.writers import Writers
from .assembly import Assembly, no_picture
from .config import Config, resolved_yaml
from .counted import Counted
from .devices import device_name, forget_peak, peak_memory
from .precision import PRECISIONS
from .runs import EARLIER, beside, missing_images, png_name, surplus_images

AGAIN = "the same command makes what is missing"
GRID_IMAGES, GRID_COLUMNS = 64, 8
WRITERS = 4  # threads that encode images beside a device that is not the CPU itself


@dataclass(frozen=True)
class SamplingRun:
    """Everything that a sampling run is made of: model, output folder, device, processes.

    backend: None for full precision; precision: of what is not quantized.
    """

    config: Config
    assembly: Assembly
    folder: Path
    device: torch.device
    backend: str | None = None
    precision: str = PRECISIONS[0]
    rank: int = 0
    world: int = 1

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that an image depends on besides its number."""
        return identity_of(self.config, self.assembly, self.backend, self.device, self.precision)

    def missing(self) -> list[int]:
        """Numbers of the images that are not there yet, of all ranks."""
        return missing_images(self.folder, self.config.sampling.count)

    def share(self, missing: list[int]) -> list[int]:
        """This rank's: by number, not by place in the list, since the ranks list while others
        already write."""
        return [index for index in missing if index % self.world == self.rank]


def identity_of(
    config: Config,
    assembly: Assembly,
    backend: str | None,
    device: torch.device,
    precision: str = PRECISIONS[0],
) -> dict[str, Any]:
    """Everything that an image depends on besides its number. EARLIER values are left out, so that
    folders of before can be continued."""
    model, sampling = dataclasses.asdict(config.model), config.sampling
    for place in (model, model["first_stage"] or {}):  # names of files say nothing
        for name in ("checkpoint", "url", "digest"):
            place.pop(name, None)
    decodes = config.model.first_stage is not None or config.model.arch == DIFFUSERS
    decoded = sampling.decode_batch if decodes else 1
    newer = {"precision": precision, "decode_batch": decoded}
    return {k: v for k, v in newer.items() if v != EARLIER[k]} | {
        "model": model | {"scale_factor": assembly.pipeline.scale_factor},
        "files_sha256": assembly.sources,
        "schedule": vars(config.schedule),
        "sampler": vars(config.sampler),
        "seed": sampling.seed,
        "classes": None if sampling.classes is None else list(sampling.classes),
        "micro_batch": sampling.micro_batch,
        "backend": backend,
        "device": device_name(device),
    }


def check_channels(run: SamplingRun) -> None:
    """Raises ConfigError where what is sampled is no picture."""
    if (why := no_picture(run.assembly)) is not None:
        raise ConfigError(f"{run.config.name}: {why}; set model.first_stage, which decodes latents")


def make_images(run: SamplingRun, indices: list[int]) -> None:
    """Sample `indices` in batches; threads write the images of one while the next is made."""
    config, assembly, sampling = run.config, run.assembly, run.config.sampling
    large = is_large(assembly.denoiser)
    calls = assembly.pipeline.calls_per_image
    threads = 1 if run.device.type == "cpu" else WRITERS
    with (
        ImageBar(len(indices), calls, disable=run.rank != 0 or not indices) as bar,
        Writers(threads, most=2 * sampling.batch_size) as writers,
    ):

        def after_call(rows: int) -> None:
            bar.update(rows)
            if large:  # what calls leave between what they keep would add up: 10 GB in ten calls
                return_freed_memory()

        for start in range(0, len(indices), sampling.batch_size):
            batch = indices[start : start + sampling.batch_size]
            denoiser = Counted(assembly.denoiser, after_call)
            x = assembly.pipeline.sample(
                denoiser, batch, sampling.seed, sampling.classes, device=run.device
            )
            images = pixels_of(config, x)
            check_folder(run.folder)
            for index, image in zip(batch, images, strict=True):
                writers.put(write_image, run.folder, index, image)


def pixels_of(config: Config, x: torch.Tensor) -> np.ndarray:
    """What the files hold of images x (B, C, H, W) in [-1, 1]: (B, H, W, C) uint8."""
    truncate = config.model.arch not in ("ddim_unet", DIFFUSERS)  # as each family's own scripts do
    return to_uint8(x, truncate).numpy()


def check_folder(folder: Path) -> None:
    """Raises RunError where the folder is gone."""
    if not folder.is_dir():
        raise RunError(f"{folder}: was removed while images were made; {AGAIN}")


def write_image(folder: Path, index: int, image: np.ndarray) -> None:
    """Raises RunError where the folder is gone. It is not made again, without its identity."""
    try:
        write_png(folder / png_name(index), image)
    except FileNotFoundError:
        check_folder(folder)
        raise


def check_there(run: SamplingRun, indices: list[int]) -> None:
    """Raises RunError where images that were there, or were made, are not there now.

    An identity that is gone is written again: the images that are there have it.
    """
    note = beside(run.folder, "identity.json")
    if not note.exists():
        write_json(note, run.identity)
    there = {path.name for path in run.folder.glob("*.png")}
    gone = [index for index in indices if png_name(index) not in there]
    if gone:
        first = png_name(gone[0])
        raise RunError(f"{run.folder}: {len(gone)} images are gone, such as {first}; {AGAIN}")


def write_grid(folder: Path, count: int, file: str) -> None:
    """The first images that are there, in one picture."""
    paths = [folder / png_name(index) for index in range(min(count, GRID_IMAGES))]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths if is_whole_png(path)]
    if len({image.shape for image in images}) > 1:
        raise ImageError(f"{folder}: its images are not all of one size; remove those of others")
    if images:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_png(file, grid(np.stack(images), GRID_COLUMNS))


def fill(run: SamplingRun, loaded: float, notes: list[str], grid_file: str | None) -> None:
    """Makes the images of rank 0 and writes the log and the report.

    loaded: seconds that loading took; notes: lines that the log begins with.
    """
    config, folder, sampling = run.config, run.folder, run.config.sampling
    log: list[str] = []

    def say(line: str) -> None:
        log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
        print(line, flush=True)

    for note in notes:
        say(note)
    missing = run.missing()
    todo, found = run.share(missing), sampling.count - len(missing)
    write_text(beside(folder, "config.yaml"), resolved_yaml(config))
    if found:
        say(f"{folder}: {found} of {sampling.count} images are there already")
    padded = not rows_are_independent(run.assembly.denoiser)
    if padded and 0 < min(len(todo), sampling.batch_size) < sampling.micro_batch:
        rows = sampling.micro_batch
        say(
            f"note: each network call is padded to {rows} rows; fewer images take as long, unless "
            "--set sampling.micro_batch=N, which changes the last bits"
        )
    forget_peak(run.device)
    began = time.perf_counter()
    make_images(run, todo)
    seconds = time.perf_counter() - began
    of_others = set(missing).difference(todo)
    check_there(run, [i for i in range(sampling.count) if i not in of_others])
    if grid_file is not None:
        write_grid(folder, sampling.count, grid_file)
    if surplus := surplus_images(folder, sampling.count):
        more = f"{len(surplus)} more image files ({surplus[0]}{', ...' if surplus[1:] else ''})"
        say(f"note: {folder} holds {more}, which a score would count")
    rate = f", {len(todo) / seconds:.3g} images/s" if todo else ""
    by = f" by the first of {run.world} processes" if run.world > 1 else ""
    say(f"{folder}: {len(todo)} images made{by} in {seconds:.1f} s{rate}")
    append_lines(beside(folder, "log.txt"), log)
    note_file = beside(folder, "report.json")
    if todo or not note_file.exists():  # killed between the last image and its report
        report = report_of(run)
        report["images"] = {"count": sampling.count, "made": len(todo), "found": found}
        report["seconds"] = {"load": loaded, "sample": seconds}
        report["images_per_second"] = len(todo) / seconds if todo else None
        write_json(note_file, report)


def report_of(run: SamplingRun) -> dict[str, Any]:
    """A description of the run as plain values; seconds and images are those of this process."""
    config, device = run.config, run.device
    return {
        "name": config.name,
        "backend": run.backend or "full precision",
        "seed": config.sampling.seed,
        "calls_per_image": run.assembly.pipeline.calls_per_image,
        "files_sha256": run.assembly.sources,
        "files_bytes": run.assembly.bytes,
        "batch_size": config.sampling.batch_size,
        "micro_batch": config.sampling.micro_batch,
        "device": device_name(device),
        "precision": run.precision,
        "peak_device_bytes": peak_memory(device),
        "threads": torch.get_num_threads(),
        "processes": run.world,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
