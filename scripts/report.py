"""One page about each run: images, errors, ranges, groups, layers, size, speed, configuration.

    python scripts/report.py runs/emoji32-w4a8
    python scripts/report.py runs/a runs/b --trajectories 16 --states 32
    python scripts/report.py runs/emoji32-w4a8 --figures docs

RUN is a folder of calibrate.py, with the images of sample_diffusion.py in it if there are some.
RUN/report.html is one file with everything in it; what the run lacks it says. eps errors, ranges
and the layers' sensitivity are measured on fresh trajectories (a minute on emoji32) and kept in
RUN/report-measurements.json. --trajectories 0 --states 0 runs no network. --figures DIR writes the
map of the groups as a PNG too.

Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import argparse
from functools import partial
from pathlib import Path

# isort: split
import numpy as np
import torch

from tinydm.scripts.common.errors import RunError
from tinydm.scripts.common.files import write_text
from tinydm.scripts.experiment.cli import add_device, input_path, make_parser, output_folder
from tinydm.scripts.experiment.devices import resolve_device
from tinydm.scripts.reporting import image_sections, sections
from tinydm.scripts.reporting.contents import read_quantizers
from tinydm.scripts.reporting.figures import group_map, map_size, write_png
from tinydm.scripts.reporting.measurements import measure
from tinydm.scripts.reporting.page import document
from tinydm.scripts.reporting.run_folder import Run, read_run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "runs", type=input_path, nargs="+", metavar="RUN", help="run folder of calibrate.py"
    )
    parser.add_argument(
        "--full", type=input_path, metavar="DIR", help="full-precision images, in RUN or elsewhere"
    )
    parser.add_argument(
        "--quantized", type=input_path, metavar="DIR", help="quantized images, likewise"
    )
    parser.add_argument(
        "--trajectories", type=int, default=4, metavar="N", help="for eps errors and ranges (4)"
    )
    parser.add_argument(
        "--states", type=int, default=4, metavar="N", help="for the layers' sensitivity (4)"
    )
    parser.add_argument(
        "--figures", type=output_folder, metavar="DIR", help="also write NAME-groups.png there"
    )
    add_device(parser)
    args = parser.parse_args(argv)
    for name in ("trajectories", "states"):
        if not 0 <= getattr(args, name) <= 10_000:
            parser.error(f"--{name} {getattr(args, name)}: must be within 0..10000")
    return args


def page_of(found: Run, device: torch.device, trajectories: int, states: int) -> str:
    """The report of a run as one HTML page."""
    eps, ranges, layers = measure(found, device, trajectories, states)
    quantizers = None if found.metadata is None else read_quantizers(found.file)
    names = found.common_images()
    errors = image_sections.errors_of(found, names) if names else np.array([])
    return document(
        found.title,
        found.notes,
        [
            sections.summary_section(found),
            image_sections.images_section(found, names, errors),
            image_sections.psnr_section(names, errors),
            sections.eps_section(eps),
            sections.groups_section(quantizers),
            sections.ranges_section(quantizers, ranges),
            sections.timesteps_section(found),
            sections.layers_section(found, layers),
            sections.size_section(found),
            sections.speed_section(found),
            sections.config_section(found),
            sections.versions_section(found),
        ],
    )


def write_figures(found: Run, folder: Path) -> None:
    if found.metadata is None:
        raise RunError(f"{found.file}: no such file, so --figures has nothing to draw")
    quantizers = read_quantizers(found.file)
    path = folder / f"{found.folder.resolve().name}-groups.png"
    write_png(path, partial(group_map, quantizers=quantizers), map_size(quantizers))
    print(path)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = resolve_device(args.device)
    runs = [read_run(folder, args.full, args.quantized) for folder in args.runs]
    for found in runs:
        page = page_of(found, device, args.trajectories, args.states)
        path = found.folder / "report.html"
        write_text(path, page)
        print(path, flush=True)
        if args.figures is not None:
            write_figures(found, Path(args.figures))


if __name__ == "__main__":
    run(main, again="the same command begins anew", less=None)
