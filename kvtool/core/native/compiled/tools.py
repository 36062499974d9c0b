"""Compiling functions with numba, and reading and writing half formats, which numba lacks.

Compiled code reads arrays by their addresses. Half formats are stored as integers of 16 bits,
bfloat16 as uint16 and float16 as int16, and computed in float32.

numba compiles a function together with a copy of every function that it calls, at any depth. So a
decoding step took half a minute to compile. A `Shared` function is compiled once for each format,
and then called at its address.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding
import numba
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, typeof_impl
from numpy.typing import NDArray

from kvtool.outside import made_private

Array = NDArray[Any]
Forms = Iterator[tuple["Shared", tuple[Any, ...]]]  # functions, each with the types of arguments
Function = TypeVar("Function", bound=Callable[..., Any])

# Whenever numba compiles, it reads this settings file from the current folder. An import of numba
# before this one may have read it already, from a folder that is not trusted.
numba.core.config._config_fname = os.devnull  # type: ignore[attr-defined]
numba.core.config.reload_config()  # type: ignore[attr-defined]

# Code on disk calls functions of numba's thread pool. numba does not load these by itself if all
# the functions that the code was made of came from disk as well.
numba.get_num_threads()
# Without OpenMP numba uses a pool of its own, which ends the process if two Python threads use it.
ALONE = numba.threading_layer() == "workqueue"
MAX_THREADS = 1 if ALONE else int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]

# Without F16C on x86, LLVM calls conversion functions that do not exist here.
CODEGEN = cpu_target.target_context.codegen()
TRIPLE, _, FEATURES = CODEGEN.magic_tuple()
CONVERTS_FLOAT16 = not TRIPLE.startswith(("x86", "i")) or "+f16c" in FEATURES

# Sets how many threads share the next parallel loops, at most MAX_THREADS. numba's own function
# for this takes as long as a small layer.
use_threads: Any = types.ExternalFunction("set_num_threads", types.void(types.intc))

# LLVM may reorder sums, or it could vectorise nothing. NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz"}


# numba recompiles a function if its own file changes, but its code may include other files' too.
SOURCES = sorted(Path(__file__).parent.glob("*.py"))
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:8]


def _places() -> Iterator[Path]:
    """Folders that may keep compiled code, the first choice first."""
    if asked := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(asked)
    yield Path(__file__).parent / "__pycache__" / "native"
    for cache in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        yield Path(cache) / "kvtool" / "native"


def _chosen() -> tuple[str, str]:
    """The folder that keeps compiled code -> its path and "", or "" and why there is none.

    Code from this folder is executed. So only the user may be able to write there, and its path may
    not depend on the current folder.
    """
    reasons = []
    for place in _places():
        reason = made_private(place) if place.is_absolute() else f"{place} depends on where one is"
        if not reason:
            return str(place), ""
        reasons.append(reason)
    return "", reasons[0]


FOLDER, NOT_KEPT = _chosen()  # NOT_KEPT: why there is no folder


class Inlined:
    """A function that compiled code copies into itself. Called from Python it is not compiled."""

    def __init__(self, function: Callable[..., Any], fast: bool) -> None:
        self.function = function
        self.dispatcher = numba.njit(**_options(entry=False, fast=fast))(function)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


@typeof_impl.register(Inlined)  # type: ignore[untyped-decorator]
def _typeof_inlined(inlined: Inlined, context: Any) -> Any:
    return types.Dispatcher(inlined.dispatcher)


def compiled(fast: bool = True) -> Callable[[Callable[..., Any]], Inlined]:
    """Make an `Inlined` function.

    fast: whether LLVM may reorder sums, and round a product and a sum once (fused multiply-add).
    """
    return lambda function: Inlined(function, fast)


def _options(entry: bool, fast: bool, parallel: bool = False) -> dict[str, Any]:
    """Those of numba.njit: a way to call it from Python for an `entry` alone, and from C for none:
    each takes time to compile."""
    return {
        "nogil": True,
        "parallel": parallel,
        "fastmath": FAST if fast else False,
        "error_model": "numpy",  # division by zero gives infinity, as in an array
        "no_cpython_wrapper": not entry,
        "no_cfunc_wrapper": True,
    }


def _on_disk(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """numba.njit, with the code kept in FOLDER for the next process; None if it cannot be."""
    settings: Any = numba.core.config
    before, settings.CACHE_DIR = settings.CACHE_DIR, FOLDER
    try:
        made = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # the disk is full by now
        return None
    finally:
        settings.CACHE_DIR = before
    return made if made.stats.cache_path.startswith(FOLDER) else None


class Shared:
    """A compiled function that other compiled code calls at its address.

    Compiled code can call it only with argument types it was `load`ed for; Python, if it is an
    `entry`, with any. Code on disk refers to the functions that it calls by name: `load` these
    first, or linking ends the process.
    """

    def __init__(self, function: Callable[..., Any], entry: bool, parallel: bool, fast: bool):
        function.__qualname__ += VERSION
        self.name, self.entry = f"kvtool.{function.__module__}.{function.__qualname__}", entry
        options = _options(entry, fast, parallel)
        kept: Any = _on_disk(function, options) if FOLDER else None
        self.function: Any = kept or numba.njit(**options)(function)
        self.forms: dict[tuple[Any, ...], tuple[Any, str]] = {}  # types -> numba's result, symbol

    def __call__(self, *args: Any) -> Any:
        if not self.entry:  # numba would end the process
            raise TypeError(f"{self.name} is for compiled code; Python has no way to call it")
        return self.function(*args)

    @property
    def folder(self) -> Path | None:
        """The folder that keeps the code, or None."""
        path = self.function.stats.cache_path
        return Path(path) if path else None

    def load(self, *kinds: Any) -> bool:
        """Compile for arguments of these numba types, or load the code from disk -> whether it was
        compiled."""
        if kinds in self.forms:
            return False
        missed = sum(self.function.stats.cache_misses.values())
        self.function.compile(kinds)
        form = self.function.overloads[kinds]
        symbol = f"{self.name}{kinds}"
        address = form.library.get_pointer_to_function(form.fndesc.llvm_func_name)
        llvmlite.binding.add_symbol(symbol, address)
        self.forms[kinds] = form, symbol
        return sum(self.function.stats.cache_misses.values()) > missed


def shared(
    entry: bool = False, parallel: bool = False, fast: bool = True
) -> Callable[[Callable[..., Any]], Shared]:
    """Make a `Shared` function.

    entry: whether Python calls it, which takes more time to compile. parallel: whether
    `numba.prange` uses threads. fast: as in `compiled`.
    """

    def decorate(function: Callable[..., Any]) -> Shared:
        made = Shared(function, entry, parallel, fast)

        class Call(AbstractTemplate):  # type: ignore[misc]
            key = made

            def generic(self, args: Any, kws: Any) -> Any:
                kinds = tuple(map(types.unliteral, args))
                found = made.forms.get(kinds)
                return found and found[0].fndesc.restype(*kinds)

        infer_global(made, types.Function(Call))
        lower_builtin(made, types.VarArg(types.Any))(_calling(made))
        return made

    return decorate


def _calling(made: Shared) -> Any:
    """The function by which numba generates a call of a shared function."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        form, symbol = made.forms[signature.args]
        call = context.call_conv
        kind = call.get_function_type(signature.return_type, signature.args)
        function = cgutils.get_or_insert_function(builder.module, kind, symbol)
        call.decorate_function(function, form.fndesc.args, signature.args)
        status, result = call.call_function(
            builder, function, signature.return_type, signature.args, args
        )
        with cgutils.if_unlikely(builder, status.is_error):
            call.return_status_propagate(builder, status)
        return result

    return lower


