"""Where and with what a measurement was made."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..common.paths import ROOT

PACKAGES = ("torch", "numpy", "scipy", "pytorch-fid", "pillow")


def environment() -> dict[str, Any]:
    """The machine and software that this command ran on; each row has the threads of its own
    calibration."""
    commit = None
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    except OSError:
        pass
    return {
        "commit": commit,
        "machine": platform.machine(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }


def processor() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else None
