"""Checks of single values: each names the flag or field, and what it expects."""

from __future__ import annotations

from kvtool.errors import UsageError
from kvtool.reading import quoted
from kvtool.registry import split_kind

LARGEST_SIZE = 2**31 - 1
MAY_BE_0 = ("sinks", "residual")  # settings of cache kinds; of others 1 is the least


def check_int(flag: str, value: object, low: int, high: int = LARGEST_SIZE) -> None:
    """Raise UsageError, naming `flag`, unless `value` is an int within low..high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{flag}: {quoted(value)} is not a whole number")
    if value < low:
        raise UsageError(f"{flag}: {value} is too small (expected {low} or more)")
    if value > high:
        raise UsageError(f"{flag}: {value} is too large (expected {high} or less)")


def check_float(
    flag: str, value: object, low: float, high: float = float("inf"), open_low: bool = False
) -> None:
    """Raise UsageError, naming `flag`, unless `value` is a finite number within low..high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{flag}: {quoted(value)} is not a number")
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside or value in (float("inf"), float("-inf")):  # NaN fails both comparisons
        bound = f"above {low:g}" if open_low else f"{low:g} or more"
        limit = "" if high == float("inf") else f" and {high:g} or less"
        raise UsageError(f"{flag}: {value} is out of range (expected {bound}{limit})")


def check_bool(flag: str, value: object) -> None:
    """Raise UsageError, naming `flag`, unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{flag}: {quoted(value)} is not true or false")


def check_setting(flag: str, name: str, value: int) -> None:
    """Raise UsageError, naming `flag`, for a setting of a cache kind that is too small."""
    check_int(flag, value, 0 if name in MAY_BE_0 else 1)


def require_cache_kind(text: str, flag: str) -> str:
    """`text`, a cache kind, perhaps with settings. Raises UsageError with the nearest name, or for
    a setting that is too small."""
    kind, settings = split_kind(text, flag)
    for name, value in settings.items():
        check_setting(f"{flag}: {kind}: {name}", name, value)
    return text
