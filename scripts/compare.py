"""Full precision beside quantized: one picture and one table.

    python scripts/compare.py --run runs/emoji32-w4a8 --full images-fp --quantized images-w4a8 \
        --reference models/pretrained/emoji32_statistics.npz

Reads the two image folders of a run and what calibrate.py and sample_diffusion.py reported, writes
RUN/compare.png (full precision left, quantized right, the same noise), RUN/table.md and
RUN/comparison.json, and prints the table. FID is to the reference's statistics; below 10,000 images
it is biased upward and says little by itself.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

from pathlib import Path
from typing import Any

# isort: split
import numpy as np
from PIL import Image, ImageDraw

from tinydm.scripts.common.errors import ImageError, RunError
from tinydm.scripts.common.files import write_json, write_text
from tinydm.scripts.common.images import grid, picture_size, read_rgb, write_png
from tinydm.scripts.common.json_files import read_json
from tinydm.scripts.common.markdown import format_table
from tinydm.scripts.common.reference import full_statistics
from tinydm.scripts.common.reports import CalibrationReport, ImagesReport
from tinydm.scripts.common.units import duration
from tinydm.scripts.experiment.cli import input_path, make_parser
from tinydm.scripts.experiment.runs import beside
from tinydm.scripts.metrics import evaluate, paired_psnr
from tinydm.scripts.metrics.inception import InceptionFeatures, prepare_inception

SHOWN = 64  # images of each side in the picture, at most
COLUMNS = 8  # of each side
SIDE = 64  # pixels of an image in the picture, at least


def picture(full: Path, quantized: Path, columns: int) -> np.ndarray:
    """The first images of both folders, whole rows of them, (H, W, 3) uint8."""
    names = sorted(p.name for p in full.glob("*.png") if (quantized / p.name).exists())[:SHOWN]
    names = names[: len(names) // columns * columns] or names
    if not names:
        raise ImageError(f"{full} and {quantized}: no image of the same name in both")
    columns = min(columns, len(names))
    sides, size = [], picture_size(full / names[0])
    for folder, title in ((full, "full precision"), (quantized, "quantized")):
        images = np.stack([np.asarray(read_rgb(folder / n, size=size)) for n in names])
        side = Image.fromarray(grid(images, columns))
        zoom = max(1, SIDE // images.shape[2])
        side = side.resize((side.width * zoom, side.height * zoom), Image.Resampling.NEAREST)
        board = Image.new("RGB", (side.width, side.height + 20), "white")
        board.paste(side, (0, 20))
        ImageDraw.Draw(board).text((6, 4), title, fill="black")
        sides.append(np.asarray(board))
    gap = np.full((sides[0].shape[0], 16, 3), 255, np.uint8)
    return np.concatenate([sides[0], gap, sides[1]], axis=1)


def report_of(path: Path, kind: type, script: str) -> Any:
    """Raises RunError, also where there is none."""
    report = read_json(path, kind)
    if report is None:
        raise RunError(f"{path}: no such file; {script} writes it")
    return report


def _time(images: int, rate: float | None) -> str:
    """Empty where the report's process found every image made already."""
    return duration(images / rate) if rate else ""


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--run", type=input_path, required=True, metavar="DIR", help="run folder of calibrate.py"
    )
    parser.add_argument(
        "--full", type=input_path, required=True, metavar="NAME", help="folder in RUN"
    )
    parser.add_argument(
        "--quantized", type=input_path, required=True, metavar="NAME", help="folder in RUN"
    )
    parser.add_argument(
        "--reference", type=input_path, metavar="FILE", help="statistics of the training images"
    )
    parser.add_argument("--columns", type=int, default=COLUMNS, metavar="N", help="of each side")
    args = parser.parse_args(argv)
    if args.columns < 1:
        raise ImageError("--columns must be at least 1")
    folder = Path(args.run)
    full, quantized = folder / args.full, folder / args.quantized
    board = picture(full, quantized, args.columns)
    calibration = report_of(folder / "report.json", CalibrationReport, "calibrate.py")
    paths = [beside(f, "report.json") for f in (full, quantized)]
    reports = [report_of(path, ImagesReport, "sample_diffusion.py") for path in paths]
    write_png(folder / "compare.png", board)
    psnr = paired_psnr(quantized, full)
    if psnr["unpaired"]:
        raise RunError(
            f"{full}, {quantized}: {psnr['unpaired']} images are in one of them alone, and FID "
            "depends on how many there are; sample the same --count into both"
        )
    fid: list[Any] = ["", ""]
    if args.reference is not None:
        weights = prepare_inception()
        network = InceptionFeatures(weights)
        reference = full_statistics(args.reference)
        fid = [
            round(evaluate(reference, f, inception=network)["fid"], 2) for f in (full, quantized)
        ]
    size = f"{calibration['size_mb']:.2f}"
    value = "inf" if psnr["psnr"] is None else f"{psnr['psnr']:.2f}"
    bits = f"{calibration['weight_bits']}/{calibration['activation_bits']}"
    n = psnr["images"]
    columns = ["method", "W/A", "Size (MiB)", "PSNR to FP (dB)", f"FID ({n} images)"]
    columns += ["calibration", "sampling"]
    values = [
        ("full precision", "32/32", f"{calibration['float32_mb']:.2f}", "", fid[0], ""),
        (calibration["method"], bits, size, value, fid[1], duration(calibration["seconds"])),
    ]
    rows = [
        dict(zip(columns, (*v, _time(n, r["images_per_second"])), strict=True))
        for v, r in zip(values, reports, strict=True)
    ]
    table = format_table(rows, columns)
    write_text(folder / "table.md", table + "\n")
    write_json(folder / "comparison.json", {"rows": rows, "paired": psnr})
    print(f"\n{table}\n\n{folder / 'compare.png'}: full precision left, quantized right")


if __name__ == "__main__":
    run(main, again="the same command begins anew", less=None)
