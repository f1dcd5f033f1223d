"""What tensor cores make of float32 operands, on a CPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """x with 10 bits behind the first one, to nearest, ties to even, as tensor cores read it."""
    bits = x.view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class TensorCores(TorchFunctionMode):
    """A device that rounds operands to TF32 where that is allowed. calls: with rounded ones."""

    OPERANDS = {
        torch.conv1d: (0, 1),
        torch.conv2d: (0, 1),
        torch.nn.functional.linear: (0, 1),
        torch.bmm: (0, 1),
        torch.matmul: (0, 1),
        torch.baddbmm: (1, 2),
    }

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        places = self.OPERANDS.get(func, ()) if torch.backends.cudnn.allow_tf32 else ()
        self.calls += bool(places)
        args = tuple(to_tf32(v) if i in places else v for i, v in enumerate(args))
        return func(*args, **(kwargs or {}))
