"""Score generated images against reference images.

    python scripts/evaluate.py REF GEN --metrics fid,sfid,precision,recall --json metrics.json

REF and GEN are each a folder of images, a .npz of statistics (mu, sigma: pytorch-fid's) or a .npz
with images `x` or `arr_0` (N, H, W, 3) uint8. FID equals `python -m pytorch_fid REF GEN`.

    python scripts/evaluate.py REF --save-stats ref.npz    # keep the statistics of REF
    python scripts/evaluate.py REF GEN --paired FULL       # and PSNR of GEN against FULL, by name
    python scripts/evaluate.py --prepare-inception         # only store the Inception weights
    torchrun --nproc-per-node 8 scripts/evaluate.py REF GEN ...    # the same numbers, faster

Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import argparse
import sys

from tinydm.scripts.common.errors import MetricError
from tinydm.scripts.common.files import refuse_overwriting, write_json
from tinydm.scripts.common.reference import full_statistics
from tinydm.scripts.experiment.cli import (
    add_device,
    input_path,
    make_parser,
    output_file,
    spellings,
)
from tinydm.scripts.experiment.devices import resolve_device
from tinydm.scripts.experiment.processes import team_of_processes
from tinydm.scripts.metrics import METRICS, evaluate, paired_psnr
from tinydm.scripts.metrics.inception import FILE_NAME, prepare_inception


def report(result: dict) -> None:
    """Print the scores to stdout and the notes to stderr."""
    print("  ".join(f"{side} {n or 'unknown'}" for side, n in result["images"].items()), "images")
    for name in METRICS:
        if name in result:
            value = result[name]
            print(f"{name:10} {'null' if value is None else f'{value:.6f}'}")
    if paired := result.get("paired"):
        for name in ("psnr", "psnr_min", "psnr_median"):
            value = paired[name]
            print(f"{name:11} {'inf' if value is None else f'{value:.4f}'} dB")
        print(f"{paired['images']} pairs, {paired['unpaired']} files without partner")
    for note in result["notes"]:
        print(f"warning: {note}", file=sys.stderr)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "ref", type=input_path, nargs="?", metavar="REF", help="reference: folder or .npz"
    )
    parser.add_argument(
        "gen", type=input_path, nargs="?", metavar="GEN", help="generated: folder or .npz"
    )
    parser.add_argument("--metrics", default="fid", help=f"some of {','.join(METRICS)}, or none")
    parser.add_argument(
        "--paired", type=input_path, metavar="DIR", help="PSNR of GEN against DIR, by file name"
    )
    parser.add_argument(
        "--inception", type=input_path, metavar="FILE", help=f"weights ({FILE_NAME})"
    )
    parser.add_argument(
        "--json", type=output_file(".json"), metavar="FILE", help="write the result here"
    )
    parser.add_argument(
        "--save-stats",
        type=output_file(".npz"),
        metavar="FILE.npz",
        help="keep the statistics of REF",
    )
    parser.add_argument(
        *spellings("--batch_size"),
        type=int,
        default=50,
        metavar="N",
        help="images that go through Inception at once (50)",
    )
    add_device(parser)
    parser.add_argument(
        "--preprocess",
        choices=("pytorch-fid", "tf"),
        default="pytorch-fid",
        help="resize of pytorch-fid, or of TensorFlow as in the ADM evaluator",
    )
    parser.add_argument(
        "--prepare-inception", action="store_true", help="store the Inception weights and stop"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.prepare_inception:
        file = prepare_inception()
        print(f"{file}\nTORCH_HOME={file.parents[2]} python -m pytorch_fid REF GEN")
        return
    if args.ref is None or (args.gen is None and args.save_stats is None):
        raise MetricError("REF and GEN are needed (or REF and --save-stats); see --help")
    if args.gen is None and args.paired is not None:
        raise MetricError("--paired needs GEN")
    for option, path in (("--json", args.json), ("--save-stats", args.save_stats)):
        if path is not None:
            refuse_overwriting(option, path, args.ref, args.gen, args.inception)
    resolve_device(args.device)  # so that a mistake is told without metrics too
    names = [] if args.metrics == "none" else [m.strip() for m in args.metrics.split(",")]
    with team_of_processes() as team:
        first = team.rank == 0
        paired = paired_psnr(args.gen, args.paired) if first and args.paired else None
        result = evaluate(
            full_statistics(args.ref),
            args.gen,
            names,
            inception=args.inception,
            batch_size=args.batch_size,
            device=args.device,
            preprocess=args.preprocess,
            save_stats=args.save_stats,
            team=team,
        )
    if result is None:
        return
    result |= {"paired": paired} if paired else {}
    report(result)
    if args.json is not None:
        write_json(args.json, result)


if __name__ == "__main__":
    run(main, again="the same command begins anew", less="--batch-size 8")
