"""For the tests of a decoder: assertions that show the evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtool.errors import CheckFailed

if TYPE_CHECKING:
    from kvtool.core.verify.api import Verification


def assert_cache_matches(model: Any, ids: Any = None, **options: Any) -> None:
    """Raise AssertionError, with the evidence, unless a decoder's cache is right.

    model, ids and options as for kvtool.verify.

    >>> def test_my_cache():
    ...     assert_cache_matches(my_decoder.build())
    """
    __tracebackhide__ = True  # pytest then points at the test, not here
    from kvtool.core.verify.api import verify

    try:
        report = verify(model, ids=ids, **options)
    except CheckFailed as error:
        raise AssertionError(str(error)) from error
    if not report.ok:
        raise AssertionError(report.failure)


def assert_right(verification: Verification) -> None:
    """Raise AssertionError, the verdict first and then the evidence, unless it is right.

    >>> def test_my_cache(kvtool_verify):
    ...     assert_right(kvtool_verify(my_decoder.build()))
    """
    __tracebackhide__ = True
    if not verification.ok:
        raise AssertionError(f"{verification.verdict}\n{verification.failure}")
