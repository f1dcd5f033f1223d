"""Commands as typed, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


CONFIG = """\
name: narrow
model:
  arch: ddim_unet
  checkpoint: narrow.pt
  params: {ch: 8, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [8],
           image_size: 16, norm_groups: 4}
sampler: {name: ddim, steps: 6, skip: quad, clip_denoised: true}
sampling: {count: 3, batch_size: 3, micro_batch: 4}
"""


QUICK = (
    "calibration.samples=48",
    "calibration.trajectories=8",
    "calibration.batch_size=8",
    "quant.search.rounds=4",
    "quant.search.batch_size=8",
    "quant.reconstruct.iterations=12",
    "quant.reconstruct.batch_size=8",
)


def command(script: str, home: Path, *arguments: str) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return {
        "args": [sys.executable, str(ROOT / script), *arguments],
        "cwd": home,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def done(made: dict) -> subprocess.CompletedProcess:
    result = subprocess.run(**made, timeout=600)
    assert result.returncode == 0, result.stderr
    return result
