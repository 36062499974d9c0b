"""Which steps a check feeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvtool.core.verify import schedules
from kvtool.core.verify.schedules import LARGE_STEPS, SMALL_STEPS, THOROUGH, Bounds, Schedule

ALL = (schedules.prompts, schedules.steps, schedules.boundaries, schedules.long)
TINY, WIDE = Bounds(512), Bounds(2048)


def fed(limits: Bounds) -> list[tuple[int, int]]:
    """Each step as its past and its size."""
    found = []
    for make in ALL:
        for schedule in make(limits):
            past = 0
            for n in schedule:
                found.append((past, n))
                past += n
    return found


@pytest.mark.parametrize("limits", [TINY, WIDE, Bounds(160)], ids=lambda x: str(x.reach))
def test_every_size_is_fed_as_a_prompt_and_behind_short_and_long_pasts(limits: Bounds) -> None:
    pasts: dict[int, set[int]] = {}
    for past, n in fed(limits):
        pasts.setdefault(n, set()).add(past)
    for n in (*SMALL_STEPS, *LARGE_STEPS):
        if n + limits.reach // 2 > limits.reach:
            continue
        assert 0 in pasts[n] and any(0 < past <= 40 for past in pasts[n]), n
        assert any(past >= min(128, limits.reach // 2) for past in pasts[n]), n


def test_single_steps_of_one_and_several_are_fed_at_each_far_length() -> None:
    found = set(fed(WIDE))
    for n in (300, 512, 1000):
        assert {(n - 1, 1), (n, 1), (n + 1, 1)} <= found
        assert any(size > 2 for past, size in found if n < past <= n + 12)
    assert (2047, 1) in found
    assert any(past == 0 and 512 < size < 1000 for past, size in found)


@pytest.mark.parametrize("block", [16, 32, 64, 96, 128])
def test_steps_end_on_before_and_behind_a_block(block: int) -> None:
    ends = {(past + n, n > 1) for past, n in fed(TINY)}
    for end in (block - 1, block, block + 1):
        assert {(end, True), (end, False)} <= ends


@pytest.mark.parametrize("n", [5, 24, 200, 256])
def test_steps_surround_a_window_that_a_decoder_names(n: int) -> None:
    found = set(fed(Bounds(600, sizes=(n,))))
    prompts = {size for past, size in found if past == 0}
    assert {n - 1, n, n + 1, 2 * n} <= prompts
    assert any(past and size > n for past, size in found)
    assert {(n - 1, 1), (n, 1), (n + 1, 1), (2 * n - 1, 1), (2 * n, 1), (2 * n + 1, 1)} <= found


def test_sizes_that_are_the_context_are_not_surrounded() -> None:
    assert schedules.around(Bounds(64, sizes=(64, 1, 8))) == (8,)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("reach", [34, 64, 100, 330, 1100])
@pytest.mark.parametrize("level", [schedules.BRIEF, schedules.NORMAL, THOROUGH])
def test_no_history_is_longer_than_what_is_reached(
    make: Callable[[Bounds], list[Schedule]], reach: int, level: int
) -> None:
    found = make(Bounds(reach, sizes=(8, 30), level=level))
    assert found and all(0 < sum(schedule) <= reach for schedule in found)
    assert all(n > 0 for schedule in found for n in schedule)
    assert len(set(found)) == len(found)


def test_the_end_of_the_context_is_reached_exactly() -> None:
    assert sum(schedules.long(TINY)[0]) == 512
    assert schedules.long(TINY)[0][-1] == 1


def test_no_step_is_larger_than_a_decoder_takes() -> None:
    limits = Bounds(512, largest=16)
    assert max(n for _, n in fed(limits)) == 16
    assert any(past >= 300 for past, _ in fed(limits))


def test_a_decoder_of_single_steps_gets_long_prompts_and_steps_of_one() -> None:
    found = fed(Bounds(512, single=True))
    assert {n for past, n in found if past} == {1}
    assert {n for past, n in found if not past} >= {1, 2, 3, 16, 64, 129, 301}
    both = fed(Bounds(512, largest=16, single=True))
    assert {n for past, n in both if past} == {1} and max(n for _, n in both) == 16


def test_thorough_feeds_more_than_what_is_fed_by_default() -> None:
    limits = Bounds(1100, level=THOROUGH)
    assert {(past, n) for past in (16, 64, 300, 512) for n in SMALL_STEPS} <= set(fed(limits))
