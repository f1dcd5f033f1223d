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
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..core.context import Timestep, TimestepContext
from ..runtime.layers import QuantLayer, QuantMatMul, TimestepLayer
from .native import Compiled
from .native_layers import CompiledLayer, CompiledMatMul
from .onednn import Int8Layer
from .recorder import Recorder, Step, address, refresh

MOST_TAPES = 8  # of a denoiser: one for each shape
MOST_TIMESTEPS = 4096  # of a tape
QUANTIZED = (QuantLayer, QuantMatMul, Int8Layer)
PLAYABLE = (CompiledLayer, CompiledMatMul)  # of those
ALIGNMENT = 64  # bytes, as PyTorch aligns its own


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


class Tape:
    """A recorded call, with memory of its own for what it makes."""

    def __init__(self, recorder: Recorder, output: torch.Tensor):
        self._inputs = recorder.inputs
        self._kept = recorder.kept
        steps = recorder.varying_steps()
        made = {k: v for k, v in recorder.made.items() if k not in recorder.constants}
        offsets, size = _places(steps, made, output)
        self._memory = torch.empty(size, dtype=torch.uint8)

        def moved(value: Any) -> Any:
            here = isinstance(value, torch.Tensor) and address(value) in offsets
            return self._view(value, offsets[address(value)]) if here else value

        def address_of(value: Any) -> Any:
            return value.data_ptr() if isinstance(value, torch.Tensor) else value

        self._steps: list[Step] = []
        with torch.inference_mode(False), torch.no_grad():
            self._output = moved(output)
            for step in steps:
                arguments = tuple(tree_map(moved, step.arguments))
                self._kept += [v for v in step.tensors() if address(v) not in offsets]
                if step.compiled:
                    arguments = tuple(map(address_of, arguments))
                self._steps.append(
                    step._replace(arguments=arguments, named=tree_map(moved, step.named))
                )
        self._layers = [step.arguments[:2] for step in self._steps if step.function is refresh]
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


def _needed(steps: Sequence[Step], output: torch.Tensor) -> set[int]:
    """The steps that remain once the values of the timestep's layers are known."""
    found: set[int] = set()
    used = {address(output)}
    for i, step in reversed(list(enumerate(steps))):
        touched = set(map(address, step.tensors()))
        if step.function is not refresh and (step.compiled or touched & used):
            found.add(i)
            used |= touched
    return found


def _places(
    steps: Sequence[Step], made: Mapping[int, torch.UntypedStorage], output: torch.Tensor
) -> tuple[dict[int, int], int]:
    """Where, in one piece of memory, each storage that the steps make lies: its offset in bytes, by
    address; and the size. Those that are not needed at the same time share memory."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for tensor in step.tensors():
            if (key := address(tensor)) in made:
                first.setdefault(key, i)
                last[key] = i
    for step in steps:
        if step.function is refresh:  # is there before the call, and read after it
            held = address(step.arguments[0])
            first[held], last[held] = 0, len(steps)
    if address(output) in last:
        last[address(output)] = len(steps)
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
