"""Measure methods, bit widths and numbers of steps on one configuration, or tinyDM part by part.

    python scripts/benchmark.py --config configs/emoji32.yaml \\
        --methods fp,qdiffusion,ptqd,e2e,tinydm --bits w8a8,w4a8 --steps 50 \\
        --seeds 0,1,2 --noise-seeds 11,12 --out runs/bench
    python scripts/benchmark.py --config configs/emoji32.yaml --bits w4a8 --seeds 0,1,2 \\
        --ablate grouping,assignment --out runs/bench
    python scripts/benchmark.py --config configs/emoji32.yaml --bits w4a8,w4a4 --seeds 100,101 \\
        --set sampling.seed=100 --tune qdiffusion,e2e_plain,tinydm --out runs/tuning
    python scripts/benchmark.py --config configs/emoji32.yaml --bits w4a8,w4a4 \\
        --curve qdiffusion,e2e,tinydm --out runs/budget
    python scripts/benchmark.py --config configs/emoji32.yaml --count 1000 --fid \\
        --reference models/pretrained/emoji32_statistics.npz --out runs/bench
    python scripts/benchmark.py --speed --out runs/speed        # seconds and memory; --speed --help

Each cell is calibrated and sampled by the functions of calibrate.py and sample_diffusion.py, and
compared with the full-precision images of the same noise. --transfer 20,250,ddpm samples each
calibrated model with other samplers too (ddpm:250 names both). --seeds are those of calibration;
the images' noise is that of sampling.seed, or of each of --noise-seeds, which cost sampling alone.
A --set applies to every method, and so does what the configuration writes: a baseline is its preset
only as far as neither changes it. --backend int8 --compile measures the integer kernels, which
takes less time.

--tune tries the same few learning rates for each method and marks those with the least weighted eps
error over all bits; its seeds are 100 to 999, which tables should not use. --curve gives methods
more iterations of a block, or more end-to-end steps.

OUT receives results.json, results.md (with tinyDM's lead over each other method, image by image),
ablation.md, tuning.md, budget.md and plots/. The same command continues a killed run; a finished
one only writes them again. Other methods, bits, steps, seeds and parts join those that are there. A
cell does not notice that the program changed: results.json has `code`.

Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

from tinydm.scripts.start import run  # first: it watches over the imports below

import sys


def main(argv: list[str] | None = None) -> None:
    # Imported when needed: a process whose memory --speed measures imports this file as well.
    argv = sys.argv[1:] if argv is None else argv
    if "--speed" in argv:
        from tinydm.scripts.bench import speed

        return speed.main([word for word in argv if word != "--speed"])
    from tinydm.scripts.bench import methods

    methods.main(argv, __doc__)


if __name__ == "__main__":
    run(main)
