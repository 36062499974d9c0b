"""A quantized cache goes back as far as its residual allows, and a broken step leaves no trace."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_checks import check_any_part_of_a_chunk_is_committed
from helpers import PADDED, PLAIN, Subject, addresses, agree, break_off, storage_nbytes, write
from kvtool.core.cache.quantized import Int4Cache
from kvtool.errors import CacheOpUnsupported
from quantized_cases import filled, small4, small8

# --- going back


def test_a_crop_that_leaves_the_residual_behind_what_is_quantized_is_honoured() -> None:
    subject = Subject(PLAIN, 30)
    for length in (9, 10, 11, 12, 13):
        cache = subject.filled(small4, 13)  # 8 are quantized
        if length < 10:
            with pytest.raises(CacheOpUnsupported):
                cache.crop(length)
            continue
        cache.crop(length)
        agree("crop", subject, cache, subject.ids, None, 3, length)


def test_a_refused_crop_names_the_token_and_the_slack_that_would_do() -> None:
    cache = filled(small4, 13)
    with pytest.raises(CacheOpUnsupported) as caught:
        cache.crop(7)
    assert caught.value.message == (
        "int4 cache cannot crop to 7: it needs token 4 exactly, and holds those before 8 quantized"
    )
    assert caught.value.hint == "Make it with slack=6, or crop before that is rounded."
    assert cache.length == 13
    subject = Subject(PLAIN, 30)
    enough = subject.filled(partial(Int4Cache, group=4, residual=2, slack=6), 13)
    enough.crop(7)
    agree("the hint", subject, enough, subject.ids, None, 2, 7)


@pytest.mark.parametrize("slack", [1, 3, 4, 9])
@pytest.mark.parametrize("case", [PLAIN, PADDED], ids=str)
def test_slack_allows_that_many_tokens_to_be_taken_back_at_any_length(
    case: Any, slack: int
) -> None:
    subject = Subject(case, 40)
    make = partial(Int4Cache, group=4, residual=2, slack=slack)
    for n in range(slack, 24):
        cache = subject.filled(make, n) if n else subject.cache(make)
        cache.crop(n - slack)
        assert cache.nbytes().allocated == storage_nbytes(cache)
        agree("slack", subject, cache, subject.ids[:, :30], subject.padding, 5, n - slack)


def test_without_a_residual_a_crop_to_the_end_of_a_group_needs_nothing_exactly() -> None:
    subject = Subject(PLAIN, 30)
    for length in (0, 4, 8):
        cache = subject.filled(partial(Int4Cache, group=4, residual=0), 14)
        cache.crop(length)
        agree("crop", subject, cache, subject.ids, None, 3, length)
    cache = subject.filled(partial(Int4Cache, group=4, residual=0), 14)
    for length in (3, 7, 11):
        with pytest.raises(CacheOpUnsupported, match="needs token"):
            cache.crop(length)


# --- broken steps and parts of steps


@pytest.mark.parametrize("case", [PLAIN, PADDED], ids=str)
@pytest.mark.parametrize("start", [0, 1, 9, 20])
def test_any_part_of_a_chunk_can_be_committed(case: Any, start: int) -> None:
    check_any_part_of_a_chunk_is_committed(small4, case, start)


def test_a_prompt_is_held_apart_until_it_is_committed_and_nothing_moves_to_another_address() -> (
    None
):
    cache = filled(small8, 20)
    before, where = cache.nbytes().allocated, addresses(cache)
    write(cache, 30, 2.0, commit=False)
    assert cache.nbytes().allocated == storage_nbytes(cache) > before
    cache.commit(30)
    write(cache, 1)
    assert cache.nbytes().allocated == storage_nbytes(cache) == before
    assert addresses(cache) == where


def test_a_broken_step_leaves_codes_as_they_were() -> None:
    subject = Subject(PLAIN, 40)
    cache = subject.filled(small4, 13)
    before = [t.clone() for t in cache.snapshot(0)]
    for n in (14, 21, 40):
        break_off(subject, cache, subject.ids[:, :n].flip(1), subject.model.norm)
        assert all(map(torch.equal, before, cache.snapshot(0)))
    agree("after broken steps", subject, cache, subject.ids, None, 4, 13)


def test_a_commit_that_runs_out_of_memory_has_moved_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = filled(small4, 13)
    write(cache, 3, commit=False)
    before = [t.clone() for t in (*cache._keys, *cache._values)]

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "empty_like", fail)
        cache.commit(3)
    assert all(map(torch.equal, before, (*cache._keys, *cache._values)))
