"""int8 on CUDA as far as a CPU shows it: the cases of triton_cases.py and
triton_denoisers.py, and where the backend is refused.

python -m pytest tests/test_triton.py
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.helpers.commands import ROOT
from tests.helpers.integer_layers import small_unet
from tinydm.quant.backends import selection
from tinydm.quant.backends.selection import Int8Error, int8_supported, to_int8
from tinydm.scripts.common.errors import ConfigError
from tinydm.scripts.experiment import assembly
from tinydm.scripts.experiment.backend import simulated_note


def version(name: str) -> tuple[int, ...]:
    parts = importlib.metadata.version(name).split(".")[:2]
    return tuple(int(part) for part in parts)


def interpreter_obstacle() -> str | None:
    """Why Triton's interpreter cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "this PyTorch came without Triton"
    if version("triton") < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        found = importlib.metadata.version("triton")
        return f"the interpreter of Triton {found} needs NumPy below 2.4, not {np.__version__}"
    return None


def test_what_the_interpreter_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 fails with NumPy 2.4 and runs with 2.2; 3.7 and 3.8 run with both."""
    pytest.importorskip("triton", reason="this PyTorch came without Triton")
    for triton, numpy, runs in (("3.6.0", "2.4.6", False), ("3.6.0", "2.2.6", True)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=triton: found)
        monkeypatch.setattr(np, "__version__", numpy)
        assert (interpreter_obstacle() is None) == runs
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.7.0")
    assert interpreter_obstacle() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "without Triton" in (interpreter_obstacle() or "")


def run_cases(interpret: str) -> None:
    """Both files in a process of their own."""
    files = ["tests/triton_cases.py", "tests/triton_denoisers.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    reason = interpreter_obstacle()
    if reason is not None:
        pytest.skip(reason)
    run_cases("1")


@pytest.mark.gpu
@pytest.mark.slow
def test_kernels_on_a_card() -> None:
    reason = int8_supported("cuda")
    if reason is not None:
        pytest.skip(reason)
    run_cases("0")


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """There is a card of this compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_no_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert int8_supported("cuda") == "this PyTorch sees no CUDA device"


def test_an_old_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 5))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "7.5" in (int8_supported("cuda") or "")
    with pytest.raises(Int8Error, match=r"8\.0"):
        to_int8(small_unet(weight=4, activation=8), device="cuda")
    with pytest.raises(ConfigError, match="--backend int8: this card .*; use --backend fake"):
        assembly.select_backend(small_unet(weight=4, activation=8), "int8", "cuda")


def test_a_pytorch_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "without Triton" in (int8_supported("cuda:1") or "")


def test_other_devices_are_refused() -> None:
    assert "mps" in (int8_supported("mps") or "")


def test_a_recent_card_gets_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="this PyTorch came without Triton")
    pretend(monkeypatch, selection.OLDEST_CARD)
    assert int8_supported("cuda:1") is None
    model = assembly.select_backend(small_unet(weight=4, activation=8), "int8", "cuda")
    assert type(model).__name__ == "TritonDenoiser" and simulated_note(model) is None
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"TritonLayer", "TritonMatMul", "TimestepLayer"} <= kinds
    model.simulated["conv"] = "its reason"
    assert "conv: its reason" in (simulated_note(model) or "")
    assert simulated_note(torch.nn.Identity()) is None
