"""A dry run of a pickle of torch.save: what it would build, without building it.

With weights_only=True torch.load runs no code, but building may take forever. A few hundred bytes
can make a tuple that contains itself doubled sixty times, and hashing or printing it never ends. So
a pickle is walked first, by the steps of PyTorch's reader (torch/_weights_only_unpickler.py), with
placeholders for values. It may name only tensors and plain containers, with flat arguments.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch

MAX_STEPS = 4_000_000  # a tensor takes about 40
WIDEST, DEEPEST = 64, 3  # of the tuples in a tensor's arguments; it has 64 dimensions at most

ITEMSIZE = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1,
    "BoolStorage": 1, "UntypedStorage": 1, "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8,
}  # fmt: skip
STORAGES = {f"{module}.{name}" for name in ITEMSIZE for module in ("torch", "torch.storage")}
# Without parameter_with_state, whose attributes would hide the parameter's methods.
TENSORS = {
    f"torch._utils._rebuild_{name}"
    for name in (
        "tensor", "tensor_v2", "tensor_v3", "parameter", "sparse_tensor", "meta_tensor_no_storage",
    )
} | {"torch.serialization._get_layout", "torch.Size", "torch.device"}  # fmt: skip
ORDERED_DICT = "collections.OrderedDict"
SETS = ("builtins.set", "__builtin__.set")
KNOWN = STORAGES | TENSORS | {ORDERED_DICT, *SETS}
PLAIN = (str, bytes, int, float, bool, type(None))


class Refused(ValueError):
    """The pickle builds more than tensors, or is not one of torch.save."""


class UnsafePickle(Refused):
    """The pickle names something other than tensors and containers."""


@dataclass(frozen=True)
class Named:
    """A placeholder for a function or class that the pickle names."""

    name: str


@dataclass(frozen=True)
class Made:
    """A placeholder for the result of a call, a storage, a set or a dictionary."""

    by: str


@dataclass(frozen=True)
class Record:
    """The values of a tensor, which are stored beside the pickle."""

    key: str
    nbytes: int


def walk(stream: BytesIO) -> tuple[Any, list[Record]]:
    """Walk the pickle at the stream's position -> a placeholder for its value, and its records.

    Raises Refused if torch.load must not read it.
    """
    walker = _Walker()
    try:
        for n, (step, given) in enumerate(_steps(stream)):
            if n > MAX_STEPS:
                raise Refused(f"it takes more than {MAX_STEPS:,} steps")
            if step == "STOP":
                return walker.stack.pop(), walker.records
            walker.take(step, given)
    except Refused:
        raise
    except Exception as error:  # a short stack or a cut string raises many types
        raise Refused(type(error).__name__) from error
    raise Refused("it does not end")


def _steps(stream: BytesIO) -> Iterator[tuple[str, Any]]:
    for step, given, _ in pickletools.genops(stream):
        yield step.name, given


class _Walker:
    """The stack, the marks and the memo of PyTorch's reader."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.records: list[Record] = []

    def take(self, step: str, given: Any) -> None:
        """Do one step of the pickle."""
        if step in _PUSHED:
            self.stack.append(_PUSHED[step](given))
        elif step in ("BINPUT", "LONG_BINPUT"):
            self.memo[given] = self.stack[-1]
        elif step in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[given])
        elif step == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif step in _TAKEN:
            _TAKEN[step](self)
        elif step == "NEWOBJ":
            raise UnsafePickle("it makes objects of a class")
        elif step != "PROTO":
            raise Refused(f"{step} is no step of a state_dict")

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def tuple_of(self, n: int) -> None:
        items = tuple(self.stack[-n:])
        if len(items) < n:
            raise Refused("its stack is too short")
        self.stack[-n:] = [items]

    def extend(self, items: list[Any]) -> None:
        found = self.stack[-1]
        if not isinstance(found, list):
            raise Refused("it appends to what is no list")
        found.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Made) or target.by not in ("dict", ORDERED_DICT):
            raise Refused("it sets items of what is no dictionary")
        if not all(isinstance(key, PLAIN) for key in items[::2]):
            raise Refused("a key is neither a string nor a number")

    def record(self) -> None:
        """Push a storage, by its type, key, device, number of values, and view."""
        given = self.stack.pop()
        if not isinstance(given, tuple) or not 5 <= len(given) <= 6:
            raise Refused("a storage is not described as torch.save does")
        word, kind, key, where, n = given[:5]
        view = given[5] if given[5:] else None
        words = word in ("storage", b"storage") and isinstance(where, (str, bytes))
        if not (words and isinstance(kind, Named) and kind.name in STORAGES and _is_count(n)):
            raise Refused("a storage is not described as torch.save does")
        if not isinstance(key, (str, bytes, int)) or not (view is None or _is_flat(view)):
            raise Refused("a storage is not described as torch.save does")
        nbytes = n * ITEMSIZE[kind.name.rpartition(".")[2]]
        self.records.append(Record(str(key), nbytes))
        self.stack.append(Made("storage"))

    def call(self) -> None:
        """Call a function with arguments: it must make tensors, from flat values."""
        args, function = self.stack.pop(), self.stack[-1]
        if not isinstance(function, Named) or function.name in STORAGES:
            raise UnsafePickle("it calls what is no function")
        if not isinstance(args, tuple):
            raise Refused("it calls a function without arguments")
        if function.name == ORDERED_DICT:
            pairs = args[0] if args else []
            if len(args) > 1 or not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
                raise Refused("a dictionary is not made as torch.save does")
        elif function.name in SETS:
            if len(args) > 1 or not all(isinstance(item, PLAIN) for item in args[0] if args):
                raise Refused("a set holds neither strings nor numbers")
        elif not _is_flat(args):
            raise Refused("a tensor is not made as torch.save does")
        self.stack[-1] = Made(function.name)

    def build(self) -> None:
        """Set attributes of an object: only of a dictionary, as state_dict does with versions."""
        state = self.stack.pop()
        made = self.stack[-1]
        if not isinstance(made, Made) or made.by != ORDERED_DICT:
            raise UnsafePickle("it sets attributes of an object")
        if state != Made("dict"):
            raise Refused("attributes are no dictionary")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], PLAIN)


