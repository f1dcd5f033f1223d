"""What a call of a denoiser runs, noted down for tapes.py."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .native import Compiled, Varying, have_pixels

MOST_BYTES = 1 << 28  # that a call makes: beyond, the time between the layers hardly counts

_aten = torch.ops.aten
_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}
_EMPTY |= {_aten.new_empty_strided, _aten.empty_permuted}
_PADS = {_aten.pad, _aten.constant_pad_nd}
_BY_VALUE = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
_BY_VALUE |= {torch.Tag.dynamic_output_shape}


class Step(NamedTuple):
    """function(*arguments, **named). varying: the arguments from `position` on, by the timestep."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    varying: Varying | None = None
    compiled: bool = False  # takes addresses

    def tensors(self) -> list[torch.Tensor]:
        return tensors_of((self.arguments, self.named))


class Recorder(TorchDispatchMode):
    """Notes down the functions of a call, while it runs. All tensors of the call stay alive, so
    that none lies where another one was.

    inputs: the tensors that the call must get. steps: the functions. made: the memory that the call
    asked for. constants: the addresses of what depends on nothing and is not written again, so that
    the functions that made it need not run again. kept: all that must stay alive. failed: the call
    cannot be played.
    """

    def __init__(self, leaves: Sequence[Any], compiled: Compiled):
        super().__init__()
        self._compiled = compiled
        with torch.inference_mode(False):
            self.inputs = [v.clone() if isinstance(v, torch.Tensor) else v for v in leaves]
        self.steps: list[Step] = []
        self.made: dict[int, torch.UntypedStorage] = {}  # by address
        self.constants: set[int] = set()
        self.failed = False
        self.kept: list[Any] = []
        self._bytes = self._muted = 0

    def varying_steps(self) -> list[Step]:
        """The functions that have to run again."""
        known = self.constants
        return [s for s in self.steps if not known.issuperset(map(address, s.tensors()))]

    def can_play(self, output: Any) -> bool:
        """Whether the same functions give the output for any values of the inputs."""
        return isinstance(output, torch.Tensor) and not output.requires_grad and not self.failed

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports its compiler at the first recording: three seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.failed or self._muted:
            return out
        if _BY_VALUE & set(func.tags):
            self._give_up()
            return out
        given = set(map(address, tensors_of((args, kwargs))))
        results = tensors_of(out)
        if func._schema.is_mutable:
            self.constants -= given
            self._add(Step(func, args, kwargs))
        elif not all(address(v) in given for v in results):  # else views
            self._made(results)
            if func.overloadpacket in _EMPTY:
                return out
            if self.constants.issuperset(given):
                self.constants.update(map(address, results))
            if len(results) != 1 or not self._copied(func, args, results[0]):
                self._add(_into(func, args, kwargs, results))
        return out

    def _copied(self, func: Any, args: tuple, result: torch.Tensor) -> bool:
        """Whether the function only brings maps to other places. Then that is done, and noted down,
        by the compiled function for it: PyTorch's own take some ten microseconds more."""
        border, copies = _copies(func, args, result)
        if not copies or not all(have_pixels(*pair) for pair in copies):
            return False
        if border is not None:
            self._add(Step(_aten.fill_.Scalar, (result, border), {}))
        for source, target in copies:
            self._compiled.copy_pixels(source, target)
        return True

    def run(
        self, function: Callable, arguments: tuple, varying: Varying | None, keeps: Any
    ) -> None:
        """A function of the compiled C++ is about to run, see Compiled._run."""
        if not self.failed and not self._muted:
            self.constants.difference_update(map(address, tensors_of(arguments)))
            self._add(Step(function, arguments, {}, varying, compiled=True))
            self.kept.append(keeps)

    def give_up(self) -> None:
        """The call depends on values in a way that no recording knows."""
        if not self._muted:
            self._give_up()

    def before_timestep_layer(self, module: nn.Module, args: Any) -> None:
        self._muted += 1

    def after_timestep_layer(self, module: nn.Module, args: Any, output: torch.Tensor) -> Any:
        held = output.clone()
        self._muted -= 1
        if not self.failed and not self._muted:
            self._made([held])
            self._add(Step(refresh, (held, module, *args), {}))
        return held

    def _made(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.made[address(tensor)] = storage
            self._bytes += storage.nbytes()
        if self._bytes > MOST_BYTES:
            self._give_up()

    def _add(self, step: Step) -> None:
        if not self.failed:
            self.steps.append(step)

    def _give_up(self) -> None:
        self.failed, self.steps, self.made, self.kept = True, [], {}, []


def address(tensor: torch.Tensor) -> int:
    """What tensors of the same memory have in common."""
    return tensor.untyped_storage()._cdata


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def refresh(held: torch.Tensor, layer: nn.Module, x: torch.Tensor) -> None:
    held.copy_(layer(x))


def _into(func: Any, args: tuple, kwargs: dict, results: list[torch.Tensor]) -> Step:
    """A step that computes func(*args, **kwargs) into these results."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in func.overloadpacket.overloads() if len(results) == 1 else ():
        other = getattr(func.overloadpacket, name)
        targets = [a.name for a in other._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in other._schema.arguments if not a.is_out]
        if len(targets) == 1 and rest == wanted:
            return Step(other, args, kwargs | {targets[0]: results[0]})
    return Step(_compute_and_copy, (func, results, args, kwargs), {})


def _copies(
    func: Any, args: tuple, result: torch.Tensor
) -> tuple[float | None, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The maps (B, C, H, W) that a function copies, with the parts of its result that get them, and
    the value of all the rest, if there is a rest. No maps: it does something else."""
    op = func.overloadpacket
    if op is _aten.cat and all(part.dim() == 4 for part in args[0]):
        dim = args[1] if len(args) > 1 else 0
        parts = result.split([part.shape[dim] for part in args[0]], dim)
        return None, list(zip(args[0], parts, strict=True))
    if result.dim() != 4:
        return None, []
    height, width = result.shape[2:]
    if op is _aten.upsample_nearest2d:
        twice = (height, width) == tuple(2 * n for n in args[0].shape[2:])
        if not twice or not {None, 2.0}.issuperset(tree_leaves(args[2:])):
            return None, []
        return None, [(args[0], result[:, :, y::2, x::2]) for y in range(2) for x in range(2)]
    if op in _PADS and len(args[1]) <= 4 and min(args[1]) >= 0:
        left, right, top, bottom = (*args[1], 0, 0)[:4]
        values = [v for v in args[2:] if v != "constant"] or [0.0]
        if type(values[0]) is float:  # no other mode
            inside = result[:, :, top : height - bottom, left : width - right]
            return values[0], [(args[0], inside)]
    return None, []


def _compute_and_copy(func: Any, results: list[torch.Tensor], args: tuple, kwargs: dict) -> None:
    for own, value in zip(results, tensors_of(func(*args, **kwargs)), strict=True):
        own.copy_(value)
