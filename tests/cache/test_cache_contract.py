"""The promises of docs/extending.md over every registered kind of cache.

cache_checks.py and cache_cost_checks.py have the checks; test_cache_controls.py holds them against
broken caches. I10 to I12 are about kinds of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cache_checks import (
    check_a_cache_without_columns_says_so,
    check_a_long_random_history,
    check_columns_hold_what_their_positions_say,
)
from cache_contract import CHECKS, KINDS, MAKES
from cache_cost_checks import (
    check_device_work_needs_no_host,
)
from helpers import CASES, Case, Make
from kvtool.core.cache import cache_class

COMPILABLE = [kind for kind in KINDS if cache_class(kind).compilable]

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def held_against() -> list[Any]:
    """Each check and kind with padding, and with one of the two cases without in turns, so that
    each kind and each check meets both; the random history, in which all operations come, with all.
    The same kinds with other settings meet these every other time: a setting changes where columns
    lie, which rows and heads only repeat."""
    found = []
    whole = [case for case in CASES if not case.padding]
    for i, check in enumerate(CHECKS):
        for j, (name, make) in enumerate(MAKES.items()):
            turns = whole if name in KINDS else [*whole, None, None]
            in_turn = turns[(i + j) % len(turns)]
            every = name in KINDS and check is check_a_long_random_history
            for case in CASES:
                if every or case.padding or case is in_turn:
                    said = f"{check.__name__.removeprefix('check_')}-{name}-{case}"
                    found.append(pytest.param(check, make, case, id=said))
    return found


@pytest.mark.parametrize(("check", "make", "case"), held_against())
def test_promise(check: Callable[[Make, Case], None], make: Any, case: Case) -> None:
    recompute = getattr(make, "recompute", False)
    if check is check_columns_hold_what_their_positions_say and recompute:
        check = check_a_cache_without_columns_says_so
    check(make, case)


@every_case
@pytest.mark.parametrize("kind", COMPILABLE)
def test_promise_of_compilable_kinds(kind: str, case: Case) -> None:
    check_device_work_needs_no_host(cache_class(kind), case)
