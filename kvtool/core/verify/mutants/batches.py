"""Planted bugs of classes 4, 5, 17 and 19: rows that mix or leave, padding behind a prompt."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kvtool.core.verify.mutants.mutant import Mutant
from kvtool.core.verify.mutants.user_decoder import (
    PLACES,
    Decoder,
    Fed,
    Flaw,
    Pair,
    UserCache,
    flawed,
)
from kvtool.core.verify.target.doctor import PADDING_COUNTED
from kvtool.core.verify.target.hypotheses import SelectFirst
from kvtool.core.verify.target.sight_rules import RULES, padding_of_another


def of_row(row: int) -> Flaw:
    """Every row reads the past of one row."""

    def past(pair: Pair, layer: int, fed: Fed) -> Pair:
        keys, values = (t[[row] * len(t)] for t in pair)
        return keys, values

    return flawed(past=past)


def of_the_row_before(pair: Pair, layer: int, fed: Fed) -> Pair:
    """In the last layer the rows are off by one."""
    keys, values = pair
    return keys, values.roll(1, dims=0) if layer else values


def of_first_rows(before: UserCache, right: UserCache, rows: Tensor) -> UserCache:
    """Where rows leave, the first ones stay in place of those that should."""
    if len(rows) == len(before.layers[0][0]):
        return right
    return replace(right, layers=[(k[: len(rows)], v[: len(rows)]) for k, v in before.layers])


def padding_kept(before: UserCache, right: UserCache, rows: Tensor) -> UserCache:
    """Padding stays with the place of a row, and does not go with its tokens."""
    return replace(right, padding=None if before.padding is None else before.padding[: len(rows)])


def values_kept(before: UserCache, right: UserCache, rows: Tensor) -> UserCache:
    """Where rows leave, the values are those of the first."""
    if len(rows) == len(before.layers[0][0]):
        return right
    pairs = zip(right.layers, before.layers, strict=True)
    layers = [(k, v[: len(rows)]) for (k, _), (_, v) in pairs]
    return replace(right, layers=layers)


def holes(fed: Fed) -> Tensor:
    """Which columns are padding behind a shorter prompt (B,S)."""
    return ~fed.real & (fed.real.cumsum(1) > 0)


def holes_seen(right: Tensor, fed: Fed) -> Tensor:
    """Behind the prompt, the padding that is not on the left is seen."""
    return right | holes(fed)[:, None] if fed.past else right


def holes_counted(right: Tensor, fed: Fed) -> Tensor:
    """Behind the prompt, positions count the padding that is not on the left."""
    return right + holes(fed)[:, : fed.past].sum(1, keepdim=True)


BATCHES = (
    Mutant(
        "every row reads the first row's past",
        decoder=lambda: Decoder(of_row(0)),
        bug_class=19, scenario="rows", step=1, layer=0, part="out input",
        hint="rows read each other: what row 0 was fed changes rows 1-2",
    ),
    Mutant(
        "values of the row before, in a layer",
        decoder=lambda: Decoder(flawed(past=of_the_row_before)),
        bug_class=19, scenario="rows", step=1, layer=1, part="out input",
        hint="rows read each other: what rows 0-2 were fed changes rows 0-2",
    ),
    Mutant(
        "a row leaves and the first ones stay",
        decoder=lambda: Decoder(flawed(selected=of_first_rows)),
        bug_class=17, scenario="leaving", step=3, layer=0, part="out input",
        hint=SelectFirst.hint,
    ),
    Mutant(
        "a row leaves, its values stay",
        decoder=lambda: Decoder(flawed(selected=values_kept)),
        bug_class=17, scenario="leaving", step=3,
    ),
    Mutant(
        "padding is not reordered",
        decoder=lambda: Decoder(flawed(selected=padding_kept)),
        bug_class=17, scenario="padded-rows", step=3, part="places input",
        hint=RULES[padding_of_another],
    ),
    Mutant(
        "padding after a prompt is seen",
        decoder=lambda: Decoder(flawed(mask=holes_seen)),
        bug_class=5, scenario="right-padded", step=1,
        hint="",
    ),
    Mutant(
        "padding after a prompt is counted",
        decoder=lambda: Decoder(flawed(places=holes_counted)),
        bug_class=4, scenario="right-padded", step=1, part="places input",
        hint=f"{PADDING_COUNTED} ({PLACES})",
    ),
)  # fmt: skip
