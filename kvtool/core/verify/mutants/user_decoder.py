"""A small decoder as users write them, right in plain PyTorch, and a `Flaw` to plant in its cache.

Caches of ours take no padding behind shorter prompts, and nobody saves them: bugs of these kinds,
and those that show at some ids, sizes or lengths alone, are planted here. They are judged as
`--target` judges, and named from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.core.verify.mutants.mutant import SIZES
from kvtool.core.verify.subject import Start

Pair = tuple[Tensor, Tensor]  # keys and values (B,H,S,D)
N_LAYERS, HEADS, WIDTH = 2, 2, 16
ROOM = 256  # tokens
PLACES = "places; nothing else is wrong"  # said where its positions alone are wrong


class Fed(NamedTuple):
    """One step: its ids (B,n), the number of tokens before it, and which columns are no padding
    (B,past+n)."""

    ids: Tensor
    past: int
    real: Tensor

    @property
    def n(self) -> int:
        """Tokens of the step."""
        return self.ids.shape[1]


class Flaw:
    """The hooks of a planted bug in a step; the defaults change nothing."""

    def places(self, right: Tensor, fed: Fed) -> Tensor:
        """The positions (B,n) of a step's tokens."""
        return right

    def mask(self, right: Tensor, fed: Fed) -> Tensor:
        """Which keys they see (B,n,past+n)."""
        return right

    def past(self, pair: Pair, layer: int, fed: Fed) -> Pair:
        """The keys and values that a layer reads of earlier steps."""
        return pair

    def stored(self, pair: Pair, layer: int, fed: Fed) -> Pair:
        """The keys and values of a step that are stored."""
        return pair

    def begun(self, held: UserCache) -> UserCache:
        """A session that begins."""
        return held

    def selected(self, before: UserCache, right: UserCache, rows: Tensor) -> UserCache:
        """The cache for `rows` (n,)."""
        return right

    def loaded(self, held: UserCache) -> UserCache:
        """The cache after it was saved and loaded."""
        return held


@dataclass
class UserCache:
    """The cache of a session: keys and values by layer, and the padding of each row."""

    layers: list[Pair]
    n: int = 0  # tokens, of which flaws make other positions
    padding: Tensor | None = None


class Attention(nn.Module):
    """Self-attention over what is held and what is new."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, past: Pair) -> tuple[Tensor, Pair]:
        """x (B,n,C), mask (B,n,S): of all keys, of which the last n are new."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        keys, values = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        seen = F.scaled_dot_product_attention(q, keys, values, mask[:, None])
        return self.out(seen.transpose(1, 2).flatten(2)), (k, v)


class Decoder(nn.Module):
    """The decoder of a user: `full` is always right, and steps have the flaw.

    window: tokens that a token sees, its own included. chunk: a token sees those of its chunk.
    0: all.
    """

    takes_padding = True
    config: Any = None  # where ids have a meaning

    def __init__(
        self, flaw: Flaw | None = None, window: int = 0, chunk: int = 0, context: int = ROOM
    ) -> None:
        super().__init__()
        self.flaw = flaw or Flaw()
        self.vocab_size, self.context = SIZES["vocab_size"], context
        self.window, self.chunk_size = window, chunk
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.table = nn.Embedding(self.vocab_size, WIDTH)
            self.places = nn.Embedding(context + 1, WIDTH)  # one more, for what stands too far
            self.layers = nn.ModuleList(Attention() for _ in range(N_LAYERS))
            self.head = nn.Linear(WIDTH, self.vocab_size)

    def full(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """Whole sequences (B,T) -> logits (B,T,V)."""
        return self.run(ids, self.empty(len(ids), padding), Flaw())[0]

    def start(self, batch: int, capacity: int, padding: Tensor | None = None) -> UserCache:
        """An empty cache."""
        return self.flaw.begun(self.empty(batch, padding))

    def step(self, ids: Tensor, state: UserCache) -> tuple[Tensor, UserCache]:
        """The next tokens (B,n) -> their logits (B,n,V), and the next state."""
        return self.run(ids, state, self.flaw)

    def crop(self, state: UserCache, length: int) -> UserCache:
        """Forget all but the first tokens."""
        layers = [(k[:, :, :length], v[:, :, :length]) for k, v in state.layers]
        return replace(state, layers=layers, n=length)

    def select(self, state: UserCache, rows: Tensor) -> UserCache:
        """Go on from the histories of `rows` (n,)."""
        padding = None if state.padding is None else state.padding[rows]
        layers = [(k[rows], v[rows]) for k, v in state.layers]
        return self.flaw.selected(state, UserCache(layers, state.n, padding), rows)

    def get_state(self, state: UserCache) -> UserCache:
        """What is saved."""
        return state

    def set_state(self, state: UserCache, saved: UserCache) -> UserCache:
        """The new state that is loaded from it."""
        return self.flaw.loaded(saved)

    def empty(self, batch: int, padding: Tensor | None) -> UserCache:
        """A cache that holds nothing."""
        nothing = self.table.weight.new_empty(batch, HEADS, 0, WIDTH // HEADS)
        return UserCache([(nothing, nothing)] * N_LAYERS, 0, padding)

    def run(self, ids: Tensor, state: UserCache, flaw: Flaw) -> tuple[Tensor, UserCache]:
        """A step with the flaw."""
        (batch, n), past = ids.shape, state.layers[0][0].shape[2]
        real = torch.ones(batch, past + n, dtype=torch.bool, device=ids.device)
        if state.padding is not None:
            real = Start(batch, 0, state.padding).real(0, past + n)
        fed = Fed(ids, past, real)
        places = flaw.places((real.cumsum(1) - 1).clamp(min=0)[:, past:] + state.n - past, fed)
        mask, layers = flaw.mask(self.seen(fed), fed), []
        x = self.table(ids) + self.places(places)
        for i, (layer, held) in enumerate(zip(self.layers, state.layers, strict=True)):
            answer, new = layer(x, mask, flaw.past(held, i, fed))
            x = x + answer
            kept = flaw.stored(new, i, fed)
            layers.append(
                (torch.cat([held[0], kept[0]], dim=2), torch.cat([held[1], kept[1]], dim=2))
            )
        return self.head(torch.tanh(x)), replace(state, layers=layers, n=state.n + n)

    def seen(self, fed: Fed) -> Tensor:
        """Which keys the tokens of a step see (B,n,past+n)."""
        key = torch.arange(fed.past + fed.n, device=fed.ids.device)[None]
        query = key[:, fed.past :].mT
        found = key <= query
        if self.window:
            found = found & (key > query - self.window)
        if self.chunk_size:
            found = found & (key // self.chunk_size == query // self.chunk_size)
        return found & fed.real[:, None] | (key == query)


def flawed(**changes: Callable[..., Any]) -> Flaw:
    """A flaw of which some methods are these functions."""
    flaw = Flaw()
    vars(flaw).update(changes)
    return flaw
