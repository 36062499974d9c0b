"""Where two requests part: lengths of a shared prefix, at ends of an engine's blocks and beside.

Engines keep a prompt in blocks of 16 tokens or a multiple, and are wrong at the end of one, or one
token off, sooner than elsewhere. The lengths of a few requests cover these; the rest is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

MAX_BLOCK, MIN_BLOCK = 64, 16  # tokens of a block


class Kind(NamedTuple):
    """A length: so many tokens from the end of a block. A block of 0: any length."""

    block: int
    beside: int = 0


ANY = Kind(0)
# Two requests of a prompt, five prompts: most prompts have one at the end of a block of 32, so that
# what is wrong there is in the median over prompts too.
PAIRS = (
    (Kind(64), Kind(32, -1)), (Kind(32), ANY), (Kind(16), Kind(64, 1)), (Kind(64), ANY),
    (Kind(32), Kind(16, -1)),
)  # fmt: skip
SINGLES = (Kind(32, 1), Kind(64, -1), ANY, Kind(16, 1), Kind(32))  # one request of a prompt


def pair(number: int) -> tuple[Kind, Kind]:
    """The kinds of the two lengths of this prompt."""
    return PAIRS[number % len(PAIRS)]


def single(number: int, turn: int) -> Kind:
    """The kind of the one length of this prompt; arms differ by their turn."""
    return SINGLES[(number + turn) % len(SINGLES)]


def drawn(kind: Kind, possible: Sequence[int], draws: random.Random) -> int:
    """One of the possible lengths, of this kind if there are any, or of a smaller block.

    The end of a block of 16 or 32 tokens is one of no larger block, where there are such.

    >>> drawn(Kind(32, 1), range(25, 76), random.Random(0))
    33
    """
    block = kind.block
    while block >= MIN_BLOCK:
        if at := [i for i in possible if (i - kind.beside) % block == 0]:
            own = [i for i in at if block == MAX_BLOCK or (i - kind.beside) % (2 * block)]
            return draws.choice(own or at)
        block //= 2
    return draws.choice(possible)
