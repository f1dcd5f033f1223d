"""Calls of a quantized denoiser while its own sampler runs: examples, and what they should give."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ...quant.runtime.quantizer import ActivationQuantizer
from ..experiment.assembly import Assembly
from ..experiment.config import Config
from .runtimes import Inputs

ROWS, STEPS, SEED = 2, 5, 1 << 61  # no seed of images that somebody samples
LOWEST = 45.0  # dB of another runtime, or MARGIN below what float rounding alone leaves
MARGIN = 3.0


class Call(NamedTuple):
    """x (B, C, H, W), t (1,), the denoiser's other tensors by name, and the output.

    again: the output of the same backend where only float rounding differs, None if not computed.
    """

    x: torch.Tensor
    t: torch.Tensor
    named: dict[str, torch.Tensor]
    output: torch.Tensor
    again: torch.Tensor | None = None

    def inputs(self) -> Inputs:
        values = {"x": self.x, "t": self.t} | self.named
        return {name: np.ascontiguousarray(value.numpy()) for name, value in values.items()}

    def of_rows(self, rows: Sequence[int]) -> "Call":
        """The same call of these samples, which may be there more than once."""
        named = {name: value[rows] for name, value in self.named.items()}
        again = None if self.again is None else self.again[rows]
        return self._replace(x=self.x[rows], named=named, output=self.output[rows], again=again)


def few_steps(config: Config) -> Config:
    """The configuration with few steps, of which each is a call."""
    sampler = dataclasses.replace(config.sampler, steps=min(STEPS, config.sampler.steps))
    sampling = dataclasses.replace(config.sampling, micro_batch=ROWS)
    return dataclasses.replace(config, sampler=sampler, sampling=sampling)


def of_images(config: Config, count: int) -> Config:
    """The configuration with calls of no more rows than `count` images have."""
    rows = min(config.sampling.micro_batch, count)
    sampling = dataclasses.replace(config.sampling, micro_batch=rows)
    return dataclasses.replace(config, sampling=sampling)


class _Enough(Exception):
    """Ends the sampling."""


@torch.no_grad()
def record_calls(assembly: Assembly, classes: Any, one: bool) -> list[Call]:
    """The calls of a short trajectory of ROWS images; one: only the first, which saves time.

    Of a guided step, which makes two calls with ROWS rows each, both are there.
    """
    model: nn.Module = assembly.denoiser
    calls: list[Call] = []

    def observed(x: torch.Tensor, t: torch.Tensor, **named: Any) -> torch.Tensor:
        output = model(x, t, **named)
        kept = {n: v.clone() for n, v in sorted(named.items()) if v is not None}
        call = Call(x.clone(), t[:1].clone(), kept, output.clone())
        if one:
            calls.append(call)
            raise _Enough
        calls.append(call._replace(again=computed_again(model, call)))
        return output

    with contextlib.suppress(_Enough):
        assembly.pipeline.latents(observed, range(ROWS), SEED, classes)
    return calls


def computed_again(model: nn.Module, call: Call) -> torch.Tensor:
    """The output of a quantized denoiser that only float rounding moves: with its samples one by
    one, or rounded_otherwise, whichever is further from the call's."""
    rows = range(len(call.x))
    alone = [
        model(call.x[i : i + 1], call.t, **{n: v[i : i + 1] for n, v in call.named.items()})
        for i in rows
    ]
    with rounded_otherwise(model):
        moved = model(call.x, call.t, **call.named)
    return min(torch.cat(alone), moved, key=lambda output: decibels(output, call.output))


@contextlib.contextmanager
def rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """What every quantizer sees is moved by one float rounding, as another runtime's sums move it.

    A code that is almost at a border falls to the other side, which moves others behind it: two
    computations of one deep network differ by up to its activations' rounding noise.
    """

    def move(quantizer: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0] * (1 + torch.finfo(torch.float32).eps),)

    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    handles = [quantizer.register_forward_pre_hook(move) for quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decibels(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal-to-noise ratio of an output."""
    expected = expected.double()
    error = (output.double() - expected).square().sum().clamp(min=1e-300)
    return float(10 * torch.log10(expected.square().sum() / error))
