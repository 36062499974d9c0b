"""The words and figures that bench's tables and sentences share."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float | None, scale: float, form: str, unit: str = "") -> str:
    """A figure for the table; a dash if it was not measured."""
    return "-" if value is None else f"{value * scale:{form}}{unit}"


def tokens(n: int) -> str:
    """A number of tokens in words.

    >>> tokens(1), tokens(1000)
    ('1 token', '1,000 tokens')
    """
    return f"{n:,} token{'s' if n != 1 else ''}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def seconds(value: float) -> str:
    """An estimate, with no more digits than it has.

    >>> seconds(134.21), seconds(3.2345), seconds(0.01234)
    ('134 s', '3.2 s', '0.012 s')
    """
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"


def verb(names: Sequence[str], forms: str) -> str:
    """The form of a verb that fits one name, or several: "pays|pay"."""
    return forms.split("|")[len(names) > 1]


def brief(names: list[str], every: dict[str, list[str]]) -> list[str]:
    """Names, in which a kind stands for all of its names, or all but one, if these are more than
    two.

    >>> every = {"static": ["1 static", "2 static", "3 static"], "paged": ["1 paged", "2 paged"]}
    >>> brief(["1 static", "2 static", "3 static", "2 paged"], every)
    ['every static', '2 paged']
    >>> brief(["1 static", "3 static"], every), brief(["1 paged"], every)
    (['1 static', '3 static'], ['1 paged'])
    >>> every["static"].append("4 static")
    >>> brief(["1 static", "2 static", "4 static"], every)
    ['every static but 3 static']
    """
    found = list(names)
    for kind, own in every.items():
        here, others = (
            [name for name in own if (name in names) == inside] for inside in (True, False)
        )
        if len(here) > 2 and len(others) < 2:
            found[found.index(here[0])] = " but ".join([f"every {kind}", *others])
            found = [name for name in found if name not in own]
    return found
