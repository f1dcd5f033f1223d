"""Calls of a denoiser on a processor, played from a recording.

    tapes = Tapes(denoiser, context)
    eps = tapes(x, t, **named)          # as denoiser(x, t, **named)

A small layer takes ten microseconds, and what Python does from one layer to the next takes twice
as long. So the second call with inputs of some shape is recorded: which functions it runs, those of
the compiled C++ and PyTorch's operators, on which tensors. Later calls run the same functions
again, in memory that belongs to the recording, and Python has nothing left to decide. The result is
the same to the bit.

Three things depend on the timestep: the inputs of the call; the quantizers' steps, which compiled
functions get as arguments; and the layers that are computed once per timestep. A denoiser whose
call depends on values in another way is not recorded.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..core.context import Timestep, TimestepContext
from ..runtime.layers import QuantLayer, QuantMatMul, TimestepLayer
from .native import Compiled, Varying, have_pixels
from .native_layers import CompiledLayer, CompiledMatMul
from .onednn import Int8Layer

MOST_BYTES = 1 << 28  # that a call makes: beyond, the time between the layers hardly counts
MOST_TAPES = 8  # of a denoiser: one for each shape
MOST_TIMESTEPS = 4096  # of a tape
QUANTIZED = (QuantLayer, QuantMatMul, Int8Layer)
PLAYABLE = (CompiledLayer, CompiledMatMul)  # of those
ALIGNMENT = 64  # bytes, as PyTorch aligns its own

_aten = torch.ops.aten
_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}
_EMPTY |= {_aten.new_empty_strided, _aten.empty_permuted}
_PADS = {_aten.pad, _aten.constant_pad_nd}
_BY_VALUE = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
_BY_VALUE |= {torch.Tag.dynamic_output_shape}


class Tapes:
    """The recordings of one denoiser; called like it. A copy and a pickled one begin without any.

    context: of the quantizers' timestep, set before each call; None for full precision. compiled:
    whose functions the layers call.
    """

    def __init__(self, denoiser: nn.Module, compiled: Compiled, context: TimestepContext | None):
        self.denoiser, self.compiled, self.context = denoiser, compiled, context
        self.clear()

    def clear(self) -> None:
        """Drops the recordings: the weights are about to change."""
        # None: called once; False: cannot be recorded
        self._tapes: dict[Hashable, Tape | bool | None] = {}
        self._hooks: list[Mapping[int, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        t, index = (None, None) if self.context is None else (self.context.t, self.context.index)
        leaves, structure = tree_flatten((args, kwargs))
        key = _key(leaves, structure)
        if key is None or isinstance(index, torch.Tensor) or any(self._all_hooks()):
            return self.denoiser(*args, **kwargs)
        tape = self._tapes.get(key, False if len(self._tapes) >= MOST_TAPES else None)
        if isinstance(tape, Tape):
            return tape(leaves, t, index)
        if tape is False:
            return self.denoiser(*args, **kwargs)
        if key not in self._tapes:  # what layers prepare at their first call is not recorded
            self._tapes[key] = None if self._recordable() else False
            return self.denoiser(*args, **kwargs)
        recorder = Recorder(leaves, self.compiled)
        given, named = tree_unflatten(recorder.inputs, structure)
        with self._heard_by(recorder), recorder:
            output = self.denoiser(*given, **named)
        self._tapes[key] = Tape(recorder, output) if recorder.can_play(output) else False
        return output

    def _all_hooks(self) -> list[Mapping[int, Any]]:
        """Where the modules keep their hooks, which only a call of the modules runs."""
        if self._hooks is None:
            modules = list(self.denoiser.modules())
            self._hooks = [m._forward_hooks for m in modules]
            self._hooks += [m._forward_pre_hooks for m in modules]
        return self._hooks

    def _recordable(self) -> bool:
        """Whether all that depends on the quantizers' timestep is of native_layers.py."""
        inside = {id(m.layer) for m in self.denoiser.modules() if isinstance(m, TimestepLayer)}
        quantized = (m for m in self.denoiser.modules() if isinstance(m, QUANTIZED))
        return all(isinstance(m, PLAYABLE) for m in quantized if id(m) not in inside)

    @contextmanager
    def _heard_by(self, recorder: "Recorder") -> Iterator[None]:
        """What the compiled functions do, and the layers of the timestep, goes to the recorder."""
        hooks = []
        for module in self.denoiser.modules():
            if isinstance(module, TimestepLayer):
                hooks.append(module.register_forward_pre_hook(recorder.before_timestep_layer))
                hooks.append(module.register_forward_hook(recorder.after_timestep_layer))
        self.compiled.recorder = recorder
        try:
            yield
        finally:
            self.compiled.recorder = None
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tapes": {}, "_hooks": None}


