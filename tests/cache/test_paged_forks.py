"""Rows and forks share pages, copy on write, and give back what only they used."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

from helpers import PADDED, PLAIN, Subject, agree, tokens, write
from kvtool.errors import UsageError
from paged_cases import FOURS, SPEC, check_contents, check_pages, put, tables

# --- sharing, and copies on write


def test_select_copies_no_token_and_a_write_only_pages_that_are_filled_in_part() -> None:
    cache = FOURS(dataclasses.replace(SPEC, batch=1), rows=4)
    write(cache, 10)
    cache.select(torch.tensor([0, 0, 0, 0]))
    assert cache.pool.n_live == 3 and len(set(map(tuple, cache._table))) == 1
    third = cache._table[0][2]
    write(cache, 1)
    assert cache.pool.n_live == 2 + 4
    assert [row[2] for row in cache._table].count(third) == 1  # one of the rows keeps it
    assert [row[:2] for row in cache._table] == [cache._table[0][:2]] * 4
    write(cache, 1)
    assert cache.pool.n_live == 2 + 4
    cache.select(torch.tensor([3, 3, 1, 0]))  # now all pages are full
    assert cache.pool.n_live == 2 + 3
    write(cache, 1)
    assert cache.pool.n_live == 2 + 3 + 4
    cache.select(torch.tensor([2]))
    assert cache.pool.n_live == 4
    check_pages(cache)


def test_a_page_copied_for_one_fork_is_not_copied_for_the_last_that_has_it() -> None:
    cache = FOURS(dataclasses.replace(SPEC, batch=1), rows=2)
    write(cache, 2, 1.0)
    before = tables(cache)
    fork = cache.fork()
    write(cache, 1, 2.0)
    assert tables(cache) != before and tables(fork) == before
    write(fork, 1, 3.0)
    assert tables(fork) == before and cache.pool.n_live == 2
    for one, last in ((cache, 2.0), (fork, 3.0)):
        assert one.snapshot(1)[0][0, 0, :, 0].tolist() == [1.0, 1.0, last]


def test_a_shared_page_that_was_cropped_into_is_copied_too() -> None:
    cache = FOURS(dataclasses.replace(SPEC, batch=1), rows=2)
    write(cache, 8, 1.0)
    fork = cache.fork()
    cache.crop(5)
    write(cache, 1, 2.0)
    assert fork.snapshot(0)[0][0, 0, :, 0].tolist() == [1.0] * 8
    assert cache.snapshot(0)[0][0, 0, :, 0].tolist() == [1.0] * 5 + [2.0]
    check_pages(cache, fork)


@pytest.mark.parametrize("case", [PLAIN, PADDED], ids=str)
@pytest.mark.parametrize("held", [6, 8])  # a page filled in part, and none
def test_a_fork_and_what_it_was_forked_from_go_their_own_ways(case: Any, held: int) -> None:
    subject = Subject(case, 20)
    cache = subject.cache(partial(FOURS, rows=20))
    agree("before", subject, cache, subject.ids[:, :held], subject.padding, 3)
    fork = cache.fork()
    as_they_are = torch.arange(case.batch)
    rows = as_they_are.flip(0)
    turned = fork.fork()
    turned.select(rows)
    histories = [(cache, as_they_are), (fork, as_they_are), (turned, rows)]
    ids = [subject.ids[:, :held][picked] for _, picked in histories]
    for seed, n in enumerate((1, 3, 1, 2)):  # by turns
        for i, (one, picked) in enumerate(histories):
            more = torch.cat([ids[i], tokens(case.batch, n, 10 * seed + i)], dim=1)
            padding = None if subject.padding is None else subject.padding[picked]
            agree(f"fork {i}", subject, one, more, padding, n, ids[i].shape[1])
            ids[i] = more
    check_pages(cache, fork, turned)  # type: ignore[arg-type]


def test_a_fork_in_the_middle_of_a_step_has_what_was_committed() -> None:
    cache = FOURS(SPEC, pages=40)
    put(cache, [[1.0, 2.0]] * 3, 2)
    step = cache.begin(5)
    fork = cache.fork()
    check_pages(cache, fork)
    assert [len(row) for row in fork._table] == [1, 1, 1]
    with pytest.raises(UsageError):
        fork.commit(1)
    put(fork, [[7.0]] * 3, 1)
    new = torch.full((3, 2, 5, 4), 9.0, dtype=torch.float64)
    for layer in range(2):
        cache.write(layer, new + layer, -new - layer, step)
    cache.commit(5)
    check_contents(fork, [[1.0, 2.0, 7.0]] * 3)
    check_contents(cache, [[1.0, 2.0] + [9.0] * 5] * 3)
    check_pages(cache, fork)


# --- who frees a fork


def test_a_forks_pages_go_back_with_its_last_reference() -> None:
    cache = FOURS(SPEC, rows=9)
    write(cache, 6)
    forks = [cache.fork(), copy.deepcopy(cache)]
    for fork in forks:
        write(fork, 5)
    assert cache.pool.n_live == 6 + 2 * 6  # each: a copy of a page, and a new one, in 3 rows
    again = fork
    del fork
    forks.clear()
    check_pages(cache, again)
    assert cache.pool.n_live == 6 + 6
    del again
    check_pages(cache)
    assert cache.pool.n_live == 6


def test_a_reset_gives_a_forks_pages_back_at_once() -> None:
    cache = FOURS(SPEC, rows=6)
    write(cache, 6)
    fork = cache.fork()
    write(fork, 5)
    fork.reset()
    assert cache.pool.n_live == 6 and fork.length == 0
    check_pages(cache, fork)


def test_a_fork_outlives_the_cache_that_it_was_forked_from() -> None:
    cache = FOURS(SPEC, rows=6)
    put(cache, [[1.0, 2.0, 3.0, 4.0, 5.0]] * 3, 5)
    fork = cache.fork()
    put(cache, [[6.0]] * 3, 1)
    del cache
    check_pages(fork)
    put(fork, [[7.0]] * 3, 1)
    check_contents(fork, [[1.0, 2.0, 3.0, 4.0, 5.0, 7.0]] * 3)
    assert fork.pool.n_live == 6
