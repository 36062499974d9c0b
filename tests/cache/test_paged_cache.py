"""What pages promise beyond the contract: who shares them, when they are copied and given back."""

from __future__ import annotations

import dataclasses
import random
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import (
    PADDED,
    PLAIN,
    Subject,
    addresses,
    agree,
    compilations,
    storage_nbytes,
    tokens,
    write,
)
from kvtool.core.cache import EMPTY, CacheSpec
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.paged import PagedCache, PagedStep, pages_for
from kvtool.core.decoding.beam import Beam, beam_search
from kvtool.core.decoding.engine import feed
from kvtool.core.kernels.exact import EXACT
from kvtool.errors import CapacityError, UsageError
from paged_cases import FOURS, SPEC, check_contents, check_pages, put, tables
from small_models import random_model

# --- I11


@pytest.mark.parametrize("seed", range(12))
def test_live_and_free_pages_are_the_pool_at_every_moment(seed: int) -> None:
    """A family of forks, against plain lists of the tokens of each row."""
    rng, number = random.Random(seed), count(1)
    page = rng.choice([1, 2, 3, 5])
    caches = [PagedCache(SPEC, page=page, pages=5 + 24 // page)]
    held: list[list[list[float]]] = [[[], [], []]]
    refused = 0
    for _ in range(150):
        i = rng.randrange(len(caches))
        cache, rows = caches[i], held[i]
        operation = rng.choice(["put"] * 5 + ["begin", "crop", "select", "fork", "drop", "reset"])
        if operation in ("put", "begin"):
            new = [[float(next(number)) for _ in range(n)] for n in [rng.randint(1, 4)] * len(rows)]
            commit = rng.randint(0, len(new[0])) if operation == "put" else 0
            before = tables(cache)
            try:
                if operation == "put":
                    put(cache, new, commit)
                    held[i] = [row + more[:commit] for row, more in zip(rows, new, strict=True)]
                else:
                    cache.begin(len(new[0]))
            except CapacityError:
                refused += 1
                n = -(-len(rows[0]) // page)
                assert [row[:n] for row in tables(cache)] == [row[:n] for row in before]
        elif operation == "crop":
            length = rng.randint(0, len(rows[0]))
            cache.crop(length)
            held[i] = [row[:length] for row in rows]
        elif operation == "select":
            picked = [rng.randrange(len(rows)) for _ in range(rng.randint(1, 4))]
            cache.select(torch.tensor(picked))
            held[i] = [list(rows[row]) for row in picked]
        elif operation == "fork" and len(caches) < 4:
            caches.append(cache.fork())
            held.append([list(row) for row in rows])
        elif operation == "drop" and len(caches) > 1:
            del caches[i], held[i]
        elif operation == "reset":
            cache.reset()
            held[i] = [[], [], []]
        del cache  # or else a dropped fork would live on
        check_pages(*caches)
        for j, expected in enumerate(held):
            check_contents(caches[j], expected)
    assert refused
    for cache in caches:
        cache.reset()
    assert caches[0].pool.n_free == caches[0].pool.n_pages


def test_a_row_takes_a_page_when_its_tokens_reach_it() -> None:
    cache, live = FOURS(SPEC), []
    for _ in range(9):
        write(cache, 1)
        live.append(cache.pool.n_live)
    assert live == [3] * 4 + [6] * 4 + [9]
    cache.crop(5)
    assert cache.pool.n_live == 6
    cache.crop(4)
    assert cache.pool.n_live == 3


def test_pages_of_tokens_that_are_not_committed_go_back() -> None:
    cache = FOURS(SPEC)
    write(cache, 20, commit=False)
    assert cache.pool.n_live == 15
    write(cache, 1, commit=False)  # starts over
    assert cache.pool.n_live == 3
    write(cache, 20, commit=False)
    cache.commit(5)
    assert cache.pool.n_live == 6
    write(cache, 9, commit=False)
    cache.select(torch.tensor([0]))
    assert cache.pool.n_live == 2


# --- no pages left


def test_a_pool_without_pages_refuses_with_the_numbers_and_changes_nothing() -> None:
    subject = Subject(PLAIN)
    cache: Any = subject.cache(partial(PagedCache, page=4, pages=5))
    agree("before", subject, cache, subject.ids[:, :6], None, 6)
    with pytest.raises(CapacityError) as caught:
        cache.begin(3)
    assert caught.value.message == (
        "paged cache has run out of pages: 6 tokens held in 2 rows and 3 new ones need 2 more "
        "pages of 4 tokens (1 of 5 are free)"
    )
    assert "pages" in caught.value.hint
    check_pages(cache)
    fork = cache.fork()
    with pytest.raises(CapacityError, match=r"need 2 more .*1 of 5 are free"):
        fork.begin(1)  # its two rows share their last pages with the cache
    check_pages(cache, fork)
    del fork
    agree("after refusals", subject, cache, subject.ids[:, :8], None, 2, 6)
    cache.select(torch.tensor([1]))
    agree("one row", subject, cache, subject.ids[1:], None, 3, 8)


def test_a_copy_for_which_there_is_no_memory_leaves_all_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = Subject(PLAIN)
    cache: Any = subject.cache(partial(FOURS, rows=4))
    agree("before", subject, cache, subject.ids[:, :6], None, 6)
    fork = cache.fork()
    before, select, calls = tables(cache), Tensor.index_select, count(1)

    def limited(self: Tensor, *args: Any) -> Tensor:
        if next(calls) == 3:
            raise MemoryError
        return select(self, *args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Tensor, "index_select", limited)
        cache.begin(2)
    assert tables(cache) == before
    check_pages(cache, fork)
    for one in (cache, fork):
        agree("after MemoryError", subject, one, subject.ids, None, 2, 6)


def test_settings_that_mean_nothing_are_refused() -> None:
    for settings in ({"page": 0}, {"rows": 0}, {"pages": -1}, {"page": 1.5}):
        with pytest.raises(UsageError, match=next(iter(settings))):
            PagedCache(SPEC, **settings)  # type: ignore[arg-type]


# --- what they cost


def test_forks_of_a_long_prompt_take_a_page_each() -> None:
    spec = CacheSpec(2, 1, 2, 4, 1100)
    paged, dynamic = PagedCache(spec, rows=2), DynamicCache(spec)
    for cache in (paged, dynamic):
        write(cache, 1000)
    live, allocated = paged.nbytes().live, paged.nbytes().allocated
    forks = [paged.fork() for _ in range(20)]
    assert paged.pool.n_live == 63
    for fork in forks:
        write(fork, 1)
    assert paged.pool.n_live == 63 + 20
    assert paged.nbytes() == (allocated, live, 63 * 16 * spec.token_nbytes)
    assert forks[0].nbytes().read_per_step == 2 * 63 * 16 * spec.token_nbytes  # gathered first
    copies = [dynamic.fork().nbytes().allocated for _ in range(20)]
    page = 16 * spec.token_nbytes
    assert 20 * page < sum(copies) / 50


def test_an_only_row_is_read_in_place_until_it_has_shared_a_page() -> None:
    cache = FOURS(dataclasses.replace(SPEC, batch=1), None, rows=3)
    write(cache, 6)

    def step_addresses() -> bool:
        step, s = cache.begin(1), cache.spec
        new = torch.ones(cache.batch, s.n_kv_heads, 1, s.head_dim, dtype=s.dtype)
        keys, _ = cache.write(0, new, new, step)
        cache.commit(1)
        return keys.untyped_storage().data_ptr() == cache.pool.keys[0].untyped_storage().data_ptr()

    assert step_addresses()
    cache.select(torch.tensor([0, 0]))
    assert not step_addresses()
    cache.select(torch.tensor([0]))  # whose last page is a copy at the end of the others
    assert not step_addresses()
    cache.reset()
    for _ in range(6):
        assert step_addresses() or cache.length == 1
    cache.crop(3)
    for _ in range(10):
        assert step_addresses(), cache.length


def test_bytes_tell_whether_the_next_token_will_find_its_pages_in_place() -> None:
    def pages_read(cache: PagedCache) -> int:
        told = cache.nbytes().read_per_step
        step = cache.begin(1)
        assert isinstance(step, PagedStep) and step.pages is not None
        assert cache.nbytes().read_per_step == told  # when it has begun, too
        cache.commit(0)
        read = step.pages.shape[1] * (2 if step.first is None else 1)
        assert told == read * 4 * cache.spec.token_nbytes
        return read

    found = []
    for length in (3, 6, 8):
        cache = FOURS(dataclasses.replace(SPEC, batch=1), None, rows=3)
        write(cache, length)
        found.append([pages_read(cache)])
        ahead = cache.fork()
        write(ahead, 1)  # on a copy of the last page, or on the page behind it
        found[-1].append(pages_read(cache))
        level = cache.fork()  # shares the last page
        found[-1].append(pages_read(cache))
        assert level.length == length
    assert found == [[1, 1, 1], [2, 2, 4], [3, 6, 6]]
    cache.begin(1)  # takes the page behind the fork's, is given up, and the fork's is free again
    del ahead
    assert pages_read(cache) == 3


def test_bytes_count_shared_tokens_once_and_the_whole_pool() -> None:
    cache = FOURS(dataclasses.replace(SPEC, batch=1), torch.tensor([1]), rows=3)
    token = cache.spec.token_nbytes
    write(cache, 6)
    assert cache.nbytes().live == 6 * token
    cache.select(torch.tensor([0, 0, 0]))
    assert cache.nbytes().live == 6 * token
    write(cache, 1)
    assert cache.nbytes().live == (4 + 3 * 3) * token
    assert cache.nbytes().allocated == 3 * 6 * 4 * token + 3 * 8 == storage_nbytes(cache)
    fork = cache.fork()
    assert fork.nbytes() == cache.nbytes()
    assert {t.data_ptr() for t in fork.pool.keys} == {t.data_ptr() for t in cache.pool.keys}
    # Pages are gathered, and what was gathered is read: 2 pages for the 8th token, 3 for the 9th.
    assert cache.nbytes().read_per_step == 2 * 3 * 8 * token
    write(cache, 1)
    assert cache.nbytes().read_per_step == 2 * 3 * 12 * token


def test_beams_share_the_prompt_and_find_what_others_find(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = random_model(0, torch.float64), []
    prompt = tokens(1, 40, 3)

    def make(kind: str, spec: CacheSpec) -> PagedCache:
        made.append(FOURS(spec))
        return made[-1]

    live: list[int] = []
    expected = beam_search(model, prompt, "dynamic", [9], Beam(4, n_best=4))
    with monkeypatch.context() as patch:
        patch.setattr("kvtool.core.decoding.beam.make_cache", make)
        tell = lambda nbytes: live.append(made[0].pool.n_live)  # noqa: E731
        found = beam_search(model, prompt, "paged", [9], Beam(4, n_best=4), on_step=tell)
    assert [h.ids for h in found[0]] == [h.ids for h in expected[0]]
    # One row reads the prompt, and one copy of it is held; five rows may write behind it.
    assert live[0] == 10 and 10 + 4 <= max(live[1:]) <= 10 + 5 * 3
    check_pages(made[0])


# --- what is read


def test_exact_kernels_give_the_bits_of_one_pass_from_pages_in_any_order() -> None:
    for page, dtype in ((1, torch.float32), (3, torch.float32), (16, torch.bfloat16)):
        model = random_model(0, dtype, positions="rotary", n_kv_heads=2)
        spec = CacheSpec.of(model.config, 3, 40, dtype, kernels=EXACT)
        cache = PagedCache(spec, page=page, rows=6)
        ids = tokens(3, 40, 1)
        with torch.no_grad():
            feed(model, cache, ids[:, :9])
            cache.select(rows := torch.tensor([2, 2, 0]))
            fork, ids = cache.fork(), torch.cat([ids[rows, :9], ids[:, 9:]], dim=1)
            found = [feed(model, cache, ids[:, :end]) for end in (10, 11, 17, 18, 33)]
            other = torch.cat([ids[:, :9], tokens(3, 5, 2)], dim=1)
            branch = feed(model, fork, other)
            found += [feed(model, cache, ids[:, :end]) for end in range(34, 41)]
            dynamic = DynamicCache(spec)
            expected = feed(model, dynamic, ids)
            dynamic.crop(9)
            assert torch.cat(found, dim=1).equal(expected[:, 9:]), page
            assert branch.equal(feed(model, dynamic, other)), page
        assert all(row != list(range(row[0], row[0] + len(row))) for row in cache._table)


def test_what_others_left_in_a_page_is_not_read_not_even_nan() -> None:
    subject = Subject(PADDED, 20)
    cache: Any = subject.cache(partial(FOURS, rows=6))
    fork = cache.fork()
    write(fork, 20, float("nan"))
    write(cache, 10, float("inf"), commit=False)
    del fork
    agree("beside NaN", subject, cache, subject.ids, subject.padding, [5, 6, 7, 13, 14, 20])


def test_a_first_step_reads_its_own_tokens_and_no_page() -> None:
    cache = FOURS(SPEC)
    k, v = torch.rand(2, 3, 2, 6, 4, dtype=torch.float64).unbind()
    step = cache.begin(6)
    assert step.causal and cache.write(0, k, v, step) == (k, v)
    assert step.k_pos.shape[1] == 6 and step.slots.shape == (3, 6)
    cache.commit(6)
    step = cache.begin(1)
    keys, _ = cache.write(0, k[:, :, :1], v[:, :, :1], step)
    assert keys.shape == (3, 2, 8, 4) and torch.equal(keys[:, :, :6], k)
    assert step.k_pos[0].tolist() == [0, 1, 2, 3, 4, 5, 6, EMPTY]


def test_a_slot_that_does_not_exist_is_an_error_and_not_a_lost_token() -> None:
    cache = FOURS(SPEC)
    step = cache.begin(1)
    k = torch.zeros(3, 2, 1, 4, dtype=torch.float64)
    beyond = step.slots + 4 * cache.pool.n_pages
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cache.write(0, k, k, dataclasses.replace(step, slots=beyond))
    with pytest.raises((IndexError, RuntimeError), match="Number of indices"):
        cache.write(0, k[:2], k[:2], step)  # other rows
    with pytest.raises(RuntimeError, match="same dtype"):
        cache.write(0, k.float(), k.float(), step)  # another format


def test_a_paged_cache_is_compiled_once_for_all_steps_of_a_page() -> None:
    subject = Subject(PLAIN)
    for page, times in ((12, 1), (4, 2)):  # columns 0..11; 0..7 and 0..11
        cache = subject.cache(partial(PagedCache, page=page))
        before = addresses(cache)
        assert compilations(subject, cache) == times
        assert addresses(cache) == before


def test_a_check_in_which_no_row_has_two_pages_says_that_it_proves_nothing() -> None:
    cache = PagedCache(SPEC)
    write(cache, 16)
    assert cache.vacuous() == "no row needed a second page of 16 tokens (16 tokens held)"
    write(cache, 1)
    cache.crop(0)
    assert cache.vacuous() is None
    assert PagedCache.small["page"] < 11 and pages_for(SPEC, 5) == 3 * 5


def test_the_example_of_the_documentation_is_what_happens() -> None:
    cache = PagedCache(dataclasses.replace(SPEC, batch=2), page=2)
    write(cache, 3)
    assert cache._table == [[0, 1], [2, 3]]
    cache.select(torch.tensor([0, 0]))
    assert cache._table == [[0, 1], [0, 1]] and not cache.pool.users[2] + cache.pool.users[3]
    write(cache, 1)
    assert cache._table == [[0, 2], [0, 1]]
