"""A model in float64 without a copy of its weights: each is widened as it is read.

A copy takes 8 bytes a weight beside the 2 or 4 that are there already. Here the weights stay as
they are, and whoever reads one is given it in float64, in memory that the next one takes again. A
lower format is a subset of float64, so the numbers are those of a copy, and so is every result.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.core.footprint import converted
from kvtool.core.machine import available_bytes

KEPT_NUMBERS = 2**16  # numbers of a weight whose widened copy is kept: norms and biases
LARGE_BYTES = 2**28  # bytes of a copy in float64; to make a smaller one costs nothing
COPIES = 4  # of those that memory would hold, one may be made
WIDE = torch.float64


def is_large(model: nn.Module) -> bool:
    """Whether a copy in float64 is worth doing without."""
    return converted(model, WIDE) > LARGE_BYTES


def copy_crowds(model: nn.Module, device: torch.device | None = None, parts: int = 1) -> bool:
    """Whether a copy in float64 would take more than a good part of the memory that there is.

    device, parts: where it would stand, if not beside the model; of how many parts one is there.
    """
    if not is_large(model):
        return False
    available = available_bytes(device or next(model.parameters()).device)
    return available is not None and COPIES * converted(model, WIDE) // parts > available


class Room:
    """The memory in which large weights are widened, one after the other.

    It is taken again as soon as nobody holds what was read in it; who holds it still, because two
    weights are read at once, makes the next one go elsewhere.
    """

    def __init__(self) -> None:
        self.n_widened = 0  # weights, each time that one was
        self.nbytes = 0  # the most that were held in float64 at once, small ones included
        self._small: dict[Hashable, Tensor] = {}
        self._buffer: Tensor | None = None
        self._unused = 0  # references to the buffer's memory while nobody else holds it
        self._inside: Hashable = None  # the key of the weight whose numbers are in it

    def widened(self, weight: Tensor) -> Tensor:
        """The weight in float64, for its reader alone, who does not write to it."""
        if hasattr(weight, "to_local"):  # a DTensor: each of several processes holds a part
            self.n_widened += 1
            return weight.to(WIDE)  # a DTensor cannot be detached in inference mode
        key = _key(weight)
        if weight.numel() <= KEPT_NUMBERS:
            found = self._small.get(key)
            if found is None:
                found = self._small[key] = weight.detach().to(WIDE)
                self._count(0)
            return found
        return self._large(weight.detach(), key)

    def _large(self, numbers: Tensor, key: Hashable) -> Tensor:
        buffer = self._buffer
        if buffer is not None and self._inside == key:
            return self._part(buffer, numbers)
        self.n_widened += 1
        if buffer is not None and not self._is_free(buffer):
            self._count(numbers.numel())
            return numbers.to(WIDE)
        if buffer is None or buffer.numel() < numbers.numel() or buffer.device != numbers.device:
            self._buffer = self._inside = None  # let go of the old one first
            del buffer
            buffer = self._new_buffer(numbers)
        self._inside = None  # until it is whole
        part = self._part(buffer, numbers)
        part.copy_(numbers)
        self._inside = key
        return part

    def _new_buffer(self, numbers: Tensor) -> Tensor:
        buffer = torch.empty(numbers.numel(), dtype=WIDE, device=numbers.device)
        self._buffer = buffer
        self._unused = _holders(buffer)
        self._count(0)
        return buffer

    def _part(self, buffer: Tensor, numbers: Tensor) -> Tensor:
        return buffer[: numbers.numel()].view(numbers.shape)

    def _is_free(self, buffer: Tensor) -> bool:
        return _holders(buffer) <= self._unused

    def _count(self, more: int) -> None:
        held = 0 if self._buffer is None else self._buffer.numel()
        held += sum(tensor.numel() for tensor in self._small.values()) + more
        self.nbytes = max(self.nbytes, held * WIDE.itemsize)


def _key(weight: Tensor) -> Hashable:
    """What a weight is known by. A process that holds a part of one makes a new tensor of that part
    whenever it is read, of the same memory, which the model keeps."""
    return weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride()


def _holders(tensor: Tensor) -> int:
    """How many tensors, arrays and others hold a tensor's memory."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def twin(model: Any, room: Room, given: Any = None) -> Any:
    """A model whose modules read the weights of `model` in float64, in `room`; those of `model`
    stay as they are, and are the twin's too.

    given: a copy of it that holds the same weights, and is made into the twin.
    """
    if given is None:
        shared = {id(weight): weight for weight in _weights(model)}
        given = copy.deepcopy(model, memo=dict(shared))  # type: ignore[arg-type]
    for module in given.modules():
        kind: Any = type(module)
        if any(map(_is_low, module._parameters.values())) or _names_its_format(kind):
            module.__dict__["_room"] = room
            module.__class__ = _reading_wide(kind)
    return given


def _names_its_format(kind: Any) -> bool:
    """Whether modules say, as those of transformers do, what format their weights have."""
    return isinstance(getattr(kind, "dtype", None), property)


def _weights(model: nn.Module) -> Iterator[nn.Parameter]:
    return (weight for weight in model.parameters() if _is_low(weight))


def _is_low(weight: Tensor | None) -> bool:
    return weight is not None and weight.is_floating_point() and weight.dtype != WIDE


@cache
def _reading_wide(kind: Any) -> Any:
    """The same kind of module, whose parameters are widened as they are read."""

    def read(self: Any, name: str) -> Any:
        found = kind.__getattr__(self, name)
        # A part of a weight stands there as a plain tensor while the module runs.
        if isinstance(found, Tensor) and name in self._parameters and _is_low(found):
            return self.__dict__["_room"].widened(found)
        return found

    changes: dict[str, Any] = {"__getattr__": read, "__module__": kind.__module__}
    if kind.forward is nn.Embedding.forward:  # of a table, the rows that are read are widened
        changes["forward"] = _rows
    if _names_its_format(kind):
        changes["dtype"] = property(lambda self: WIDE)
    return type(kind.__name__, (kind,), changes)


def _rows(self: Any, ids: Tensor) -> Tensor:
    return F.embedding(ids, self._parameters["weight"], self.padding_idx).to(WIDE)
