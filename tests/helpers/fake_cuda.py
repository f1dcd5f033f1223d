"""A `cuda` device on a machine without one, to find tensors that are made on the wrong device.

    with fake_cuda():
        x = torch.randn(2, device="cuda")  # has the values of torch.randn(2)
        x + torch.ones(2)                  # RuntimeError: two devices
        x.numpy()                          # TypeError

PyTorch's own FakeTensorMode has no values, so that a program cannot decide anything by them, and
its CUDA tensors cannot run backward without a driver. Here a tensor says that it is on the device,
every operation checks whether its operands are on the same one, and then runs on the CPU: the whole
of calibration and sampling goes through, and ends with the bits of a run on the CPU.

It counts what would keep a real device idle. Where PyTorch waits for all that was asked of the
device: values, sizes and masks that the host fetches, and copies from the host that are not
non_blocking, among them torch.tensor(1.0, device="cuda"). torch.full fills without a copy. And what
keeps the host busy: operators that launch a kernel, one or more of them, which views, empty tensors
and copies from and to the host do not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
MOVES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {  # the index may lie on the CPU
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


FETCHING = {  # values or sizes that the host needs to go on: item(), bool(), an index, a mask
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
}
NO_KERNEL = {  # beside views
    aten._local_scalar_dense.default,
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}  # numbers of the host, copied


class CudaTensor(torch.Tensor):
    """Values on the CPU that claim to be on the device."""

    values: torch.Tensor
    mode: "FakeCuda | None" = None  # that counts
    __torch_function__ = torch._C._disabled_torch_function_impl  # __torch_dispatch__ sees it all

    @staticmethod
    def __new__(cls, values: torch.Tensor, requires_grad: bool = False) -> "CudaTensor":
        made = torch.Tensor._make_subclass(cls, values, requires_grad)
        made.values = values
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"CudaTensor({self.values!r})"

    def __deepcopy__(self, memo: dict) -> "CudaTensor":
        if id(self) not in memo:
            copied = CudaTensor(self.values.clone(), self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.values.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        known: dict[int, CudaTensor] = {}
        alien: list[torch.Tensor] = []
        index: list[torch.Tensor] = []
        given = [plain(x, known, alien) for x in args[:1]]
        # As CUDA: one device for all operands, but for numbers on the CPU and what copies.
        given += [plain(x, known, index if func in INDEXING else alien) for x in args[1:]]
        named = {name: plain(x, known, alien) for name, x in (kwargs or {}).items()}
        if cls.mode is not None:
            cls.mode.count(func, given, named, alien, index)
        if alien and func not in MOVES:
            shapes = ", ".join(f"{tuple(x.shape)}" for x in alien)
            raise RuntimeError(
                f"two devices: {func} on cuda:0 got tensors of shape {shapes} on cpu"
            )
        return wrapped(func(*given, **named), known)

    @classmethod
    def made(cls, value: torch.Tensor) -> "CudaTensor":
        return value if isinstance(value, CudaTensor) else cls(value)


def plain(x: Any, known: dict[int, CudaTensor], alien: list[torch.Tensor]) -> Any:
    """An operand on the CPU. known: by the id of the values; alien: what was there before."""
    if type(x) is CudaTensor:
        known[id(x.values)] = x
        return x.values
    if isinstance(x, torch.Tensor):
        if x.dim() > 0:
            alien.append(x)
    elif isinstance(x, list | tuple):
        return [plain(v, known, alien) for v in x]
    return x


def wrapped(x: Any, known: dict[int, CudaTensor]) -> Any:
    """What an operation gave, on the device again; an operand that it gave back is the same one."""
    if isinstance(x, torch.Tensor):
        return known[id(x)] if id(x) in known else CudaTensor.made(x)
    return type(x)(wrapped(v, known) for v in x) if isinstance(x, list | tuple) else x


def is_cuda(x: Any) -> bool:
    """Of a device, as a program may write it."""
    return isinstance(x, str | torch.device) and str(x).partition(":")[0] == "cuda"


def is_device(x: Any) -> bool:
    return is_cuda(x) or isinstance(x, torch.device) or x == "cpu"


class FakeCuda(TorchFunctionMode):
    """The calls that name a device.

    calls: those that name this one; copies: between it and the host; waits: for everything asked of
    the device before; launches: operators that launch a kernel, or several, on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.copies = self.waits = self.launches = 0

    def count(self, func: Any, given: list, named: dict, alien: list, index: list) -> None:
        """An operation on the device; alien, index: its operands and indices on the CPU."""
        copied = len(index) + (func in MOVES and len(alien))
        asynchronous = named.get("non_blocking") or func in MOVES and given[2:3] == [True]
        masks = func in INDEXING and any(
            isinstance(x, torch.Tensor) and x.dtype is torch.bool for x in given[1]
        )
        self.copies += copied
        between = func in MOVES and copied  # the device and the host
        self.launches += not (func.is_view or func in NO_KERNEL or between)
        self.waits += func in FETCHING or masks or (copied > 0 and not asynchronous)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cpu or func is torch.Tensor.to:
            return self._move(func, *args, **kwargs)
        ours = args and isinstance(args[0], CudaTensor)
        if ours and func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("cannot convert a cuda:0 tensor to numpy; use Tensor.cpu() first")
        if ours and func is torch.Tensor.tolist:
            self._moved(False)
            return args[0].values.tolist()  # subclasses have none
        if not is_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        self.calls += 1
        if func in FROM_DATA and not (args and isinstance(args[0], CudaTensor)):
            self._moved(False)
        elif func is not torch.empty:
            self.launches += 1
        return CudaTensor.made(func(*args, **kwargs | {"device": "cpu"}))  # a factory

    def _moved(self, asynchronous: bool) -> None:
        self.copies += 1
        self.waits += not asynchronous

    def _move(self, func: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Tensor.to and Tensor.cpu: first the type and the memory format, then the device."""
        named = kwargs.pop("device", None)
        devices = [a for a in (named, *args) if a is not None and is_device(a)]
        rest = [a for a in args if isinstance(a, torch.dtype | torch.Tensor)]
        kept = {n: v for n, v in kwargs.items() if n != "non_blocking" and v is not None}
        if rest or kept:
            x = torch.Tensor.to(x, *rest, **kept) if rest or kept else x
        if func is torch.Tensor.cpu or (devices and not is_cuda(devices[0])):
            if not isinstance(x, CudaTensor):
                return x
            self._moved(False)
            return x.values.detach()
        if not devices or isinstance(x, CudaTensor):
            return x
        self.calls += 1
        self._moved(bool(kwargs.get("non_blocking")))
        return CudaTensor(x.detach(), x.requires_grad)


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """The device is there as long as the block runs."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to, as for CUDA
    try:
        with FakeCuda() as mode:
            CudaTensor.mode = mode
            yield mode
    finally:
        CudaTensor.mode = None
        torch.__future__.set_overwrite_module_params_on_conversion(before)
