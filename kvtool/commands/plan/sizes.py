"""Sizes of memory as people write them, and as they are shown."""

from __future__ import annotations

import re
from fractions import Fraction

from kvtool.errors import UsageError
from kvtool.reading import quoted

UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
LARGEST = 2**63 - 1  # bytes
SPELLED = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?([A-Za-z]*)(/s)?")


def read_size(flag: str, text: str, per_second: bool = False) -> int:
    """Bytes: "24GiB", "24.5 GB" or "24000000000"; with `per_second` "300GB/s" too.

    Raises UsageError, with the units that are near.

    >>> read_size("--memory", "1.5KiB"), read_size("--bandwidth", "2MB/s", True)
    (1536, 2000000)
    """
    example = "300GB/s" if per_second else "24GiB"
    found = SPELLED.fullmatch(text.strip())
    if not found or (found[3] and not per_second):
        hint = "" if text.strip()[:1] != "-" else " above 0"
        raise UsageError(f"{flag}: {quoted(text)} is not a size{hint} (expected one as {example})")
    number, unit = found[1], found[2] or "B"
    if unit[-1] == "b" and unit[0].isupper():
        raise UsageError(
            f"{flag}: {quoted(unit)} counts bits (expected bytes, as {example})",
            f"Did you mean {number}{unit[:-1]}B{found[3] or ''}? 8 bits are a byte.",
        )
    known = next((name for name in UNITS if name.lower() == unit.lower()), None)
    if known is None:
        near, more = f"{unit[0].upper()}iB", found[3] or ""
        if per_second and unit[:2].upper() in UNITS:  # GBps
            near, more = unit[:2].upper(), "/s"
        hint = f"Did you mean {number}{near}{more}?" if near in UNITS else ""
        raise UsageError(
            f"{flag}: {quoted(unit)} is not a unit (expected one of {', '.join(UNITS)})", hint
        )
    nbytes = Fraction(number) * UNITS[known]
    if not 1 <= nbytes <= LARGEST:
        most = f"{LARGEST // UNITS['TiB']:,} TiB"
        raise UsageError(f"{flag}: {text} is out of range (expected 1 B to {most}, as {example})")
    return int(nbytes)


def shown(nbytes: int) -> str:
    """A size with three digits.

    >>> shown(1000), shown(131072), shown(24 * 2**30)
    ('1,000 B', '128 KiB', '24.0 GiB')
    """
    if nbytes < 10_000:
        return f"{nbytes:,} B"
    unit, size = next((u, s) for u, s in reversed(UNITS.items()) if nbytes >= s and "i" in u)
    value = nbytes / size
    digits = 0 if value >= 100 or (value == round(value) and value < 1) else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"
