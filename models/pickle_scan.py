"""A look at a pickle's opcodes before torch unpickles it: it is walked, never run.

`weights_only` keeps code out, but not a pickle of 400 bytes that asks for 3 GB, one whose keys take
minutes to hash, or one of millions of opcodes. The walk keeps in brief what torch would build, and
raises UnsafePickleError where no checkpoint goes. Where torch itself gives up, so does the walk.
"""

import pickletools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

MOST_OPCODES = 500_000  # of a file; a model of 1,000 tensors with its optimizer has 100,000
LARGEST_PICKLE = 64 * 2**20  # bytes, without the values of tensors
LARGEST_KEY = 2**60  # numbers below have hashes of their own
DEEPEST_NESTING = 200  # containers in containers
MOST_WORK = 50_000_000  # items and characters that are copied

# What may be called. Storages are made from the file's own bytes only.
TENSORS = {
    f"torch._utils._rebuild_{kind}"
    for kind in (
        "tensor",
        "tensor_v2",
        "tensor_v3",
        "parameter",
        "parameter_with_state",
        "sparse_tensor",
        "meta_tensor_no_storage",
    )
} | {"torch.nn.parameter.Parameter"}
WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"  # calls one of the above
PAIRS = {"collections.OrderedDict"}
MEMBERS = {"collections.Counter", "builtins.set", "__builtin__.set"}
ENCODE = "_codecs.encode"  # how protocol 2 writes bytes
PLAIN = {
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "builtins.complex",
    "__builtin__.complex",
}
ITEM_SIZES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "ShortStorage", "BFloat16Storage"), 2),
    "ComplexDoubleStorage": 16,
}


class UnsafePickleError(ValueError):
    """What a pickle asks for that no checkpoint needs; one line."""


@dataclass(slots=True, eq=False)
class _Item:
    """What an opcode would have built.

    value: a text or number; name: of a global; parts: of a tuple or list; key: may be the key of a
    mapping; depth: of what is nested; weight: items and characters, those of parts left out.
    """

    value: Any = None
    name: str = ""
    parts: list["_Item"] = field(default_factory=list)
    key: bool = False
    depth: int = 0
    weight: int = 1
    is_tuple: bool = False


def scan_pickles(file: BinaryIO, size: int, count: int = 1, stand_ins: Iterable[str] = ()) -> None:
    """Walk the first `count` pickles of a stream. size: of the whole file, in bytes.

    stand_ins: classes that the reader replaces by an empty one. Raises UnsafePickleError.
    """
    budget = _Budget()
    for _ in range(count):
        walk = _Walk(size, budget, frozenset(stand_ins))
        try:
            for name, argument in budget.opcodes(file):
                if not walk.step(name, argument):
                    return
        except UnsafePickleError:
            raise
        except (ValueError, IndexError, KeyError):
            return  # no sound pickle: torch stops at the same place, and says why


class _Budget:
    """What all pickles of a file may take together."""

    def __init__(self) -> None:
        self.seen = self.work = 0

    def opcodes(self, file: BinaryIO) -> Iterator[tuple[str, Any]]:
        for opcode, argument, _ in pickletools.genops(file):
            self.seen += 1
            if self.seen > MOST_OPCODES:
                raise UnsafePickleError(f"a pickle of more than {MOST_OPCODES:,} opcodes")
            yield opcode.name, argument

    def spend(self, work: int) -> None:
        self.work += work
        if self.work > MOST_WORK:
            raise UnsafePickleError(f"a pickle that copies more than {MOST_WORK:,} items")