def _is_flat(value: Any, depth: int = 0) -> bool:
    """Whether a value, with the tuples in it, is of a size that a tensor can need."""
    if not isinstance(value, tuple):
        return not isinstance(value, list)
    return (
        len(value) <= WIDEST
        and depth < DEEPEST
        and all(_is_flat(item, depth + 1) for item in value)
    )


def _named(given: str) -> Named:
    module, _, name = given.partition(" ")
    found = f"{module}.{name}"
    is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    if found not in KNOWN and not is_dtype:
        raise UnsafePickle(f"it names {found}")
    return Named(found)


_PUSHED: dict[str, Callable[[Any], Any]] = {
    "GLOBAL": _named,
    "NONE": lambda given: None,
    "NEWFALSE": lambda given: False,
    "NEWTRUE": lambda given: True,
    "EMPTY_TUPLE": lambda given: (),
    "EMPTY_LIST": lambda given: [],
    "EMPTY_DICT": lambda given: Made("dict"),
    "EMPTY_SET": lambda given: Made("set"),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"),
        lambda given: given,
    ),
}
_TAKEN: dict[str, Callable[[_Walker], None]] = {
    "BINPERSID": _Walker.record,
    "REDUCE": _Walker.call,
    "BUILD": _Walker.build,
    "APPEND": lambda walker: walker.extend([walker.stack.pop()]),
    "APPENDS": lambda walker: walker.extend(walker.marked()),
    "SETITEM": lambda walker: walker.set_items([walker.stack.pop(-2), walker.stack.pop()]),
    "SETITEMS": lambda walker: walker.set_items(walker.marked()),
    "TUPLE": lambda walker: walker.push(tuple(walker.marked())),
    "TUPLE1": lambda walker: walker.tuple_of(1),
    "TUPLE2": lambda walker: walker.tuple_of(2),
    "TUPLE3": lambda walker: walker.tuple_of(3),
}
