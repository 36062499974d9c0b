"""Copies of a user's decoder: in another format, or with every weight moved by a little.

`nn.Module.to(dtype)` makes complex tables real, and converts parameters and buffers alone. A
decoder holds more: tables in plain attributes, in lists, in objects of its own, the format that it
casts to. All of these must be converted, or the copy is another model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.verify.widened import Room, twin
from kvtool.errors import pass_on_shortage

WIDE = {torch.float64: torch.complex128}  # complex tables stay as they are in other formats
MAX_DEPTH = 8  # how deep objects hold objects
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, type, torch.device, torch.Generator,
    FunctionType, BuiltinFunctionType, MethodType, ModuleType,
)  # fmt: skip


def converted(decoder: Any, dtype: torch.dtype) -> Any:
    """A copy of a decoder in another format; in float64 with all that it holds beside its modules.

    Raises what its own `to` raises, and NotImplementedError if it holds nothing to convert.
    """
    other = copy.deepcopy(decoder)
    own = callable(getattr(other, "to", None)) and not isinstance(other, nn.Module)
    if own:
        other = other.to(dtype) or other
    everything = dtype in WIDE
    held = _TensorReplacer(
        lambda tensor: _cast(tensor, dtype), everything, (_format(decoder), dtype)
    )
    other = held.visit(other)
    if not (held.n_changed or own):
        raise NotImplementedError("it has no to(dtype), and no modules or tensors to convert")
    return other


def widened(decoder: Any, room: Room) -> Any:
    """A decoder in float64 with all that it holds, but for the weights of its modules: those stay
    as they are, and are widened as they are read.

    Raises NotImplementedError if it holds none, and what its copying raises.
    """
    shared: list[nn.Parameter] = []

    def see(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            shared.append(tensor)
        return tensor

    _TensorReplacer(see, True, None, change=False).visit(decoder)
    other = copy.deepcopy(decoder, memo={id(weight): weight for weight in shared})
    formats = (_format(decoder), torch.float64)
    held = _TensorReplacer(
        lambda tensor: _cast(tensor, torch.float64), True, formats, weights=False
    )
    other = held.visit(other)
    if not held.modules:
        raise NotImplementedError("it holds no modules")
    for module in held.modules:
        twin(module, room, module)
    return other


def moved(decoder: Any, by: float, seed: int = 0, tables: bool = False) -> Any:
    """A copy of a decoder, each of whose weights is multiplied by 1 + by * (a normal number).

    tables: move tensors that are no parameters, and leave the parameters. The draws depend on
    `seed` alone. Raises NotImplementedError if there is nothing to move.
    """
    for every in (False, True) if not tables else (False,):  # some hold plain tensors alone
        mover = _Mover(by, seed, tables, every)
        try:
            other = _TensorReplacer(mover, True, None).visit(copy.deepcopy(decoder))
        except (TypeError, RuntimeError) as error:  # a lock, an open file
            pass_on_shortage(error)
            raise NotImplementedError(f"it cannot be copied ({error})") from error
        if mover.n_moved:
            return other
    raise NotImplementedError("it holds no weights that could be moved")


class _Mover:
    """Moves parameters, or with `tables` other tensors; with `every` those in containers and
    objects too."""

    def __init__(self, by: float, seed: int, tables: bool, every: bool) -> None:
        self.by, self.tables, self.every = by, tables, every
        self.generator = torch.Generator().manual_seed(seed)
        self.n_moved = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor, moved if it is one of them."""
        numbers = tensor.is_floating_point() or tensor.is_complex()
        if not numbers or not (self.every or isinstance(tensor, nn.Parameter) != self.tables):
            return tensor
        self.n_moved += 1
        noise = torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64)
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        factor = 1 + self.by * noise.to(tensor.device)
        return (tensor.detach().to(wide) * factor).to(tensor.dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(WIDE.get(dtype, tensor.dtype))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _format(decoder: Any) -> torch.dtype | None:
    """The format of a decoder's weights, that of the first."""
    found: list[torch.dtype] = []

    def see(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.append(tensor.dtype)
        return tensor

    _TensorReplacer(see, True, None, change=False).visit(decoder)
    return found[0] if found else None


class _TensorReplacer:
    """Replaces every tensor that an object holds, each once however often it is held.

    everything: also what is no parameter or buffer, and, given `formats`, attributes that name the
    first of them. change: whether anything is written. weights: whether the parameters of modules
    are replaced.
    """

    def __init__(
        self,
        replace: Callable[[Tensor], Tensor],
        everything: bool,
        formats: tuple[torch.dtype | None, torch.dtype] | None,
        change: bool = True,
        weights: bool = True,
    ) -> None:
        self.replace, self.everything, self.change = replace, everything, change
        self.weights = weights
        self.modules: list[nn.Module] = []  # the outermost ones that were met
        self.formats = formats
        self.n_changed = 0
        self._made: dict[int, Any] = {}
        self._alive: list[Any] = []  # or another object might get the id of one that was seen

    def visit(self, value: Any, depth: int = MAX_DEPTH) -> Any:
        """The replacement of `value`."""
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, torch.dtype):
            same = self.formats is not None and self.everything and value == self.formats[0]
            return self.formats[1] if same and self.formats else value
        if _is_plain(value) or depth == 0:
            return value
        self._alive.append(value)
        self._made[id(value)] = value
        self._made[id(value)] = made = self._changed(value, depth)
        return made

    def _changed(self, value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value, depth)
        if isinstance(value, dict):
            for key in value:
                self._put(value, key, self.visit(value[key], depth - 1))
        elif isinstance(value, list):
            for i, item in enumerate(value):
                self._put(value, i, self.visit(item, depth - 1))
        elif isinstance(value, tuple):
            items = [self.visit(item, depth - 1) for item in value]
            if not self.change or all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        elif type(value).__module__ == "numpy" and hasattr(value, "dtype"):
            return self._array(value)
        else:
            self._attributes(vars(value) if hasattr(value, "__dict__") else {}, depth)
        return value

    def _put(self, holder: Any, key: Any, made: Any) -> None:
        if self.change and made is not holder[key]:
            holder[key] = made

    def _tensor(self, value: Tensor) -> Tensor:
        made = self.replace(value)
        if not self.change or made is value:
            self.n_changed += value.is_floating_point()  # it has the format already
            return value
        self.n_changed += 1
        if isinstance(value, nn.Parameter):
            return nn.Parameter(made, requires_grad=value.requires_grad)
        return made

    def _module(self, module: nn.Module, depth: int) -> nn.Module:
        """Its parameters and buffers and those of its submodules, then all else that they hold."""
        every = list(module.modules())
        self.modules.append(module)
        for part in every:
            self._alive.append(part)
            self._made[id(part)] = part
        for part in every:
            for held in (part._parameters, part._buffers)[0 if self.weights else 1 :]:
                for name, tensor in held.items():
                    if tensor is not None:
                        self._put(held, name, self.visit(tensor))
        if self.everything:
            for part in every:
                own = ("_parameters", "_buffers", "_modules")
                self._attributes(vars(part), depth, own)
        return module

    def _attributes(self, held: dict[str, Any], depth: int, but: tuple[str, ...] = ()) -> None:
        for name in [name for name in held if name not in but]:
            self._put(held, name, self.visit(held[name], depth - 1))

    def _array(self, value: Any) -> Any:
        """A table in NumPy's format, as the tensor would be."""
        if not self.everything or value.dtype.kind not in "fc" or not getattr(value, "ndim", 0):
            return value
        made = self.replace(torch.tensor(value)).numpy()
        return made if self.change and made.dtype != value.dtype else value


def _is_plain(value: Any) -> bool:
    """Whether nothing in a value may be replaced: numbers, names, code, which copies share."""
    return isinstance(value, PLAIN)