class _Walk:
    def __init__(self, size: int, budget: _Budget, stand_ins: frozenset[str]):
        self.size, self.budget = size, budget
        self.callables = TENSORS | PAIRS | MEMBERS | PLAIN | stand_ins | {ENCODE, WITH_ATTRIBUTES}
        self.stack: list[_Item] = []
        self.outer: list[list[_Item]] = []  # the stacks below each mark
        self.memo: dict[int, _Item] = {}
        self.stored: dict[Any, int] = {}  # key of a storage -> bytes

    def step(self, name: str, argument: Any) -> bool:
        """One opcode; False where torch knows it as little."""
        if name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("BINUNICODE", "SHORT_BINSTRING"):
            self.stack.append(_Item(argument[:200], key=True, weight=len(argument)))
        elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            self.stack.append(_Item(argument, key=not abs(argument) >= LARGEST_KEY))
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            self.stack.append(_Item(key=True))
        elif name == "GLOBAL":
            self.stack.append(_Item(name=argument.replace(" ", ".", 1), key=True))
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            self.stack.append(_Item())
        elif name == "MARK":
            self.outer.append(self.stack)
            self.stack = []
        elif name in ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            self._tuple(name)
        elif name in ("APPEND", "APPENDS"):
            self._extend([self.stack.pop()] if name == "APPEND" else self._marked())
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self._last(2) if name == "SETITEM" else self._marked())
        elif name in ("REDUCE", "NEWOBJ"):
            self._call()
        elif name == "BUILD":
            state = self.stack.pop()
            self._check_pairs(state)
            self.budget.spend(state.weight)
        elif name == "BINPERSID":
            self._check_storage(self.stack.pop())
            self.stack.append(_Item())
        else:
            return name in ("PROTO", "STOP")
        return True

    def _last(self, count: int) -> list[_Item]:
        if len(self.stack) < count:
            raise ValueError("too few items")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _marked(self) -> list[_Item]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _tuple(self, name: str) -> None:
        count = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}.get(name)
        parts = self._marked() if count is None else self._last(count)
        item = _Item(parts=parts, is_tuple=True, weight=1 + len(parts))
        self.stack.append(self._nested(item, parts))

    def _extend(self, parts: list[_Item]) -> None:
        item = self.stack[-1]
        item.parts.extend(parts)
        item.weight += len(parts)
        self._nested(item, parts)

    def _set(self, pairs: list[_Item]) -> None:
        item = self.stack[-1]
        for key in pairs[::2]:
            _check_key(key)
        item.weight += len(pairs)
        self._nested(item, pairs)

    def _nested(self, item: _Item, parts: list[_Item]) -> _Item:
        item.depth = max(item.depth, 1 + max((p.depth for p in parts), default=0))
        if item.depth > DEEPEST_NESTING:
            raise UnsafePickleError(
                f"a pickle of containers nested more than {DEEPEST_NESTING} deep"
            )
        return item

    def _call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if called.name not in self.callables:
            what = called.name or "what is no function"
            raise UnsafePickleError(f"the pickle asks for code: {what}")
        if not arguments.is_tuple:
            raise UnsafePickleError(f"the pickle calls {called.name} without a tuple")
        parts = arguments.parts
        self.budget.spend(1 + sum(part.weight for part in parts))
        if called.name in PAIRS:
            for part in parts:
                self._check_pairs(part)
        elif called.name in MEMBERS:
            for part in parts:
                for member in part.parts:
                    _check_key(member)
        elif called.name == WITH_ATTRIBUTES and (not parts or parts[0].name not in TENSORS):
            raise UnsafePickleError("the pickle makes a tensor with what makes none")
        elif called.name == ENCODE and [p.value for p in parts[1:]] != ["latin1"]:
            raise UnsafePickleError("the pickle encodes text as something else than latin1")
        self.stack.append(_Item())

    def _check_pairs(self, item: _Item) -> None:
        """A list of keys and values, of which a mapping is made."""
        for pair in item.parts:
            if pair.parts:
                _check_key(pair.parts[0])

    def _check_storage(self, identity: _Item) -> None:
        """("storage", its class, key, device, items[, (key, offset, items) of a view])."""
        parts = identity.parts
        inner = [number for view in parts[5:] for number in view.parts]
        for part in [*parts[2:5], *inner]:
            _check_key(part)
        if len(parts) < 5:
            return  # torch refuses it
        key, items = parts[2].value, parts[4].value
        if type(items) is not int or items < 0:
            raise UnsafePickleError("a storage whose size is no number")
        claimed = items * ITEM_SIZES.get(parts[1].name.rpartition(".")[2], 1)
        self.stored[key] = max(claimed, self.stored.get(key, 0))
        if claimed > self.size or sum(self.stored.values()) > self.size:
            claimed = max(claimed, sum(self.stored.values()))
            raise UnsafePickleError(
                f"tensors claim {claimed:,} bytes, the whole file has {self.size:,}"
            )


def _check_key(item: _Item) -> None:
    if not item.key:
        raise UnsafePickleError("a pickle with keys that are neither names nor numbers")
