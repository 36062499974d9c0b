"""What was meant by a name that is not known: the suggestions in errors. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Collection

MIN_SHARED = 3  # letters of a beginning that is no accident


def nearest_names(name: str, choices: Collection[str], n: int = 3) -> list[str]:
    """At most `n` of `choices` that `name` may stand for, the likeliest first; [] for none.

    Better reasons hide worse ones: the same but for case, dashes and a plural; a beginning, either
    way; a word of it; similar letters.

    >>> nearest_names("--cache", ["--batch-size", "--caches", "--compare"])
    ['--caches']
    """
    wanted = _plain(name)
    plain = {choice: _plain(choice) for choice in choices}
    # A dash at the end says that the name goes on: --device- is --device-map too.
    whole = not name.endswith("-")
    same = [c for c, text in plain.items() if whole and _singular(text) == _singular(wanted)]
    begun = [choice for choice, text in plain.items() if _one_begins_the_other(text, wanted)]
    words = [choice for choice, text in plain.items() if _shares_a_word(text, wanted)]
    for found in (same, begun, words):
        if found and wanted:
            return sorted(found, key=lambda choice: _difference(plain[choice], wanted))[:n]
    by_letters = {text: choice for choice, text in reversed(plain.items())}
    return [by_letters[text] for text in difflib.get_close_matches(wanted, list(by_letters), n)]


def did_you_mean(names: Collection[str]) -> str:
    """The question at the end of an error; "" without names."""
    return f"Did you mean {' or '.join(names)}?" if names else ""


def _plain(name: str) -> str:
    return name.lower().strip("-_ ").replace("_", "-")


def _singular(text: str) -> str:
    return "-".join(word.removesuffix("s") for word in text.split("-"))


def _one_begins_the_other(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    return len(short) >= MIN_SHARED and long.startswith(short)


def _shares_a_word(text: str, wanted: str) -> bool:
    """Whether a word of one begins as a word of the other: `tok` is of `max-tokens`."""
    return any(
        _one_begins_the_other(_singular(a), _singular(b))
        for a in text.split("-")
        for b in wanted.split("-")
    )


def _difference(text: str, wanted: str) -> float:
    return 1.0 - difflib.SequenceMatcher(None, text, wanted).ratio()
