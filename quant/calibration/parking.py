"""The weights of a module in a file, while nothing needs them and others need the memory."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

LARGE = 1 << 28  # weights, below which their memory is not worth the way to a file and back


def is_large(module: nn.Module) -> bool:
    """Whether memory matters more than time."""
    return sum(value.numel() for value in (*module.parameters(), *module.buffers())) >= LARGE


@contextmanager
def parked(module: nn.Module) -> Iterator[None]:
    """Within it the parameters of a large module are empty; afterwards they are as before.

    The file has no name, so that nothing of it stays, whatever ends the process. Without room for
    it the weights stay where they are.
    """
    if not is_large(module):
        yield
        return
    values = list(module.parameters())
    with tempfile.TemporaryFile() as file:
        try:
            torch.save([value.data for value in values], file)
        except (OSError, RuntimeError):  # PyTorch's word for a full disk is the latter
            yield
            return
        for value in values:
            value.data = value.data.new_empty(0)
        try:
            yield
        finally:
            file.seek(0)
            for value, kept in zip(values, torch.load(file, weights_only=True), strict=True):
                value.data = kept
