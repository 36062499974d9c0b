"""What each kind of cache promises beyond the contract, and what all of them refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_contract import KINDS
from helpers import PADDED, PLAIN, Subject, addresses, agree, compilations, owned, write
from kvtool.core.cache import Bytes, CacheSpec, cache_class, make_cache
from kvtool.core.cache.base import EMPTY
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.cache_bytes import GRAIN
from kvtool.errors import CacheOpUnsupported, CapacityError, UsageError

SPEC = CacheSpec(2, 3, 2, 4, 200, torch.float64)


# --- what all kinds refuse


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_one_token_or_more(kind: str) -> None:
    for n in (0, -1):
        with pytest.raises(UsageError, match=f"1 token or more .found {n}"):
            make_cache(kind, SPEC).begin(n)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_cache_says_what_it_holds_and_what_would_be_needed(kind: str) -> None:
    cache = make_cache(kind, SPEC)
    write(cache, 190)
    n, held = (201, 0) if cache.recompute else (11, 190)
    with pytest.raises(CapacityError) as caught:
        cache.begin(n)
    assert caught.value.message == (
        f"{kind} cache is full: {held} tokens held and {n} new ones need 201 (capacity 200)"
    )
    assert "larger" in caught.value.hint


def test_an_unknown_kind_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"--cache: 'statik' .* Did you mean static"):
        make_cache("statik", SPEC)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_belongs_to_the_cache(kind: str) -> None:
    subject = Subject(PADDED)
    padding = subject.padding
    assert padding is not None
    cache = cache_class(kind)(subject.cache(cache_class(kind)).spec, padding)
    subject.padding = padding.clone()
    padding.fill_(1)
    agree("padding", subject, cache, subject.ids, subject.padding, 4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_column_that_does_not_exist_is_an_error_and_not_a_lost_token(kind: str) -> None:
    cache = make_cache(kind, dataclasses.replace(SPEC, capacity=4))
    step = cache.begin(1)
    k = torch.zeros(3, 2, 1, 4, dtype=torch.float64)
    for beyond in (step.slots + 4, step.slots - 1):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            cache.write(0, k, k, dataclasses.replace(step, slots=beyond))
    with pytest.raises(RuntimeError, match="same slice shapes"):
        cache.write(0, k[:2], k[:2], step)  # other rows
    with pytest.raises(RuntimeError, match="same dtype"):
        cache.write(0, k.float(), k.float(), step)  # another format


def test_a_model_refuses_a_cache_without_its_step() -> None:
    """It would overwrite the first tokens, and say nothing."""
    subject = Subject(PLAIN)
    with pytest.raises(ValueError, match="begin"):
        subject.model(subject.ids, cache=subject.cache(DynamicCache))


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding", "int8", "int4", "paged"])
def test_a_cache_that_is_used_again_allocates_nothing(kind: str) -> None:
    cache = make_cache(kind, SPEC)
    write(cache, 190)
    before = addresses(cache)
    cache.reset()
    assert addresses(cache) == before


# --- none


def test_no_cache_computes_the_whole_sequence_and_owns_nothing() -> None:
    cache = make_cache("none", SPEC)
    write(cache, 5)
    write(cache, 6)
    assert (cache.length, cache.nbytes(), list(owned(cache))) == (6, Bytes(0, 0, 0), [])
    step = cache.begin(7)
    assert step.q_pos.tolist() == [list(range(7))] * 3 and step.causal


# --- dynamic


def test_a_dynamic_cache_moves_a_few_times_only() -> None:
    cache = make_cache("dynamic", dataclasses.replace(SPEC, capacity=3000))
    sizes = []
    for _ in range(3000):
        cache.begin(1)
        cache.commit(1)
        sizes.append(cache.nbytes().allocated // cache.spec.token_nbytes)
    assert len(set(sizes)) < 12  # by half each time; by one grain each time would be 47
    assert all(size % GRAIN == 0 or size == 3000 for size in sizes)
    assert max(size / n for n, size in enumerate(sizes, 1) if n > GRAIN) < 2


def test_a_dynamic_cache_outlives_a_growth_that_ran_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = Subject(PLAIN, 80)
    cache = subject.filled(DynamicCache, 60)
    allocate, calls = Tensor.new_zeros, []

    def limited(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return allocate(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Tensor, "new_zeros", limited)
        cache.begin(20)
    agree("after MemoryError", subject, cache, subject.ids, subject.padding, 5, 60)


def test_a_prediction_ends_at_the_capacity() -> None:
    full = DynamicCache.predict_nbytes(SPEC, SPEC.capacity)
    assert DynamicCache.predict_nbytes(SPEC, SPEC.capacity + 1) == full


# --- static


def test_a_static_cache_has_no_room_for_more_rows_and_says_so() -> None:
    cache = make_cache("static", SPEC)
    with pytest.raises(CacheOpUnsupported, match=r"static cache cannot select 4 rows: .* for 3"):
        cache.select(torch.tensor([0, 1, 2, 0]))
    assert cache.batch == 3
    cache.select(torch.tensor([1]))
    cache.select(torch.tensor([0, 0, 0]))  # the room is still there


def test_a_static_cache_reads_whole_blocks() -> None:
    cache = StaticCache(SPEC, block=64)
    reached = []
    for _ in range(200):
        step = cache.begin(1)
        cache.commit(1)
        assert step.k_pos.shape[1] == step.mask.shape[-1]  # type: ignore[union-attr]
        assert int((step.k_pos[0] == EMPTY).sum()) == step.k_pos.shape[1] - cache.length
        reached.append(step.k_pos.shape[1])
    assert reached == [64] * 64 + [128] * 64 + [192] * 64 + [200] * 8


def test_a_static_cache_is_compiled_once_for_all_steps() -> None:
    subject = Subject(PLAIN)
    cache = subject.cache(lambda spec, padding: StaticCache(spec, padding, block=spec.capacity))
    before = addresses(cache)
    assert compilations(subject, cache) == 1
    assert addresses(cache) == before
    by_blocks = subject.cache(lambda spec, padding: StaticCache(spec, padding, block=4))
    assert compilations(subject, by_blocks) == 2  # columns 0..7 and 0..11


# --- left padding


@pytest.mark.parametrize("padding", [[2], [1, 0, 1], [-1, 0], [0.5, 1.0]])
def test_left_padding_is_a_number_of_tokens_for_each_row(padding: list[float]) -> None:
    spec = dataclasses.replace(SPEC, batch=2)
    with pytest.raises(UsageError, match="left padding must be"):
        make_cache("dynamic", spec, torch.tensor(padding))
    with pytest.raises(UsageError, match="left padding must be"):
        make_cache("dynamic", spec).reset(torch.tensor(padding))
