"""How functions are compiled by numba here, and numbers that it does not know read and written.

An address takes the place of an array, and whole numbers of 16 bits that of half formats: bfloat16
as uint16, float16 as int16, which are computed with as float32.

numba copies what a function calls into it, and what that calls, and compiles all of it again: so a
step of a decoder took half a minute. A `Shared` function is compiled once for each format, and
called where it stands.
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
from numba.extending import intrinsic, lower_builtin
from numpy.typing import NDArray

from kvtool.outside import made_private

Array = NDArray[Any]
Forms = Iterator[tuple["Shared", tuple[Any, ...]]]  # functions, each with the types of arguments
Function = TypeVar("Function", bound=Callable[..., Any])

# numba looks for this file in the current folder, also whenever it compiles. If it was imported
# before, that folder may have been a stranger's.
numba.core.config._config_fname = os.devnull  # type: ignore[attr-defined]
numba.core.config.reload_config()  # type: ignore[attr-defined]

# What is kept on disk refers to functions of numba's threads; and numba forgets to load these first
# where the functions that it was made of came from disk themselves.
numba.get_num_threads()
# Without OpenMP numba's own threads serve, which end the process if two of Python's ask them.
ALONE = numba.threading_layer() == "workqueue"
MOST_THREADS = 1 if ALONE else int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]

# Without this instruction of its processors LLVM calls functions that are not there.
CODEGEN = cpu_target.target_context.codegen()
TRIPLE, _, FEATURES = CODEGEN.magic_tuple()
CONVERTS_FLOAT16 = not TRIPLE.startswith(("x86", "i")) or "+f16c" in FEATURES

# How many of them share the loops that follow, at most those. numba's own function for it takes as
# long as a small layer.
use_threads: Any = types.ExternalFunction("set_num_threads", types.void(types.intc))

# Sums may be taken in several parts, or nothing could be vectorised; NaN and infinity stay.
FAST = {"reassoc", "contract", "arcp", "nsz"}


# numba keeps a function until its own file changes, but it may hold some of another file.
SOURCES = sorted(Path(__file__).parent.glob("*.py"))
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:8]


def _places() -> Iterator[Path]:
    """Where code may be kept, the first choice first."""
    if asked := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(asked)
    yield Path(__file__).parent / "__pycache__" / "native"
    for cache in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        yield Path(cache) / "kvtool" / "native"


def _chosen() -> tuple[str, str]:
    """The folder where code is kept, and why not in the first choice: it is run when it is read, so
    nobody else may be able to put it there, nor a folder that one happens to stand in."""
    reasons = []
    for place in _places():
        reason = made_private(place) if place.is_absolute() else f"{place} depends on where one is"
        if not reason:
            return str(place), ""
        reasons.append(reason)
    return "", reasons[0]


FOLDER, NOT_KEPT = _chosen()  # the second says why there is none


def compiled(parallel: bool = False, fast: bool = True) -> Callable[[Function], Function]:
    """numba.njit, kept on disk for the next process where there is a folder for it.

    fast: whether sums may be taken in another order, and a product and a sum be rounded once.
    """

    def decorate(function: Function) -> Function:
        function.__qualname__ += VERSION
        options: dict[str, Any] = {"nogil": True, "parallel": parallel}
        options["fastmath"] = FAST if fast else False
        options["error_model"] = "numpy"  # division by zero gives infinity, as in an array
        plain = numba.njit(**options)(function)
        return _kept(function, options) or plain if FOLDER else plain

    return decorate


def _kept(function: Function, options: dict[str, Any]) -> Any:
    """As `compiled`, kept in FOLDER; None where numba would keep it elsewhere, or not at all."""
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
    """A function that others call at its address: compiled once for the types that it is `load`ed
    for, and for no others when called from compiled code. From Python it is an ordinary one.

    Code on disk names what it calls: `load` that first, or the process ends when it is linked.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.name = f"kvtool.{function.__module__}.{function.__qualname__}.{VERSION}"
        self.function: Any = compiled(**options)(function)
        self.forms: dict[tuple[Any, ...], tuple[Any, str]] = {}  # by types: what numba has, symbol

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    @property
    def folder(self) -> Path | None:
        """Where code is kept, if there is a folder to write to."""
        path = self.function.stats.cache_path
        return Path(path) if path else None

    def load(self, *kinds: Any) -> bool:
        """Compile for arguments of these numba types, or read that from disk -> whether it was
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


def shared(parallel: bool = False, fast: bool = True) -> Callable[[Callable[..., Any]], Shared]:
    """`compiled`, as a function that is called where it stands."""

    def decorate(function: Callable[..., Any]) -> Shared:
        made = Shared(function, parallel=parallel, fast=fast)

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
    """How numba makes the call of a shared function."""

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
    """An address as a pointer to numbers of the type of `like`, for carray."""
    kind = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(address, like), generate


pointer: Any = intrinsic(typed_pointer)


def typed_number(typing: Any, x: Any) -> Any:
    """A number as it is computed with: a bfloat16 is the upper half of a float32."""
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
    """A number as it is stored in arrays of the type of `kind`: rounded to nearest even."""
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
        nan = ir.Constant(bits.type, 0x7FC0)  # or the sum could carry into infinity and beyond
        return builder.trunc(builder.select(is_nan, nan, upper), ir.IntType(16))

    return kind.dtype(types.float32, kind), generate


kept: Any = intrinsic(typed_kept)


@compiled()
def vector(address: int, n: int, like: Array) -> Array:
    """The n numbers at an address."""
    return carray(pointer(address, like), (n,))


@compiled()
def copy_rows(x: Array, y: Array) -> None:
    """y (n,d) = x (n,d): an assignment to a slice would compile words for shapes that differ."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j]


def dense(kind: Any) -> tuple[Any, Any, Any]:
    """numba's types of dense arrays of one, two and three dimensions."""
    return kind[::1], kind[:, ::1], kind[:, :, ::1]
