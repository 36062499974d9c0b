"""Promises of docs/extending.md about what a cache costs and refuses, each a function
`check_...(make, case)` as in cache_checks.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cache_checks import cropped
from helpers import (
    Case,
    Make,
    Subject,
    addresses,
    agree,
    options,
    refuses,
    require,
    storage_nbytes,
    write,
)
from kvtool.core.cache import EMPTY, Cache
from kvtool.core.cache.quantization import Float8
from kvtool.errors import CacheOpUnsupported, CapacityError, UsageError

aten = torch.ops.aten


class NoSync(TorchDispatchMode):
    """Fails where a tensor's content would be brought to the host, or would decide a shape."""

    SYNCS = (
        aten._local_scalar_dense,
        aten.is_nonzero,
        aten.equal,
        aten.nonzero,
        aten.masked_select,
        aten._unique2,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        require(func.overloadpacket not in self.SYNCS, f"I8: {func} waits for the device")
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            masks = [t for t in args[1] if t is not None and t.dtype == torch.bool]
            require(not masks, f"I8: {func} with a mask waits for the device")
        return func(*args, **(kwargs or {}))


def check_device_work_needs_no_host(make: Make, case: Case) -> None:
    """Length is hidden during write and attend, since a compiled step must not depend on it."""
    subject = Subject(case, 140)
    cache = subject.cache(make)
    before, s, generator = addresses(cache), cache.spec, torch.Generator().manual_seed(0)
    for n in (60, 1, 1, 1, 1, 1, 5, 60):
        q, k, v = (
            torch.randn(s.batch, heads, n, s.head_dim, dtype=s.dtype, generator=generator)
            for heads in (4, s.n_kv_heads, s.n_kv_heads)
        )
        step = cache.begin(n)
        length, cache.length = cache.length, None  # type: ignore[assignment]
        with NoSync():
            for layer in range(s.n_layers):
                try:
                    cache.attend(layer, q, k, v, step)
                except TypeError as error:
                    raise AssertionError(f"I8: depends on length: {error}") from error
        cache.length = length
        cache.commit(n)
        require(addresses(cache) == before, "I8: keys or values have moved")


def check_bytes_scale_with_key_value_heads(make: Make, case: Case) -> None:
    sizes = set()
    for heads in (1, 2, 4):
        cache = Subject(dataclasses.replace(case, n_kv_heads=heads, padding=())).filled(make, 9)
        predicted = cache.predict_nbytes(cache.spec, 9)
        sizes.add(tuple(n / heads for n in (*cache.nbytes(), predicted)))
    require(len(sizes) == 1, f"I9: bytes per key-value head are {sizes}")


def check_unsupported_operations_say_so(make: Make, case: Case) -> None:
    operations: dict[str, Callable[[Cache], object]] = {
        "select fewer": lambda cache: cache.select(torch.tensor([0])),
        "select more": lambda cache: cache.select(torch.zeros(case.batch + 1, dtype=torch.long)),
        "crop": lambda cache: cache.crop(3),
        "reset": lambda cache: cache.reset(),
        "snapshot": lambda cache: cache.snapshot(0),
    }
    for name, operation in operations.items():
        subject = Subject(case)
        cache = subject.filled(make, 7)
        try:
            operation(cache)
        except CacheOpUnsupported as error:
            require(cache.kind in error.message and bool(error.hint), f"I13: {name}: {error}")
            promise = f"I13, {name} is refused"
            agree(promise, subject, cache, subject.ids, subject.padding, 1, 7)
        except Exception as error:
            raise AssertionError(f"I13: {name}: raises {error!r}") from error


def saved_by_codes(cache: Cache) -> int:
    """How many bytes of a row's keys and values quantization saves."""
    q, s = cache.quantization, cache.spec
    if q is None:
        return 0
    item = s.dtype.itemsize
    if isinstance(q, Float8):
        saved = s.head_dim * (item - 1) - item  # a byte a number, and a scale
        return 2 * cache.length * saved * s.n_layers * s.n_kv_heads
    n = q.n_quantized(cache.length)
    codes = 2 * n * s.head_dim * q.bits // 8
    pairs = n // q.group * s.head_dim + n * s.head_dim // q.channels(s.head_dim)
    saved = 2 * n * s.head_dim * item - codes - 2 * pairs * item
    return saved * s.n_layers * s.n_kv_heads


def check_bytes_are_those_of_the_storages(make: Make, case: Case) -> None:
    subject = Subject(case, 150)

    def count(promise: str) -> None:
        size = cache.nbytes()
        held = storage_nbytes(cache)
        require(size.allocated == held, f"I14, {promise}: {size} of {held} bytes")
        require(0 <= size.live <= size.allocated, f"I14, {promise}: live is {size}")
        require(size.overhead == size.allocated - size.live, f"I14, {promise}: overhead")
        token = cache.spec.token_nbytes // case.batch  # of one row
        tokens = 0 if cache.recompute else cache.length * cache.batch
        if cache.window:
            tokens = int((cache.snapshot(0)[2] != EMPTY).sum())
        saved = saved_by_codes(cache) * cache.batch
        expected = f"{tokens * token - saved} ({tokens} tokens held x spec.token_nbytes / batch"
        expected += f", less {saved} by quantization)" if saved else ")"
        right = size.live == tokens * token - saved
        require(right, f"I14, {promise}: live is {size.live}, expected {expected}")

    cache = subject.cache(make)
    count("empty")
    cache = subject.filled(make, 70)
    count("filled")
    write(cache, 80, commit=False)
    count("not committed")
    cropped("I14", cache, 5)
    count("cropped")
    cache.select(torch.tensor([case.batch - 1]))
    count("one row")


def check_predicted_bytes_are_those_allocated(make: Make, case: Case) -> None:
    subject = Subject(dataclasses.replace(case, padding=()), 300)
    for prompt, more in ((1, 299), (64, 70), (65, 70), (200, 70), (300, 0)):
        cache = subject.cache(make)
        for n in (prompt, *[1] * more):
            write(cache, n)
            found = cache.nbytes().allocated
            predicted = cache.predict_nbytes(cache.spec, cache.length, prompt, **options(make))
            said = f"{predicted} for {cache.length} after {prompt}, but there are {found}"
            require(predicted == found, f"I14: predicts {said}")


def check_a_full_cache_refuses(make: Make, case: Case) -> None:
    subject = Subject(case)
    for held, more in ((12, 1), (11, 2), (0, 13)):
        cache = subject.filled(make, held) if held else subject.cache(make)
        n = held + more if cache.recompute else more
        refuses(f"capacity, {held} held, {more} more", CapacityError, write, cache, n)
        require(cache.length == held, "capacity: a refused step counts")
        cropped("capacity", cache, min(held, 4))
        if (start := cache.length) < 12:
            agree("capacity, after refusal", subject, cache, subject.ids, subject.padding, 4, start)


def check_only_what_was_written_is_committed(make: Make, case: Case) -> None:
    """Nor can a step be committed whose rows or length have changed meanwhile."""
    between: dict[str, Callable[[Cache], object]] = {
        "commit": lambda cache: cache.commit(1),
        "crop": lambda cache: cache.crop(4),
        "select": lambda cache: cache.select(torch.zeros(case.batch, dtype=torch.long)),
        "reset": lambda cache: cache.reset(),
    }
    for name, operation in between.items():
        cache = Subject(case).filled(make, 5)
        write(cache, 2, commit=False)
        refuses("commit(3) of 2 tokens", UsageError, cache.commit, 3)
        refuses("commit(-1)", UsageError, cache.commit, -1)
        require(cache.length == 5, "a refused commit counts")
        operation(cache)
        refuses(f"commit after {name}", UsageError, cache.commit, 1)
