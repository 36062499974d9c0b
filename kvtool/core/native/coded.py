"""Keys and values that are codes, for compiled code: where they are, and made from exact ones."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from kvtool.core.native.arrays import Array, computed, kind_of


class Coded(NamedTuple):
    """A layer's codes of keys, or of values: what compiled/codes.py has in the same order."""

    codes: int  # the addresses of codes, scales and zero points
    scales: int
    zero_points: int
    length: int  # of how many tokens there are codes, and is there room for
    room: int
    form: int  # one of the following
    tokens: int  # how many tokens, or channels of a token, share a scale
    channels: int
    exact: int  # the column of exact ones in which the next token stands


BYTES, HALF_BYTES, FLOATS = 1, 2, 3
LENGTH, EXACT = map(Coded._fields.index, ("length", "exact"))


class Exact(NamedTuple):
    """Where exact keys and values of a step are: the addresses (2,layers) of (B,G,columns,D)."""

    addresses: Array
    columns: int
    padding: Array  # (B,)
    n_groups: int
    width: int
    dtype: torch.dtype


def round_groups(exact: Exact, column: int, first: int, n: int, coded: Array) -> None:
    """Make codes of n tokens of every layer, whole groups from number `first` on, which stand in
    columns from `column` on."""
    kind = kind_of(exact.dtype)
    _code().round_groups(
        exact.addresses, exact.columns, column, exact.padding, first, n, exact.n_groups,
        exact.width, coded, kind, computed(torch.empty(0, dtype=exact.dtype)),
    )  # fmt: skip


def move_columns(exact: Exact, first: int, n: int) -> None:
    """Move n columns from `first` on to the front, in every layer."""
    heads = len(exact.padding) * exact.n_groups
    kind = kind_of(exact.dtype)
    _code().move_columns(exact.addresses, exact.columns, first, n, heads, exact.width, kind)


@cache
def _code() -> ModuleType:
    """What a step in one call has loaded before it."""
    return importlib.import_module("kvtool.core.native.compiled.quantize")
