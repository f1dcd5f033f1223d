"""What the tests of the integer kernels for CUDA share (triton_cases.py, triton_denoisers.py)."""

from dataclasses import replace

import torch
from triton.runtime.interpreter import interpreter_builder

from tinydm.quant.backends.triton_launch import INTERPRETED
from tinydm.quant.backends.triton_layers import CurrentTimestep
from tinydm.quant.core.context import TimestepContext

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
LOOKS_FOR_OVERFLOWS = interpreter_builder.options
# Each +, - and * is done again in 64 bits, which takes almost as long as everything else: once, in
# test_largest_sums, is enough.
interpreter_builder.options = replace(LOOKS_FOR_OVERFLOWS, sanitize_overflow=False)


def at_timestep(current: CurrentTimestep, at: TimestepContext, t: int) -> int:
    """Sets both to t; the index of its calibrated timestep."""
    at.set(torch.tensor([t]))
    assert isinstance(at.index, int)
    current.index.fill_(at.index)
    return at.index


def nhwc(*shape: int, scale: float = 3.0) -> torch.Tensor:
    x = scale * torch.randn(shape)
    return x.contiguous(memory_format=torch.channels_last).to(DEVICE)
