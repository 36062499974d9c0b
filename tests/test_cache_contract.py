"""The promises of DESIGN.md, section 3, over every registered kind of cache.

Each is a function `check_...(make, case)`, so that test_cache_kinds.py can hold the same judge
against broken caches. I10 to I12 are about kinds of their own.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import (
    CASES,
    Case,
    Make,
    Subject,
    addresses,
    agree,
    break_off,
    options,
    refuses,
    require,
    storage_nbytes,
    tokens,
    write,
)
from kvtool import registry
from kvtool.core.cache import EMPTY, Cache, CacheSpec, Step, cache_class
from kvtool.core.cache.none import NoCache
from kvtool.core.cache.paged import PagedCache
from kvtool.core.cache.quantized import Int4Cache, Int8Cache
from kvtool.core.cache.sliding import SlidingCache
from kvtool.core.kernels import visible
from kvtool.errors import CacheOpUnsupported, CapacityError, UsageError

aten = torch.ops.aten
KINDS = sorted(registry.CACHES)
# Windows so small that tokens are evicted within the dozen that most checks feed.
WINDOWS = {
    "sliding-5": partial(SlidingCache, window=5, sinks=2),
    "sliding-5-slack-3": partial(SlidingCache, window=5, sinks=2, slack=3),
    "sliding-9-no-sinks": partial(SlidingCache, window=9, sinks=0),
    "sliding-1": partial(SlidingCache, window=1, sinks=1, slack=1),
}
# Pages so small that a row has many; one token fills the smallest, so none is filled in part.
PAGES = {"paged-3": partial(PagedCache, page=3), "paged-1": partial(PagedCache, page=1)}
# Groups so small that some are full by then.
GROUPS = {
    "int4-4": partial(Int4Cache, group=4, residual=2),
    "int4-4-slack-5": partial(Int4Cache, group=4, residual=0, slack=5),
    "int8-3": partial(Int8Cache, group=3, residual=1),
    "int8-8-slack-2": partial(Int8Cache, group=8, residual=0, slack=2),
}
MAKES: dict[str, Make] = {kind: cache_class(kind) for kind in KINDS} | WINDOWS | PAGES | GROUPS
COMPILABLE = [kind for kind in KINDS if cache_class(kind).compilable]

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def cut(n: int, start: int, rng: random.Random) -> list[int]:
    """Random ends of steps that take a sequence from `start` to `n`."""
    inside = range(start + 1, n)
    return [*sorted(rng.sample(inside, rng.randint(0, len(inside)))), n]


def needed(cache: Cache, length: int) -> Tensor:
    """Which of the positions from 0 on (B,length) the token after `length` others would see."""
    positions = torch.arange(length).expand(cache.batch, length)
    padding = 0 if cache.left_padding is None else cache.left_padding
    own = (torch.full((cache.batch,), length) - padding)[:, None]
    return visible(own, positions, cache.window, cache.sinks)[:, 0, 0] & (positions < own)


def holds_what_is_needed(cache: Cache, length: int) -> bool:
    """Whether the cache has everything that going on from `length` takes."""
    if cache.recompute or not length:
        return True
    held = cache.snapshot(0)[2]  # (B,S)
    there = (held[:, None] == torch.arange(length)[:, None]).any(-1)
    return not bool((needed(cache, length) & ~there).any())


def may_be_rounded(cache: Cache, length: int) -> bool:
    """Whether the token after `length` others would meet one exactly that has been quantized. A
    cache may have kept it exactly too."""
    if cache.quantization is None:
        return False
    settled = cache.quantization.settled
    return settled(length) < min(length, settled(cache.length))


def cropped(promise: str, cache: Cache, length: int) -> bool:
    """Crop where that can be honoured; where it cannot, it must be refused, with reasons (I13)."""
    before, held = cache.length, holds_what_is_needed(cache, length)
    may_refuse = not held or may_be_rounded(cache, length)
    try:
        cache.crop(length)
    except CacheOpUnsupported as error:
        require(may_refuse, f"{promise}: is refused: {error}")
        said = f"{cache.kind} cache cannot crop to {length}: it needs "
        require(str(error).startswith(said) and bool(error.hint), f"I13: {error}")
        require(cache.length == before, f"{promise}: is refused, but shortens the cache")
        return False
    require(held, f"{promise}: is not refused")
    return True


# --- the checks


def check_any_split_equals_one_pass(make: Make, case: Case) -> None:
    rng = random.Random(1)
    for n in (12, 150):  # below and beyond the block of 64 columns of a cache
        subject = Subject(case, n)
        ends = [[n], list(range(1, n + 1)), *(cut(n, 0, rng) for _ in range(4))]
        for split in ends if n == 12 else ends[3:]:
            cache = subject.cache(make)
            agree(f"I1, steps to {split}", subject, cache, subject.ids, subject.padding, split)


class Recorder(NoCache):
    """Remembers the keys and values that the model hands over."""

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        super().__init__(spec, left_padding)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        self.seen[layer] = k, v
        if step.quantization is not None:
            return step.quantization.both(k, v, step.q_pos)
        return k, v

    def stored(self, layer: int, n: int, like: Cache) -> tuple[Tensor, Tensor]:
        """What a cache that holds the first n tokens should have of a layer."""
        k, v = self.seen[layer]
        if like.quantization is None or not (settled := like.quantization.settled(n)):
            return k, v
        old = k[:, :, :settled], v[:, :, :settled]
        rounded = like.quantization.rounded(*old, self._positions(0, settled))
        pairs = zip(rounded, (k, v), strict=True)
        keys, values = (torch.cat([a, b[:, :, settled:]], dim=2) for a, b in pairs)
        return keys, values


def check_columns_hold_what_their_positions_say(make: Make, case: Case) -> None:
    subject = Subject(case)
    cache = subject.filled(make, 9)
    break_off(subject, cache, subject.ids, subject.model.norm)
    truth = subject.cache(Recorder)
    window = Step.full(
        *subject.ids.shape,
        left_padding=subject.padding,
        window=cache.window,
        sinks=cache.sinks,
        quantization=cache.quantization,
    )
    with torch.no_grad():
        subject.model(subject.ids, window, truth)
    first = torch.zeros(case.batch, dtype=torch.long) - torch.tensor(case.padding or 0)
    for layer in range(2):
        k, v, pos = cache.snapshot(layer)
        there = pos != EMPTY
        number = (pos - first[:, None]).masked_fill(~there, 0)  # in order of arrival
        require(bool((number < 9).all() and (number >= 0).all()), f"I2: layer {layer} is at {pos}")
        count = torch.zeros(case.batch, 9, dtype=torch.long).scatter_add_(1, number, there.long())
        if cache.window:
            kept = bool((count <= 1).all()) and holds_what_is_needed(cache, 9)
        else:
            kept = bool((count == 1).all())
        require(kept, f"I2: layer {layer} is at {pos}")
        for found, whole in zip((k, v), truth.stored(layer, 9, cache), strict=True):
            gap = found - torch.take_along_dim(whole, number[:, None, :, None], dim=2)
            gap = float((gap * there[:, None, :, None]).abs().max())
            require(gap < 1e-12, f"I2: layer {layer} holds other keys or values, by {gap:.1e}")
        k.fill_(7.0)
        v.fill_(7.0)
    agree("I2: a snapshot is a copy", subject, cache, subject.ids, subject.padding, 1, 9)


def check_a_cache_without_columns_says_so(make: Make, case: Case) -> None:
    """I2 asks where keys are; a kind that recomputes has none to show (I13)."""
    cache = Subject(case).filled(make, 9)
    error = refuses("I13: snapshot", CacheOpUnsupported, cache.snapshot, 0)
    require("it stores none" in str(error), f"I13: snapshot: {error}")


def check_unused_columns_do_not_leak(make: Make, case: Case) -> None:
    subject = Subject(case)
    for held in (0, 5, 11):
        for chunk in (1, 4):
            cache = subject.filled(make, held, 80) if held else subject.cache(make, 80)
            write(cache, 80 - held, 1e30, commit=False)  # to the last column, and dropped
            ids = subject.ids
            agree(f"I3, {held} tokens held", subject, cache, ids, subject.padding, chunk, held)
    for length in (11, 3):
        if cropped("I3, after crop", cache, length):
            write(cache, 80 - length, 1e30, commit=False)
            agree("I3, after crop", subject, cache, subject.ids, subject.padding, 2, length)


def check_a_broken_step_leaves_no_trace(make: Make, case: Case) -> None:
    subject = Subject(case)
    other = tokens(case.batch, 12, 2)
    for held in (0, 5):
        for module in (subject.model.layers[1], subject.model.norm):
            cache = subject.filled(make, held, 90) if held else subject.cache(make, 90)
            live = cache.nbytes().live
            break_off(subject, cache, torch.cat([subject.ids[:, :held], other], 1), module)
            break_off(subject, cache, tokens(case.batch, 90, 3), module)  # makes a cache grow
            found = cache.nbytes().live  # a window may have let go of what nobody needs any more
            kept = found == live or bool(cache.window and found < live)
            require(kept, "I4: a broken step counts as live")
            promise = f"I4, {held} tokens held"
            agree(promise, subject, cache, subject.ids, subject.padding, 3, held)


def check_crop_equals_never_having_gone_on(make: Make, case: Case) -> None:
    subject = Subject(case)
    for length in (0, 1, 6, 9):
        cache = subject.filled(make, 9)
        promise = f"I5, crop({length})"
        held = length if cropped(promise, cache, length) else 9
        ids = torch.cat([subject.ids[:, :held], tokens(case.batch, 12 - held, 2)], dim=1)
        agree(promise, subject, cache, ids, subject.padding, 2, held)
    for length in (13, -1):
        refuses(f"I5, crop({length}) of 12 tokens", UsageError, cache.crop, length)
    require(cache.length == 12, "I5, a refused crop shortens the cache")


def selections(batch: int) -> list[list[int]]:
    """Rows as they are, reversed, repeated, fewer, and more."""
    rows = list(range(batch))
    return [rows, rows[::-1], [batch - 1] * batch, [batch - 1], [*rows[::-1], 0, 0]]


def check_select_continues_from_each_rows_history(make: Make, case: Case) -> None:
    subject = Subject(case)
    for rows in map(torch.tensor, selections(case.batch)):
        ids, padding = subject.ids[:, :7], subject.padding
        cache = subject.filled(make, 7, 80)  # room for all rows where they share it
        promise = f"I6, select({rows.tolist()})"
        try:
            cache.select(rows)
        except CacheOpUnsupported:
            require(len(rows) > case.batch, f"{promise}: is refused")
        else:
            ids = ids[rows]
            padding = None if padding is None else padding[rows]
        for wrong in (len(ids), -1):  # of fewer rows, others may still lie behind
            refused = f"{promise}, then select({wrong})"
            refuses(refused, UsageError, cache.select, torch.tensor([wrong]))
        for length in (10, 14):  # and once more, from what it made of the first
            ids = torch.cat([ids, tokens(len(ids), length - ids.shape[1], length)], dim=1)
            held = cache.length
            agree(promise, subject, cache, ids, padding, 2, held)
            last = torch.arange(len(ids)).roll(1)
            cache.select(last)
            ids, padding = ids[last], None if padding is None else padding[last]


def check_reset_equals_a_new_cache(make: Make, case: Case) -> None:
    subject = Subject(case, 70)
    cache = subject.filled(make, 70)
    before = addresses(cache)
    for padding in (subject.padding, torch.full((case.batch,), 2), None):
        for n in (6, 12):  # a shorter sequence lies where a longer one was
            cache.crop(0)
            write(cache, 70, 1e30, commit=False)
            cache.reset(padding)
            ids = tokens(case.batch, n, n)
            agree(f"I7, padding {padding}", subject, cache, ids, padding, 3)
            require(addresses(cache) == before, "I7: a reset cache is somewhere else")
    cache.select(torch.tensor([0]))
    cache.reset(subject.padding)
    agree("I7, after select", subject, cache, subject.ids[:, :12], subject.padding, 3)


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
    n, item = q.settled(cache.length), s.dtype.itemsize
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
        require(size.live == tokens * token - saved, f"I14, {promise}: live is {size.live}")

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
    for prompt in (1, 64, 65, 200, 300):
        cache = subject.cache(make)
        for n in (prompt, *[1] * (300 - prompt)):
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


def check_a_long_random_history(make: Make, case: Case) -> None:
    """All operations in any order, against plain lists of the tokens that each row has seen."""
    for seed in range(3):
        rng = random.Random(seed)
        subject = Subject(case)
        cache, padding, ids = subject.cache(make, 20), subject.padding, subject.ids[:, :0]
        for number in range(25):
            n = min(rng.randint(1, 4), 20 - ids.shape[1])
            more = torch.cat([ids, tokens(len(ids), n, number)], dim=1)
            operation = rng.choice(["feed"] * 4 + ["break", "crop", "select", "reset"])
            if operation == "feed" and n:
                promise = f"a random history, seed {seed}, operation {number}"
                agree(promise, subject, cache, more, padding, rng.randint(1, 2), ids.shape[1])
                ids = more
            elif operation == "break" and n:
                break_off(subject, cache, more, subject.model.layers[1])
            elif operation == "crop":
                length = rng.randint(0, ids.shape[1])
                if cropped(f"a random history, seed {seed}", cache, length):
                    ids = ids[:, :length]
            elif operation == "select":
                count = rng.randint(1, case.batch)
                rows = torch.tensor([rng.randrange(len(ids)) for _ in range(count)])
                cache.select(rows)
                ids, padding = ids[rows], None if padding is None else padding[rows]
            elif operation == "reset":
                padding = rng.choice([None, torch.randint(3, (case.batch,))])
                cache.reset(padding)
                ids = subject.ids[:, :0]


# --- the tests


CHECKS = (
    check_any_split_equals_one_pass,
    check_columns_hold_what_their_positions_say,
    check_unused_columns_do_not_leak,
    check_a_broken_step_leaves_no_trace,
    check_crop_equals_never_having_gone_on,
    check_select_continues_from_each_rows_history,
    check_reset_equals_a_new_cache,
    check_bytes_scale_with_key_value_heads,
    check_unsupported_operations_say_so,
    check_bytes_are_those_of_the_storages,
    check_predicted_bytes_are_those_allocated,
    check_a_full_cache_refuses,
    check_only_what_was_written_is_committed,
    check_a_long_random_history,
)
every_check = pytest.mark.parametrize(
    "check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_")
)


@every_case
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@every_check
def test_promise(check: Callable[[Make, Case], None], make: Any, case: Case) -> None:
    recompute = getattr(make, "recompute", False)
    if check is check_columns_hold_what_their_positions_say and recompute:
        check = check_a_cache_without_columns_says_so
    check(make, case)


@every_case
@pytest.mark.parametrize("kind", COMPILABLE)
def test_promise_of_compilable_kinds(kind: str, case: Case) -> None:
    check_device_work_needs_no_host(cache_class(kind), case)
