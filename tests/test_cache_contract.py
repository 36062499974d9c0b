"""The promises of DESIGN.md, section 3, over every registered kind of cache.

cache_checks.py and cache_cost_checks.py have the checks; test_cache_controls.py holds them against
broken caches. I10 to I12 are about kinds of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from cache_checks import (
    check_a_broken_step_leaves_no_trace,
    check_a_cache_without_columns_says_so,
    check_a_long_random_history,
    check_any_split_equals_one_pass,
    check_columns_hold_what_their_positions_say,
    check_crop_equals_never_having_gone_on,
    check_reset_equals_a_new_cache,
    check_select_continues_from_each_rows_history,
    check_unused_columns_do_not_leak,
)
from cache_cost_checks import (
    check_a_full_cache_refuses,
    check_bytes_are_those_of_the_storages,
    check_bytes_scale_with_key_value_heads,
    check_device_work_needs_no_host,
    check_only_what_was_written_is_committed,
    check_predicted_bytes_are_those_allocated,
    check_unsupported_operations_say_so,
)
from helpers import CASES, Case, Make
from kvtool import registry
from kvtool.core.cache import cache_class
from kvtool.core.cache.paged import PagedCache
from kvtool.core.cache.quantized import Int4Cache, Int8Cache
from kvtool.core.cache.sliding import SlidingCache

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