def _key(leaves: Sequence[Any], structure: Any) -> Hashable | None:
    """What calls of one tape have in common; None for a call that is not to be recorded."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    found: list[Any] = [repr(structure), torch.get_num_threads()]
    found.append(torch.is_autocast_enabled("cpu"))
    for value in leaves:
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, bool | int | float | str | None):
                return None
            found.append((type(value), value))
            continue
        learns = torch.is_grad_enabled() and value.requires_grad
        if type(value) is not torch.Tensor or value.device.type != "cpu" or learns:
            return None
        found.append((value.shape, value.dtype, value.stride()))
    return tuple(found)


class _Step(NamedTuple):
    """function(*arguments, **named). varying: the arguments from `position` on, by the timestep."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    varying: Varying | None = None
    compiled: bool = False  # takes addresses

    def tensors(self) -> list[torch.Tensor]:
        return _tensors_of((self.arguments, self.named))


class Recorder(TorchDispatchMode):
    """Notes down the functions of a call, while it runs. All tensors of the call stay alive, so
    that none lies where another one was.

    inputs: the tensors that the call must get. steps: the functions. made: the memory that the call
    asked for. constants: the addresses of what depends on nothing and is not written again, so that
    the functions that made it need not run again. failed: the call cannot be played.
    """

    def __init__(self, leaves: Sequence[Any], compiled: Compiled):
        super().__init__()
        self._compiled = compiled
        with torch.inference_mode(False):
            self.inputs = [v.clone() if isinstance(v, torch.Tensor) else v for v in leaves]
        self.steps: list[_Step] = []
        self.made: dict[int, torch.UntypedStorage] = {}  # by address
        self.constants: set[int] = set()
        self.failed = False
        self._kept: list[Any] = []
        self._bytes = self._muted = 0

    def varying_steps(self) -> list[_Step]:
        """The functions that have to run again."""
        known = self.constants
        return [s for s in self.steps if not known.issuperset(map(_address, s.tensors()))]

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
        given = set(map(_address, _tensors_of((args, kwargs))))
        results = _tensors_of(out)
        if func._schema.is_mutable:
            self.constants -= given
            self._add(_Step(func, args, kwargs))
        elif not all(_address(v) in given for v in results):  # else views
            self._made(results)
            if func.overloadpacket in _EMPTY:
                return out
            if self.constants.issuperset(given):
                self.constants.update(map(_address, results))
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
            self._add(_Step(_aten.fill_.Scalar, (result, border), {}))
        for source, target in copies:
            self._compiled.copy_pixels(source, target)
        return True

    def run(
        self, function: Callable, arguments: tuple, varying: Varying | None, keeps: Any
    ) -> None:
        """A function of the compiled C++ is about to run, see Compiled._run."""
        if not self.failed and not self._muted:
            self.constants.difference_update(map(_address, _tensors_of(arguments)))
            self._add(_Step(function, arguments, {}, varying, compiled=True))
            self._kept.append(keeps)

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
            self._add(_Step(_refresh, (held, module, *args), {}))
        return held

    def _made(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.made[_address(tensor)] = storage
            self._bytes += storage.nbytes()
        if self._bytes > MOST_BYTES:
            self._give_up()

    def _add(self, step: _Step) -> None:
        if not self.failed:
            self.steps.append(step)

    def _give_up(self) -> None:
        self.failed, self.steps, self.made, self._kept = True, [], {}, []


class Tape:
    """A recorded call, with memory of its own for what it makes."""

    def __init__(self, recorder: Recorder, output: torch.Tensor):
        self._inputs = recorder.inputs
        self._kept = recorder._kept
        steps = recorder.varying_steps()
        made = {k: v for k, v in recorder.made.items() if k not in recorder.constants}
        offsets, size = _places(steps, made, output)
        self._memory = torch.empty(size, dtype=torch.uint8)

        def moved(value: Any) -> Any:
            here = isinstance(value, torch.Tensor) and _address(value) in offsets
            return self._view(value, offsets[_address(value)]) if here else value

        def address_of(value: Any) -> Any:
            return value.data_ptr() if isinstance(value, torch.Tensor) else value

        self._steps: list[_Step] = []
        with torch.inference_mode(False), torch.no_grad():
            self._output = moved(output)
            for step in steps:
                arguments = tuple(tree_map(moved, step.arguments))
                self._kept += [v for v in step.tensors() if _address(v) not in offsets]
                if step.compiled:
                    arguments = tuple(map(address_of, arguments))
                self._steps.append(
                    step._replace(arguments=arguments, named=tree_map(moved, step.named))
                )
        self._layers = [step.arguments[:2] for step in self._steps if step.function is _refresh]
        self._needed = _needed(steps, output)
        self._programs: dict[tuple[int | None, bool], list[Callable[[], Any]]] = {}
        self._values: dict[Timestep, list[torch.Tensor]] = {}

    def _view(self, tensor: torch.Tensor, offset: int) -> torch.Tensor:
        """The same part of what lies at `offset` in the tape's memory."""
        start = offset // tensor.element_size() + tensor.storage_offset()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(self._memory.untyped_storage(), start, tensor.shape, tensor.stride())

    def __call__(
        self, inputs: Sequence[Any], t: Timestep | None, index: int | None
    ) -> torch.Tensor:
        """inputs: like those of the recorded call; t: the quantizers' timestep, and the index of
        the nearest calibrated one."""
        known = None if t is None else self._values.get(t)
        with torch.no_grad():
            for own, value in zip(self._inputs, inputs, strict=True):
                if isinstance(own, torch.Tensor):
                    own.copy_(value)
            if known:
                torch._foreach_copy_([held for held, _ in self._layers], known)
            for run in self._program(index, bool(known)):
                run()
            if t is not None and known is None:
                if len(self._values) >= MOST_TIMESTEPS:
                    self._values.clear()
                self._values[t] = [held.clone() for held, _ in self._layers]
            return self._output.clone()

    def _program(self, index: int | None, known: bool) -> list[Callable[[], Any]]:
        """The functions with all their arguments, at the calibrated timestep; known: without those
        that compute the values of the timestep's layers."""
        found = self._programs.get((index, known))
        if found is not None:
            return found
        if len(self._programs) >= MOST_TIMESTEPS:
            self._programs.clear()
        made = self._programs[index, known] = []
        for i, step in enumerate(self._steps):
            arguments = step.arguments
            if known and i not in self._needed:
                continue
            if step.varying is not None and index is not None:
                position, values = step.varying
                new = values(index)
                arguments = arguments[:position] + new + arguments[position + len(new) :]
            made.append(partial(step.function, *arguments, **step.named))
        return made


def _address(tensor: torch.Tensor) -> int:
    """What tensors of the same memory have in common."""
    return tensor.untyped_storage()._cdata


def _tensors_of(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _refresh(held: torch.Tensor, layer: nn.Module, x: torch.Tensor) -> None:
    held.copy_(layer(x))


def _into(func: Any, args: tuple, kwargs: dict, results: list[torch.Tensor]) -> _Step:
    """A step that computes func(*args, **kwargs) into these results."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in func.overloadpacket.overloads() if len(results) == 1 else ():
        other = getattr(func.overloadpacket, name)
        targets = [a.name for a in other._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in other._schema.arguments if not a.is_out]
        if len(targets) == 1 and rest == wanted:
            return _Step(other, args, kwargs | {targets[0]: results[0]})
    return _Step(_compute_and_copy, (func, results, args, kwargs), {})


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
    for own, value in zip(results, _tensors_of(func(*args, **kwargs)), strict=True):
        own.copy_(value)


def _needed(steps: Sequence[_Step], output: torch.Tensor) -> set[int]:
    """The steps that remain once the values of the timestep's layers are known."""
    found: set[int] = set()
    used = {_address(output)}
    for i, step in reversed(list(enumerate(steps))):
        touched = set(map(_address, step.tensors()))
        if step.function is not _refresh and (step.compiled or touched & used):
            found.add(i)
            used |= touched
    return found


def _places(
    steps: Sequence[_Step], made: Mapping[int, torch.UntypedStorage], output: torch.Tensor
) -> tuple[dict[int, int], int]:
    """Where, in one piece of memory, each storage that the steps make lies: its offset in bytes, by
    address; and the size. Those that are not needed at the same time share memory."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for tensor in step.tensors():
            if (key := _address(tensor)) in made:
                first.setdefault(key, i)
                last[key] = i
    for step in steps:
        if step.function is _refresh:  # is there before the call, and read after it
            held = _address(step.arguments[0])
            first[held], last[held] = 0, len(steps)
    if _address(output) in last:
        last[_address(output)] = len(steps)
    offsets: dict[int, int] = {}
    alive: list[tuple[int, int, int]] = []  # offset, end, last use; by offset
    size = 0
    for key in sorted(first, key=first.__getitem__):
        alive = [place for place in alive if place[2] >= first[key]]
        needed = -(-made[key].nbytes() // ALIGNMENT) * ALIGNMENT
        start = 0
        for offset, end, _ in alive:
            if offset - start >= needed:
                break
            start = max(start, end)
        offsets[key] = start
        alive = sorted([*alive, (start, start + needed, last[key])])
        size = max(size, start + needed)
    return offsets, size


class Taped(nn.Module):
    """A full-precision denoiser whose calls are played from recordings; called like it."""

    def __init__(self, denoiser: nn.Module, compiled: Compiled):
        super().__init__()
        self.denoiser = denoiser
        self.tapes = Tapes(denoiser, compiled, None)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.tapes(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what pipelines look for beside the call
            return getattr(super().__getattr__("denoiser"), name)

    def _apply(self, *args: Any, **kwargs: Any) -> "Taped":
        self.tapes.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.tapes.clear()
        super()._load_from_state_dict(*args)
