"""Planted bugs of classes 20 to 22: what is saved, what a request leaves, ids with a meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvtool.core.verify.mutants.mutant import SIZES, Mutant
from kvtool.core.verify.mutants.user_decoder import (
    PLACES,
    ROOM,
    Decoder,
    Fed,
    Flaw,
    Pair,
    UserCache,
    flawed,
)
from kvtool.core.verify.target.sight_rules import AFTER, ANOTHER_REQUEST

# Saved and loaded


def place_lost(held: UserCache) -> UserCache:
    """The position is not among what is saved."""
    return replace(held, n=0)


def values_of_first_layer(held: UserCache) -> UserCache:
    """Every layer is loaded with the values of the first."""
    return replace(held, layers=[(k, held.layers[0][1]) for k, _ in held.layers])


def newest_lost(held: UserCache) -> UserCache:
    """The newest token is not among what is saved."""

    def lost(t: Tensor) -> Tensor:
        return torch.cat([t[:, :, :-1], torch.zeros_like(t[:, :, -1:])], dim=2)

    return replace(held, layers=[(lost(k), lost(v)) for k, v in held.layers])


# A second request


class Remembers(Flaw):
    """Recognises a prompt by its first ids alone, and goes on from the tokens stored then.

    more: tokens at most that it takes beside those of the prompt.
    """

    BEGINNING = 4  # ids

    def __init__(self, more: int) -> None:
        self.more = more
        self.known: dict[tuple[Any, ...], Pair] = {}

    def stored(self, pair: Pair, layer: int, fed: Fed) -> Pair:
        if fed.past or fed.n < self.BEGINNING or len(fed.ids) > 1:
            return pair
        begins = (layer, pair[0].dtype, *fed.ids[0, : self.BEGINNING].tolist())
        keys, values = self.known.setdefault(begins, pair)
        if keys.shape[2] < fed.n:
            return pair
        return keys[:, :, : fed.n + self.more], values[:, :, : fed.n + self.more]


# Ids


def not_stored(which: Callable[[Tensor], Tensor]) -> Flaw:
    """Tokens that `which` (B,n) picks by their ids leave zeros in the cache."""

    def stored(pair: Pair, layer: int, fed: Fed) -> Pair:
        kept = ~which(fed.ids)[:, None, :, None]
        return pair[0] * kept, pair[1] * kept

    return flawed(stored=stored)


def repeated(ids: Tensor) -> Tensor:
    """Which ids are those of the token before, in their step."""
    return torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0))


def in_a_run(ids: Tensor) -> Tensor:
    """Which ids are the third of a run, in their step."""
    return repeated(ids) & repeated(ids).roll(1, dims=1)


END = 7  # an id with a meaning


def with_meaning(decoder: Decoder) -> Decoder:
    """A decoder whose configuration gives a meaning to an id."""
    decoder.config = SimpleNamespace(eos_token_id=END)
    return decoder


REQUESTS = (
    Mutant(
        "positions are not saved",
        decoder=lambda: Decoder(flawed(loaded=place_lost)),
        bug_class=20, scenario="saved", step=3, part="places input",
        hint=f"positions start at 0 again at step 3 ({PLACES})",
    ),
    Mutant(
        "loaded with the first layer's values",
        decoder=lambda: Decoder(flawed(loaded=values_of_first_layer)),
        bug_class=20, scenario="saved", step=3,
    ),
    Mutant(
        "the newest token is not saved",
        decoder=lambda: Decoder(flawed(loaded=newest_lost)),
        bug_class=20, scenario="saved", step=3, layer=0, part="out input",
        hint="token 13 does not see token 12",
    ),
    Mutant(
        "a longer prompt is taken for this one",
        decoder=lambda: Decoder(Remembers(ROOM)),
        bug_class=21, scenario="second-request", step=5, layer=0, part="out input",
        hint=f"{ANOTHER_REQUEST}{AFTER}",
    ),
    Mutant(
        "a known prefix is two tokens too long",
        decoder=lambda: Decoder(Remembers(2)),
        bug_class=21, scenario="second-request", step=5, layer=0, part="out input",
        hint=f"{ANOTHER_REQUEST}{AFTER}",
    ),
    Mutant(
        "an id with a meaning is not stored",
        decoder=lambda: with_meaning(Decoder(not_stored(lambda ids: ids == END))),
        bug_class=22, scenario="ids", step=1, layer=0, part="out input",
        hint="tokens with the id 7 are not seen after their step",
    ),
    Mutant(
        "id 0 is taken for padding",
        decoder=lambda: Decoder(not_stored(lambda ids: ids == 0)),
        bug_class=22, scenario="ids", step=2, layer=0, part="out input",
        hint="tokens with the id 0 are not seen after their step",
    ),
    Mutant(
        "the last id is not stored",
        decoder=lambda: Decoder(not_stored(lambda ids: ids == SIZES["vocab_size"] - 1)),
        bug_class=22, scenario="ids", step=6, layer=0, part="out input",
        hint="token 21 does not see token 20",
    ),
    Mutant(
        "a repeat is not stored",
        decoder=lambda: Decoder(not_stored(repeated)),
        bug_class=22, scenario="ids", step=1, layer=0, part="out input",
        hint="token 11 does not see token 9",
    ),
    Mutant(
        "a run is stored but for two",
        decoder=lambda: Decoder(not_stored(in_a_run)),
        bug_class=22, scenario="ids", step=4, layer=0, part="out input",
        hint="token 16 does not see token 15",
    ),
)  # fmt: skip