def typed_pointer(typing: Any, address: Any, like: Any) -> Any:
    """An intrinsic: address, `like` -> a pointer to numbers of the type of `like`, for carray."""
    kind = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(address, like), generate


pointer: Any = intrinsic(typed_pointer)


def typed_number(typing: Any, x: Any) -> Any:
    """An intrinsic: a stored number -> the float to compute with, float32 for half formats.

    A bfloat16 is the upper half of a float32.
    """
    if isinstance(x, types.Float):
        return x(x), lambda context, builder, signature, args: args[0]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        bits = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())

    return types.float32(x), generate


number: Any = intrinsic(typed_number)


def typed_kept(typing: Any, x: Any, kind: Any) -> Any:
    """An intrinsic: a float, `kind` -> the number as arrays of the type of `kind` store it, rounded
    to nearest even."""
    if isinstance(kind.dtype, types.Float):
        return x(x, kind), lambda context, builder, signature, args: args[0]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if kind.dtype == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))
        bits = builder.bitcast(args[0], ir.IntType(32))
        shift, half = ir.Constant(bits.type, 16), ir.Constant(bits.type, 2**15 - 1)
        odd = builder.and_(builder.lshr(bits, shift), ir.Constant(bits.type, 1))
        upper = builder.lshr(builder.add(bits, builder.add(odd, half)), shift)
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        nan = ir.Constant(bits.type, 0x7FC0)  # rounding could carry a NaN's bits past infinity
        return builder.trunc(builder.select(is_nan, nan, upper), ir.IntType(16))

    return kind.dtype(types.float32, kind), generate


kept: Any = intrinsic(typed_kept)


@compiled()
def vector(address: int, n: int, like: Array) -> Array:
    """An array (n,) over the numbers at an address, of the type of `like`."""
    return carray(pointer(address, like), (n,))


@compiled()
def copy_rows(x: Array, y: Array) -> None:
    """y (n,d) = x (n,d); y[:] = x would also compile an error message for shapes that differ."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j]


def dense(kind: Any) -> tuple[Any, Any, Any]:
    """numba's types of contiguous arrays of `kind` with one, two and three dimensions."""
    return kind[::1], kind[:, ::1], kind[:, :, ::1]
