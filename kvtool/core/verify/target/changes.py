"""The ways to crop, select and reset a cache: methods that are found by their names.

Their arguments are not known: `trim(3)` may leave three tokens or remove three. So the caller tries
them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvtool.errors import first_line

METHODS = {
    "crop": (
        "crop", "truncate", "trim", "rewind", "rollback", "roll_back", "truncate_to", "trim_to",
        "crop_to", "rewind_to", "rewind_by", "crop_cache", "truncate_cache", "trim_cache",
        "rewind_cache", "rollback_cache", "crop_kv_cache", "truncate_kv_cache", "trim_kv_cache",
        "rewind_kv_cache", "rollback_kv_cache", "undo", "pop", "set_length", "drop_last",
    ),
    "select": (
        "select", "batch_select_indices", "reorder", "reorder_cache", "_reorder_cache",
        "reorder_kv_cache", "reorder_incremental_state", "reorder_past", "reorder_batch",
        "reorder_beams", "select_batch", "select_rows", "index_select", "gather",
    ),
    "reset": (
        "reset", "reset_caches", "reset_cache", "reset_kv_cache", "reset_kv_caches", "reset_state",
        "clear", "clear_cache", "clear_caches", "clear_kv_cache", "clear_kv_caches", "flush",
    ),
}  # fmt: skip
LENGTH, COUNT, NEGATIVE = "the length that stays", "how many tokens go", "minus how many go"
READINGS = (LENGTH, COUNT, NEGATIVE)
COUNTS = ("trim", "rewind", "rollback", "roll", "undo", "pop", "drop")  # in a method's name
OF_COUNTS = ("n", "num", "count", "k", "steps", "n_tokens", "num_tokens", "n_drop", "n_remove")
OF_LENGTHS = ("length", "max_length", "size", "to", "end", "pos", "position", "keep", "seq_len")
OF_ROWS = ("beam_idx", "rows", "idx", "indices", "new_order", "order", "beams", "index")


@dataclass(frozen=True)
class Change:
    """One way to change a cache."""

    op: str
    method: str  # none: the next step gets another position
    holder: str  # "cache", "parts" of it, the "module" that is given it, or the module's "own"
    reading: str = ""  # the meaning of crop's argument
    swapped: bool = False  # the cache comes second
    again: bool = False  # the caches in the module have to be set up again behind it

    @property
    def noted(self) -> bool:
        """Whether it differs from what its name says, so that a report mentions it."""
        return self.reading in (COUNT, NEGATIVE)

    def __str__(self) -> str:
        if not self.method:
            return f"{self.op}: by the position of the next step"
        return f"{self.method} is given {self.reading}" if self.reading else self.method


def changes(module: nn.Module, cache: Any, op: str, positions: bool) -> Iterator[Change]:
    """The candidates for `op` on a cache, the likeliest first. positions: whether steps take
    positions, so that a cache in the module need not be changed."""
    for holder, owner in _owners(module, cache):
        for name in METHODS[op]:
            method = getattr(owner, name, None)
            n_args = (op != "reset") + (holder == "module")
            if inspect.isroutine(method) and takes(method, n_args):
                swapped = holder == "module" and op != "reset" and _names(method)[0] in OF_ROWS
                for reading in _readings(name, method, holder) if op == "crop" else ("",):
                    yield Change(op, name, holder, reading, swapped)
    if cache is None and positions and op != "select":
        yield Change(op, "", "own")  # caches in the module are written anew from there


def _owners(module: nn.Module, cache: Any) -> Iterator[tuple[str, Any]]:
    if cache is None:
        yield "own", module
        return
    if parts := _parts(cache):
        yield "parts", parts[0]
    elif not isinstance(cache, (list, dict, tuple, Tensor)):
        yield "cache", cache
    yield "module", module


def _parts(cache: Any) -> list[Any]:
    """The objects in a container that holds one for each layer; none for tensors."""
    held = list(cache.values()) if isinstance(cache, dict) else cache
    if not isinstance(held, (list, tuple)) or not held:
        return []
    plain = (list, tuple, dict, Tensor, int, float, str, type(None))
    return [] if any(isinstance(part, plain) for part in held) else list(held)


def _readings(name: str, method: Any, holder: str) -> tuple[str, ...]:
    """The possible meanings of crop's argument, the likeliest first, by the parameter's name and
    the method's."""
    parameter = _names(method)[1 if holder == "module" else 0]
    counts = parameter not in OF_LENGTHS and (
        parameter in OF_COUNTS or (not name.endswith("_to") and name.startswith(COUNTS))
    )
    return (COUNT, LENGTH, NEGATIVE) if counts else READINGS


def apply(change: Change, module: nn.Module, cache: Any, past: int, argument: Any = None) -> Any:
    """Change the cache of `past` tokens: crop it to a length, select rows (n,), or reset it -> the
    changed cache.

    Raises NotImplementedError with what the method raises: found by its name, it promised nothing.
    """
    if not change.method:
        return cache
    given = [] if change.op == "reset" else [_read(change.reading, past, argument)]
    try:
        if change.holder == "parts":
            found = [getattr(part, change.method)(*given) for part in _parts(cache)]
            return cache if any(part is None for part in found) else _rebuilt(cache, found)
        if change.holder == "module":
            given = [*given, cache] if change.swapped else [cache, *given]
        owner = cache if change.holder == "cache" else module
        changed = getattr(owner, change.method)(*given)
    except (Exception, SystemExit) as error:
        raise NotImplementedError(f"{type(error).__name__}: {first_line(error)}") from error
    useful = changed is not None and change.holder != "own" and not isinstance(changed, (int, bool))
    return changed if useful else cache


def _rebuilt(cache: Any, parts: list[Any]) -> Any:
    if isinstance(cache, dict):
        return dict(zip(cache, parts, strict=True))
    same = all(type(a) is type(b) for a, b in zip(cache, parts, strict=True))
    return type(cache)(parts) if same else cache


def _read(reading: str, past: int, argument: Any) -> Any:
    if reading == COUNT:
        return past - argument
    return argument - past if reading == NEGATIVE else argument


def takes(method: Any, n: int) -> bool:
    """Whether a method can be called with n positional arguments."""
    try:
        inspect.signature(method).bind(*[None] * n)
    except (TypeError, ValueError):
        return False
    return True


def _names(method: Any) -> list[str]:
    return [*inspect.signature(method).parameters, "", ""]
