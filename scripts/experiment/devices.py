"""The device that a command runs on."""

import os
import re

import torch

from ...quant.backends.tensor_cores import allow_tf32
from ..common.errors import ConfigError

__all__ = ["allow_tf32", "device_name", "forget_peak", "peak_memory", "resolve_device", "wait_for"]


def resolve_device(name: str) -> torch.device:
    """The device of a --device word: auto, cpu, cuda or cuda:1. Kernels are made repeatable.

    auto is CUDA where there is one. Of several processes (torchrun) each takes the GPU of its own
    local rank, unless the word names one. Raises ConfigError.
    """
    if name != "auto" and not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise ConfigError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    count = torch.cuda.device_count()
    _, _, number = name.partition(":")
    index = int(number) if number else int(os.environ.get("LOCAL_RANK", "0")) % count
    if index >= count:
        raise ConfigError(f"--device {name}: there are {count} CUDA devices, 0 to {count - 1}")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.set_device(index)  # what is made without a device is made there
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """ "cpu", or the model of the GPU. Images of another kind of device differ in the last bits."""
    return torch.cuda.get_device_name(device) if _is_there(device) else device.type


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if _is_there(device):
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """peak_memory counts from here on."""
    if _is_there(device):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes that tensors took on the device at most; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if _is_there(device) else None


def _is_there(device: torch.device) -> bool:
    """A GPU of this machine."""
    return device.type == "cuda" and torch.cuda.is_available()
