"""Planted bugs of classes 8, 9, 23 and 24: wrong at some sizes of steps, or from some length on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvtool.core.verify.diagnosis.hypotheses.positions import OneTooFar
from kvtool.core.verify.mutants.mutant import Mutant
from kvtool.core.verify.mutants.user_decoder import PLACES, Decoder, Fed, Flaw, Pair, flawed
from kvtool.core.verify.target.hypotheses import PastLost
from kvtool.core.verify.target.sight_rules import (
    AFTER,
    RULES,
    first_lost,
    no_causal,
    past_lost,
)
from kvtool.core.verify.target.sight_rules import stored_first as overwritten

When = Callable[[Fed], bool]


def prompt_of(sizes: Callable[[int], bool]) -> When:
    """Whether the first step has one of these sizes."""
    return lambda fed: not fed.past and sizes(fed.n)


def steps_of(sizes: Callable[[int], bool]) -> When:
    """Whether a step behind the first has one of these sizes."""
    return lambda fed: bool(fed.past) and sizes(fed.n)


def ending(ends: Callable[[int], bool]) -> When:
    """Whether a step behind the first ends at one of these lengths."""
    return lambda fed: bool(fed.past) and ends(fed.past + fed.n)


def shifted(when: When, by: int = 1) -> Flaw:
    """Positions of such steps are too far."""
    return flawed(places=lambda right, fed: right + by if when(fed) else right)


def seeing_more(when: When) -> Flaw:
    """Tokens of such steps see each other."""

    def mask(right: Tensor, fed: Fed) -> Tensor:
        whole = right.clone()
        whole[:, :, fed.past :] = True
        return whole if when(fed) else right

    return flawed(mask=mask)


def past_hidden(when: When) -> Flaw:
    """Tokens of such steps do not see the past."""

    def mask(right: Tensor, fed: Fed) -> Tensor:
        new = torch.arange(fed.past + fed.n, device=right.device) >= fed.past
        return right & new if when(fed) else right

    return flawed(mask=mask)


def last_kept(n: int, when: When) -> Flaw:
    """Of such a step the last n tokens alone are kept as they are: the others leave zeros."""

    def stored(pair: Pair, layer: int, fed: Fed) -> Pair:
        if not when(fed):
            return pair
        kept = torch.arange(fed.n, device=pair[0].device)[:, None] >= fed.n - n
        return pair[0] * kept, pair[1] * kept

    return flawed(stored=stored)


def windowed(window: int) -> Flaw:
    """The cache shows a window of another width, behind the first step."""
    flaw = Decoder(window=window)
    return flawed(mask=lambda right, fed: flaw.seen(fed) if fed.past else right)


def chunked(chunk: int) -> Flaw:
    """The cache shows chunks of another size, behind the first step."""
    flaw = Decoder(chunk=chunk)
    return flawed(mask=lambda right, fed: flaw.seen(fed) if fed.past else right)


def stored_first(window: int) -> Flaw:
    """A ring writes a step before it is read: what a long step overwrites is not seen."""

    def mask(right: Tensor, fed: Fed) -> Tensor:
        key = torch.arange(fed.past + fed.n, device=right.device)
        return right & (key >= fed.past + fed.n - window) if fed.past else right

    return flawed(mask=mask)


PROMPT, STEP, BOUNDARY, LONG = "prompts", "steps", "boundaries", "long"
LENGTHS = (
    Mutant(
        "a prompt beyond 64 keeps its last 64",
        decoder=lambda: Decoder(last_kept(64, prompt_of(lambda n: n > 64))),
        bug_class=23, scenario=PROMPT, step=13, layer=0, part="out input",
        hint="token 129 does not see tokens 0-64",
    ),
    Mutant(
        "a prompt of 3 loses its first token",
        decoder=lambda: Decoder(last_kept(2, prompt_of(lambda n: n == 3))),
        bug_class=23, scenario=PROMPT, step=4, layer=0, part="out input",
        hint=f"{RULES[first_lost]}{AFTER}",
    ),
    Mutant(
        "a draft of 3 has no causal mask",
        decoder=lambda: Decoder(seeing_more(steps_of(lambda n: n == 3))),
        bug_class=23, scenario=STEP, step=3, layer=0, part="0 input",
        hint=RULES[no_causal],
    ),
    Mutant(
        "drafts of 5 to 8 do not see the past",
        decoder=lambda: Decoder(past_hidden(steps_of(lambda n: 5 <= n <= 8))),
        bug_class=23, scenario=STEP, step=5, layer=0, part="0 input",
        hint=f"{RULES[past_lost]} (in steps of 5 tokens, and not of one)",
    ),
    Mutant(
        "steps of 16 and more are one too far",
        decoder=lambda: Decoder(shifted(steps_of(lambda n: n >= 16))),
        bug_class=23, scenario=STEP, step=14, part="places input",
        hint=f"positions are 1 too far in some steps (of 33 tokens) ({PLACES})",
    ),
    Mutant(
        "a ring of 32 shorter than a step",
        decoder=lambda: Decoder(stored_first(32), window=32),
        bug_class=9, scenario=STEP, step=8, layer=0, part="0 input",
        hint=RULES[overwritten],
    ),
    Mutant(
        "a window of 64 one too wide",
        decoder=lambda: Decoder(windowed(65), window=64),
        bug_class=8, scenario=BOUNDARY, step=3, layer=0, part="0 input",
        hint="the window is one token too wide: 65 tokens, not 64",
    ),
    Mutant(
        "chunks of 96 begin one too late",
        decoder=lambda: Decoder(chunked(97), chunk=96),
        bug_class=24, scenario=BOUNDARY, step=4, layer=0, part="0 input",
        hint="a chunk has 97 tokens through the cache, and 96 without it",
    ),
    Mutant(
        "a step that ends on 64 sees no past",
        decoder=lambda: Decoder(past_hidden(ending(lambda end: end == 64))),
        bug_class=24, scenario=BOUNDARY, step=7, layer=0, part="0 input",
        hint=f"{RULES[past_lost]} (in steps of 32 tokens, and not of one)",
    ),
    Mutant(
        "a window of 200 one too wide",
        decoder=lambda: Decoder(windowed(201), window=200, context=512),
        bug_class=8, scenario=BOUNDARY, step=18, layer=0, part="0 input",
        hint="the window is one token too wide: 201 tokens, not 200",
    ),
    Mutant(
        "positions slip from 300 on",
        decoder=lambda: Decoder(shifted(lambda fed: fed.past >= 300), context=420),
        bug_class=24, scenario=LONG, step=3, part="places input",
        hint=f"{OneTooFar.hint} ({PLACES})",
    ),
    Mutant(
        "positions slip from 1,000 on",
        decoder=lambda: Decoder(shifted(lambda fed: fed.past >= 1000), context=1040),
        bug_class=24, scenario=LONG, step=15, part="places input",
        hint=f"{OneTooFar.hint} ({PLACES})",
    ),
    Mutant(
        "the last token of the context sees no past",
        decoder=lambda: Decoder(past_hidden(ending(lambda end: end == 256))),
        bug_class=24, scenario=LONG, step=5, layer=0, part="0 input",
        hint=PastLost.hint,
    ),
)  # fmt: skip
