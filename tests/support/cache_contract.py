"""The kinds of cache that are held against the contract, and its checks."""

from __future__ import annotations

from functools import partial

from cache_checks import (
    check_a_broken_step_leaves_no_trace,
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
    check_only_what_was_written_is_committed,
    check_predicted_bytes_are_those_allocated,
    check_unsupported_operations_say_so,
)
from helpers import Make
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
