"""Weights that wait in a file."""

import errno

import pytest
import torch
from torch import nn

from tinydm.quant.calibration import parking


def test_weights_wait_in_a_file_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in module.named_parameters()}
    same = list(module.parameters())
    with parking.parked(module):  # small: it stays
        assert module.weight.numel() > 0
    monkeypatch.setattr(parking, "LARGE", 1)
    with pytest.raises(KeyboardInterrupt), parking.parked(module):
        assert all(value.numel() == 0 for value in module.parameters())
        raise KeyboardInterrupt
    for value, (name, expected) in zip(module.parameters(), before.items(), strict=True):
        assert torch.equal(value, expected) and value.stride() == expected.stride(), name
    assert all(a is b for a, b in zip(module.parameters(), same, strict=True))


def test_without_room_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(parking, "LARGE", 1)
    monkeypatch.setattr(torch, "save", full)
    module = nn.Linear(2, 2)
    with parking.parked(module):
        assert module.weight.numel() == 4
