"""What a window promises beyond the contract: what it keeps, evicts, refuses and costs."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_checks import check_any_part_of_a_chunk_is_committed
from helpers import (
    PADDED,
    PLAIN,
    Subject,
    addresses,
    advance,
    agree,
    break_off,
    full,
    storage_nbytes,
    write,
)
from kvtool.core.cache import EMPTY, Cache, CacheSpec, Step, make_cache
from kvtool.core.cache.none import NoCache
from kvtool.core.cache.sliding import SlidingCache
from kvtool.core.cache_bytes import sliding_columns
from kvtool.errors import CacheOpUnsupported, CapacityError, UsageError

SPEC = CacheSpec(2, 3, 2, 4, 200, torch.float64)
small = partial(SlidingCache, window=5, sinks=2)
wide = partial(SlidingCache, window=16, sinks=3, slack=2)  # moves its columns every other token


def held(cache: Cache, row: int = 0) -> list[int]:
    """The positions that a row holds, in the order of its columns."""
    return [p for p in cache.snapshot(0)[2][row].tolist() if p != EMPTY]


# --- the window


def test_a_window_counts_the_query_itself() -> None:
    for window in (1, 2, 5):
        cache = SlidingCache(SPEC, window=window, sinks=0)
        for n in range(12):
            step = cache.begin(1)
            write(cache, 1)
            k_pos = step.k_pos[0]
            seen = k_pos if step.mask is None else k_pos[step.mask[0, 0, 0]]
            assert seen.tolist() == list(range(max(0, n - window + 1), n + 1))


def test_a_window_changes_the_logits_and_one_token_more_or_less_does_too() -> None:
    """Or else a comparison under the wrong window would show nothing."""
    subject = Subject(PLAIN)
    cache = subject.cache(small)
    found = advance(subject.model, cache, subject.ids, 1)
    others = [
        full(subject.model, subject.ids, None, *rule) for rule in ((0,), (4, 2), (6, 2), (5,))
    ]
    assert all(float((found - other).abs().max()) > 1e-4 for other in others)
    assert torch.allclose(found, full(subject.model, subject.ids, None, 5, 2), atol=1e-12)


def test_a_whole_pass_has_a_mask_only_where_the_window_matters() -> None:
    assert Step.full(1, 5, window=5).causal and Step.full(1, 5, window=5).mask is None
    step = Step.full(1, 6, window=5, sinks=0)
    assert not step.causal and step.mask is not None
    assert step.mask[0, 0].sum(-1).tolist() == [1, 2, 3, 4, 5, 5]
    sunk = Step.full(1, 8, window=3, sinks=2).mask
    assert sunk is not None and sunk[0, 0, 7].nonzero().flatten().tolist() == [0, 1, 5, 6, 7]


@pytest.mark.parametrize("case", [PLAIN, PADDED], ids=str)
@pytest.mark.parametrize("make", [small, wide], ids=["small", "wide"])
@pytest.mark.parametrize("split", [(70,), (3, 43, 44, 70), (17, 20, 21, 41, 70)], ids=str)
def test_a_prompt_longer_than_the_window_sees_all_that_it_should(
    make: Any, case: Any, split: tuple[int, ...]
) -> None:
    """Storing a chunk before reading would overwrite what its first tokens see."""
    subject = Subject(case, 80)
    cache = subject.cache(make)
    ends = [*split, *range(71, 81)]
    agree(f"steps to {ends}", subject, cache, subject.ids, subject.padding, ends)


def test_sinks_survive_in_every_row_wherever_its_padding_ends() -> None:
    subject = Subject(PADDED, 40)
    cache = subject.cache(small)
    for end in range(1, 41):
        advance(subject.model, cache, subject.ids[:, :end], 1)
        for row, padding in enumerate(PADDED.padding):
            real = [p for p in held(cache, row) if p >= 0]
            assert real[:2] == list(range(end - padding))[:2]
            assert real[-4:] == list(range(end - padding))[-4:]


def test_columns_are_handed_out_in_ascending_order() -> None:
    cache = SlidingCache(SPEC, torch.tensor([0, 3, 9]), window=16, sinks=3, slack=2)
    for n in (5, 1, 1, 30, 1, 1, 1, 2, 1, 1, 7):
        step = cache.begin(n)
        for row in step.k_pos:
            positions = row[row != EMPTY]
            assert bool((positions.diff() == 1).logical_or(positions[:-1] < 3).all())
            assert bool((positions.diff() > 0).all())
        assert torch.equal(step.k_pos[:, -n:], step.q_pos)
        write(cache, n)


def test_a_token_is_moved_a_few_times_only() -> None:
    cache = SlidingCache(dataclasses.replace(SPEC, capacity=2000), window=64)
    firsts = []
    for _ in range(1000):
        write(cache, 1)
        firsts.append(cache._first)
    assert len(set(firsts)) == 1 + -(-(1000 - 71) // 8)  # every 8 tokens, once 71 are there


def test_a_step_that_nothing_hides_has_no_mask() -> None:
    cache = SlidingCache(SPEC, window=16, sinks=3)
    assert cache.begin(16).causal and not cache.begin(17).causal
    write(cache, 50)
    step = cache.begin(1)  # right after the columns have moved: sinks and window, and no more
    assert step.mask is None and step.k_pos.shape[1] == 3 + 16
    write(cache, 1)
    mask = cache.begin(1).mask
    assert mask is not None and int((~mask).sum()) == 3


# --- broken steps and parts of steps


def test_a_chunk_is_held_apart_until_it_is_committed() -> None:
    cache = SlidingCache(SPEC, window=5, sinks=2)
    write(cache, 20, 1.0)
    before, where = cache.nbytes().allocated, addresses(cache)
    stored = [t.clone() for t in (*cache._keys, *cache._values)]
    write(cache, 30, 2.0, commit=False)
    assert all(map(torch.equal, stored, (*cache._keys, *cache._values)))
    assert cache.nbytes().allocated == storage_nbytes(cache) > before
    cache.commit(30)
    assert cache.nbytes().allocated == storage_nbytes(cache) == before
    assert addresses(cache) == where
    keys, _, positions = cache.snapshot(1)
    assert positions[0].tolist() == [0, 1, 46, 47, 48, 49]
    assert keys[0, 0, :, 0].tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("case", [PLAIN, PADDED], ids=str)
@pytest.mark.parametrize("start", [0, 1, 9, 20])
def test_any_part_of_a_chunk_can_be_committed(case: Any, start: int) -> None:
    check_any_part_of_a_chunk_is_committed(small, case, start)


def test_a_broken_step_costs_no_token_that_crop_has_been_promised() -> None:
    subject = Subject(PLAIN, 40)
    make = partial(SlidingCache, window=5, sinks=2, slack=3)
    for n in (1, 9, 18):
        cache = subject.filled(make, 20)
        break_off(subject, cache, subject.ids[:, : 20 + n], subject.model.layers[1])
        cache.crop(17)
        agree("crop after a broken step", subject, cache, subject.ids, None, 3, 17)


def test_memory_that_runs_out_while_columns_move_costs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = Subject(PADDED, 40)
    original = {name: getattr(torch, name) for name in ("where", "empty_like")}
    for name in original:
        cache = subject.filled(wide, 22)
        calls: list[int] = []

        def limited(*args: Any, calls: list[int] = calls, name: str = name, **rest: Any) -> Tensor:
            calls.append(1)
            if len(calls) == (2 if name == "where" else 1):
                raise MemoryError
            return original[name](*args, **rest)

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(torch, name, limited)
            for end in range(23, 30):
                advance(subject.model, cache, subject.ids[:, :end], 1)
        agree(
            f"no memory for {name}", subject, cache, subject.ids, subject.padding, 2, cache.length
        )


# --- crop


@pytest.mark.parametrize("slack", [0, 1, 3, 8])
@pytest.mark.parametrize("case", [PLAIN, PADDED], ids=str)
def test_slack_tokens_can_be_cropped_at_any_length(case: Any, slack: int) -> None:
    subject = Subject(case, 40)
    make = partial(SlidingCache, window=5, sinks=2, slack=slack)
    for length in (3, 10, 23, 30):
        for chunk in (1, length):
            cache = subject.cache(make)
            advance(subject.model, cache, subject.ids[:, :length], chunk)
            kept = max(0, length - slack)
            cache.crop(kept)
            promise = f"{slack} of {length}"
            agree(promise, subject, cache, subject.ids, subject.padding, 1, kept)


def test_a_crop_that_cannot_be_honoured_says_why_and_what_to_do() -> None:
    cache = SlidingCache(SPEC, window=5, sinks=2, slack=3)
    write(cache, 21)
    with pytest.raises(CacheOpUnsupported) as caught:
        cache.crop(17)
    assert caught.value.message == (
        "sliding cache cannot crop to 17: it needs position 13 and holds from 14"
    )
    assert "slack=4" in caught.value.hint
    assert (caught.value.kind, caught.value.op) == ("sliding", "crop to 17")
    more = SlidingCache(SPEC, window=5, sinks=2, slack=4)
    write(more, 21)
    more.crop(17)  # as the hint says
    assert (cache.length, more.length) == (21, 17)


def test_positions_in_a_refusal_are_those_of_the_row_that_needs_the_most() -> None:
    cache = SlidingCache(SPEC, torch.tensor([2, 4, 3]), window=5, sinks=2, slack=3)
    write(cache, 23)
    with pytest.raises(CacheOpUnsupported, match=r"to 19: it needs position 13 and .* from 14"):
        cache.crop(19)
    cache.crop(20)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_text_that_the_sinks_hold_can_be_cropped_to(length: int) -> None:
    subject = Subject(PLAIN, 30)
    cache = subject.filled(small, 25)
    cache.crop(length)
    assert held(cache) == list(range(length))
    agree("in the sinks", subject, cache, subject.ids, None, 1, length)


def test_sinks_close_a_gap_that_would_be_refused_without_them() -> None:
    for sinks, honoured in ((2, True), (1, False)):
        cache = SlidingCache(SPEC, window=5, sinks=sinks)
        write(cache, 6)  # position 2 to 5, and the sinks
        if honoured:
            cache.crop(3)
            assert held(cache) == [0, 1, 2]
        else:
            with pytest.raises(CacheOpUnsupported, match="it needs position 1 and holds from 2"):
                cache.crop(3)


# --- bytes and capacity


def test_bytes_do_not_grow_beyond_the_window() -> None:
    spec = dataclasses.replace(SPEC, capacity=5000)
    cache = SlidingCache(spec, window=64, sinks=4, slack=6)
    sizes = set()
    for n in (1, 10, 300, *[1] * 200):
        write(cache, n)
        size = cache.nbytes()
        sizes.add(size.allocated)
        assert size.live <= size.allocated
        assert size.read_per_step <= size.allocated
    assert sizes == {(64 + 4 + 6 + 7) * spec.token_nbytes}  # an eighth of the window to spare
    options = {"window": 64, "sinks": 4, "slack": 6}
    assert sizes == {SlidingCache.predict_nbytes(spec, 5000, **options)}


def test_a_step_reads_what_is_said_to_be_read() -> None:
    cache = SlidingCache(SPEC, window=16, sinks=3, slack=2)
    for n in (1, 8, 8, *[1] * 20, 40, 1, 1):
        write(cache, n)
        read = cache.nbytes().read_per_step
        assert read == cache.begin(1).k_pos.shape[1] * SPEC.token_nbytes


def test_there_are_no_more_columns_than_the_capacity() -> None:
    for capacity in (1, 5, 7, 8, 100):
        cache = SlidingCache(dataclasses.replace(SPEC, capacity=capacity), window=5, sinks=2)
        columns = cache.nbytes().allocated // SPEC.token_nbytes
        assert columns == min(capacity, 7) == sliding_columns(capacity, 5, 2, 0)


@pytest.mark.parametrize("n", [6, 7, 8, 9])
def test_a_capacity_about_as_large_as_the_window_is_no_special_case(n: int) -> None:
    subject = Subject(PADDED, n)
    for chunk in (1, 3, n):
        agree("capacity", subject, subject.cache(small), subject.ids, subject.padding, chunk)


def test_the_capacity_bounds_the_text_and_not_the_columns() -> None:
    cache = SlidingCache(SPEC, window=5, sinks=2)
    write(cache, 150)
    write(cache, 50)
    with pytest.raises(CapacityError, match=r"sliding cache is full: 200 tokens held and 1 new"):
        cache.begin(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: 0 is too small"),
        ({"window": -3}, "window: -3 is too small"),
        ({"sinks": -1}, "sinks: -1 is too small"),
        ({"slack": -1}, "slack: -1 is too small"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SlidingCache(SPEC, **options)


def test_the_rows_of_a_select_keep_their_own_sinks_and_a_reset_brings_the_old_number_back() -> None:
    cache = SlidingCache(SPEC, torch.tensor([0, 3, 9]), window=5, sinks=2)
    write(cache, 10)
    cache.select(torch.tensor([2, 0, 0, 1]))
    rows = [held(cache, row) for row in range(4)]
    assert rows == [[-3, -2, -1, 0], [0, 1, 6, 7, 8, 9], [0, 1, 6, 7, 8, 9], [0, 1, 3, 4, 5, 6]]
    cache.reset()
    assert cache.begin(1).k_pos.shape[0] == 3


# --- whether equality proves anything


def test_a_window_that_never_evicted_says_that_equality_proves_nothing() -> None:
    cache = SlidingCache(SPEC, window=5, sinks=2)
    write(cache, 5)
    assert cache.vacuous() == "the window of 5 never evicted a token (5 tokens held)"
    write(cache, 1)
    write(cache, 1)
    assert cache._first == 2  # both of them are sinks
    assert cache.vacuous() is not None
    write(cache, 1)
    assert cache.vacuous() is None
    cache.crop(0)
    assert cache.vacuous() is None  # so far
    cache.reset()
    assert cache.vacuous() is not None


def test_padding_that_is_evicted_is_not_a_token() -> None:
    cache = SlidingCache(SPEC, torch.tensor([9, 8, 10]), window=5, sinks=2)
    write(cache, 14)
    assert cache._first == 10 and cache.vacuous() is not None
    write(cache, 1)
    write(cache, 1)
    assert cache._first == 11 and cache.vacuous() is None


def test_other_kinds_say_whether_they_store_anything() -> None:
    reason = "it stores nothing: every step computes the whole sequence again"
    assert NoCache(SPEC).vacuous() == reason
    for kind in ("dynamic", "static"):
        cache = make_cache(kind, SPEC)
        assert (cache.vacuous(), cache.window, cache.sinks) == (None, 0, 0)


def test_a_bug_of_each_kind_that_windows_had_is_seen() -> None:
    """The checks above can fail: off by one, dropped sinks, a store before the read."""

    class OneLess(SlidingCache):
        def _make_step(self, start: int, n_new: int) -> Step:
            self.window -= 1
            try:
                return super()._make_step(start, n_new)
            finally:
                self.window += 1

    class LosesSinks(SlidingCache):
        def _held_positions(self, end: int) -> Tensor:
            pos = super()._held_positions(end)
            return pos.masked_fill(pos == 0, EMPTY)

    class StoresFirst(SlidingCache):
        def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            n = min(k.shape[2], self._room)
            if n > 1:
                self._keys[layer][:, :, self._n_sinks : self._n_sinks + n] = k[:, :, -n:]
            return super().write(layer, k, v, step)

    subject = Subject(PLAIN, 30)
    for broken in (OneLess, LosesSinks, StoresFirst):
        cache = subject.cache(partial(broken, window=5, sinks=2))
        with pytest.raises(AssertionError, match="differ by"):
            agree("broken", subject, cache, subject.ids, None, 4)
