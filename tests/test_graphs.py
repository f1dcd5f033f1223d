"""CUDA graphs of a denoiser, as far as a CPU shows it: what is recorded, and when anew.

python -m pytest tests/test_graphs.py
"""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from tinydm.quant.backends import graphs
from tinydm.quant.backends.graphs import Graphed, Graphs


class Played:
    """In place of Recorded: the call itself, on copies of the inputs."""

    made: list["Played"] = []

    def __init__(self, denoiser: nn.Module, inputs: list[Any], names: tuple[str, ...]):
        self.denoiser, self.names, self.calls = denoiser, names, 0
        self.made.append(self)

    def __call__(self, inputs: list[Any]) -> torch.Tensor:
        self.calls += 1
        count = len(inputs) - len(self.names)
        named = dict(zip(self.names, inputs[count:], strict=True))
        return self.denoiser(*inputs[:count], **named)


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        return x + t.view(-1, 1) + sum(given.values())


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Recorded", Played)
    monkeypatch.setattr(Played, "made", [])


def test_one_recording_serves_all_timesteps_of_a_shape() -> None:
    recordings, net, entered = Graphs(), Sum(), []

    @contextmanager
    def recording() -> Iterator[None]:
        entered.append(len(recordings))
        yield

    for t in (900, 500, 3):
        x, times = torch.randn(2, 3), torch.full((2,), t)
        found = recordings.call(net, (x, times), {}, recording)
        assert torch.equal(found, x + t)
    assert len(recordings) == 1 and Played.made[0].calls == 3 and entered == [0]
    others = [
        ((torch.zeros(4, 3), torch.zeros(4)), {}),
        ((torch.zeros(3, 2).t(), torch.zeros(2)), {}),
        ((torch.zeros(2, 3), torch.zeros(2)), {"y": torch.ones(2, 3)}),
        ((torch.zeros(2, 3), torch.zeros(2)), {"z": torch.ones(2, 3)}),
        ((torch.zeros(2, 3), torch.zeros(2)), {}),
    ]
    for args, kwargs in others:
        recordings.call(net, args, kwargs, recording)
    assert len(recordings) == 6  # another type of t, too


def test_recordings_go_with_the_weights() -> None:
    """A copy has weights of its own, and moved weights lie elsewhere."""
    recordings = Graphs()
    recordings.call(Sum(), (torch.zeros(1, 1), torch.zeros(1)), {})
    assert len(copy.deepcopy(recordings)) == len(pickle.loads(pickle.dumps(recordings))) == 0
    model = Graphed(nn.Linear(2, 2))
    model.graphs.call(Sum(), (torch.zeros(1, 1), torch.zeros(1)), {})
    assert len(model.graphs) == 1
    model.double()
    assert len(model.graphs) == 0


def test_a_cpu_computes_as_ever() -> None:
    net = nn.Linear(2, 2)
    x = torch.randn(3, 2)
    assert torch.equal(Graphed(net)(x), net(x)) and not Played.made
