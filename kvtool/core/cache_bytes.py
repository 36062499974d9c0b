"""What each kind of cache takes, in bytes, from sizes alone. Imports no torch.

The kinds predict by these rules what they will allocate, and `plan` asks them before torch is
loaded. A rule is of one layer: `rows` sequences of at most `capacity` tokens, of which `length` are
there, the first `prompt` of them in one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

GRAIN = 64  # columns; a dynamic cache grows to a multiple of it
PAGE = 16  # tokens
WINDOW, SINKS = 256, 4
GROUP, RESIDUAL = 32, 32  # KIVI has groups of 32 too, and a residual of 128 for longer texts


@dataclass(frozen=True)
class Kept:
    """What a layer keeps of a token: heads, and channels of a key and of a value in each.

    value_dim 0: values are the keys once more, as in latent attention. itemsize: bytes of a number.
    """

    n_heads: int
    key_dim: int
    value_dim: int
    itemsize: int

    @property
    def token(self) -> int:
        """Bytes of a token in a row."""
        return self.n_heads * (self.key_dim + self.value_dim) * self.itemsize

    def apart(self) -> Kept:
        """The same for a kind that stores values in another way than keys, and so cannot share."""
        return replace(self, value_dim=self.value_dim or self.key_dim)


class Held(NamedTuple):
    """Bytes that a layer's cache allocates, and those of what its tokens are, once each."""

    allocated: int
    live: int


def none(kept: Kept, rows: int, capacity: int, length: int, prompt: int = 1) -> Held:
    """Nothing is kept."""
    return Held(0, 0)


def grown_columns(columns: int, length: int, capacity: int) -> int:
    """How many columns a dynamic cache of `columns` has once it needs `length`."""
    return min(round_up(max(length, columns + columns // 2), GRAIN), capacity)


def dynamic(kept: Kept, rows: int, capacity: int, length: int, prompt: int = 1) -> Held:
    """It grows by half of its size."""
    columns = min(GRAIN, capacity)
    if prompt > columns:
        columns = grown_columns(columns, prompt, capacity)
    while columns < min(length, capacity):
        columns = grown_columns(columns, columns + 1, capacity)
    return Held(rows * columns * kept.token, rows * length * kept.token)


def static(kept: Kept, rows: int, capacity: int, length: int, prompt: int = 1) -> Held:
    """All is there from the start."""
    return Held(rows * capacity * kept.token, rows * length * kept.token)


def sliding_columns(capacity: int, window: int, sinks: int, slack: int) -> int:
    """How many columns a sliding cache has: those it keeps, one to write, and spare ones."""
    spare = -(-window // 8) - 1
    return min(sinks + window + slack + spare, capacity)


def sliding(
    kept: Kept,
    rows: int,
    capacity: int,
    length: int,
    prompt: int = 1,
    window: int = WINDOW,
    sinks: int = SINKS,
    slack: int = 0,
) -> Held:
    """The first few tokens and the last few; live are those that the next one sees."""
    columns = sliding_columns(capacity, window, sinks, slack)
    return Held(rows * columns * kept.token, rows * min(length, sinks + window - 1) * kept.token)


def n_quantized(n: int, group: int, residual: int) -> int:
    """How many of n tokens are quantized: whole groups, without the newest `residual`."""
    return max(n - residual, 0) // group * group


def channels(head_dim: int, group: int) -> int:
    """How many channels of a value share a scale."""
    return head_dim if head_dim % group else group


def exact_columns(capacity: int, group: int, residual: int, slack: int) -> int:
    """How many exact tokens are stored at most: those that wait to be quantized, and `slack`."""
    return min(residual + slack + group, capacity)


def packed(kept: Kept, n: int, bits: int, group: int) -> int:
    """Bytes of n quantized tokens of a row, a multiple of the group: codes, scales, zero points."""
    kept = kept.apart()
    codes = n * (kept.key_dim + kept.value_dim) * bits // 8
    of_keys = n // group * kept.key_dim
    of_values = n * (kept.value_dim // channels(kept.value_dim, group))
    return kept.n_heads * (codes + 2 * (of_keys + of_values) * kept.itemsize)


def quantized(
    bits: int,
    kept: Kept,
    rows: int,
    capacity: int,
    length: int,
    prompt: int = 1,
    group: int = GROUP,
    residual: int = RESIDUAL,
    slack: int = 0,
) -> Held:
    """Old tokens in codes of `bits` bits, and the newest exactly."""
    kept = kept.apart()
    room, n = (n_quantized(tokens, group, residual) for tokens in (capacity, length))
    exact = exact_columns(capacity, group, residual, slack) * kept.token
    return Held(
        rows * (exact + packed(kept, room, bits, group)),
        rows * (packed(kept, n, bits, group) + (length - n) * kept.token),
    )


int8, int4 = partial(quantized, 8), partial(quantized, 4)


def float8_token(kept: Kept) -> int:
    """Bytes of a token's codes, one for each number, and of a scale for each head."""
    scales = kept.itemsize * (2 if kept.value_dim else 1)
    return kept.n_heads * (kept.key_dim + kept.value_dim + scales)


def float8(kept: Kept, rows: int, capacity: int, length: int, prompt: int = 1) -> Held:
    """Numbers of 8 bits, all of it there from the start."""
    token = float8_token(kept)
    return Held(rows * capacity * token, rows * length * token)


def n_pages(tokens: int, page: int) -> int:
    """How many pages a row of so many tokens has."""
    return -(-tokens // page)


def paged(
    kept: Kept,
    rows: int,
    capacity: int,
    length: int,
    prompt: int = 1,
    page: int = PAGE,
    pages: int = 0,
) -> Held:
    """A pool of pages: as many as all rows may need, or `pages`."""
    pages = pages or rows * n_pages(capacity, page)
    return Held(pages * page * kept.token, rows * length * kept.token)


def round_up(n: int, block: int) -> int:
    """`n` rounded up to a multiple of `block`."""
    return -(-n // block) * block


# By kind, as in registry.CACHES.
RULES: dict[str, Callable[..., Held]] = {
    "none": none,
    "dynamic": dynamic,
    "static": static,
    "sliding": sliding,
    "int8": int8,
    "int4": int4,
    "fp8": float8,
    "paged": paged,
}
