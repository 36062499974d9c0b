"""A small decoder behind every interface that people give theirs, and bugs to plant in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.verify.judge import Case, Finding, Judge
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.target.doctor import examine
from kvtool.core.verify.target.subject import TargetSubject

VOCAB, CONTEXT, LAYERS, HEADS, WIDTH = 19, 64, 2, 2, 16


def judged(decoder: Any, scenario: str = "decode") -> Finding:
    """What the check says of a decoder in one scenario."""
    return Judge(TargetSubject(decoder, "it"), examine).judge(Case(SCENARIOS[scenario]))


Pair = tuple[Tensor, Tensor]  # keys and values (B,H,S,D)
Update = Callable[[int, Tensor, Tensor], Pair]  # a layer's new keys and values -> all of them


class Attention(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads = layer, HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, update: Update) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        k, v = update(self.layer, k, v)
        n, total = q.shape[2], k.shape[2]
        seen = torch.ones(n, total, dtype=torch.bool).tril(total - n)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(layer)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, update: Update) -> Tensor:
        x = x + self.attention(self.norm1(x), update)
        return x + self.mlp(self.norm2(x))


class Core(nn.Module):
    """What all have in common; subclasses add `forward`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vocab_size, self.context = VOCAB, CONTEXT
        self.tokens, self.pos_embedding = nn.Embedding(VOCAB, WIDTH), nn.Embedding(200, WIDTH)
        self.blocks = nn.ModuleList(Block(i) for i in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def run(self, ids: Tensor, positions: Tensor, update: Update) -> Tensor:
        x = self.tokens(ids) + self.pos_embedding(positions)
        for block in self.blocks:
            x = block(x, update)
        return self.head(self.norm(x))


def joined(past: Any, new: list[Pair]) -> Update:
    """Joins new keys and values to a past of pairs, or of nothing, and keeps the result."""

    def update(layer: int, k: Tensor, v: Tensor) -> Pair:
        if past and past[layer] is not None:
            k, v = torch.cat([past[layer][0], k], 2), torch.cat([past[layer][1], v], 2)
        new.append((k, v))
        return k, v

    return update


def length(past: Any) -> int:
    return past[0][0].shape[2] if past and past[0] is not None else 0


def after(past: Any, ids: Tensor) -> Tensor:
    return torch.arange(length(past), length(past) + ids.shape[1])


# Modules


class Pairs(Core):
    """forward(ids, cache=None) -> (logits, cache)"""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        new: list[Pair] = []
        return self.run(ids, after(cache, ids), joined(cache, new)), new


class Flagged(Core):
    """Logits alone, or with the cache if `use_cache`."""

    def forward(self, x: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        new: list[Pair] = []
        logits = self.run(x, after(past_key_values, x), joined(past_key_values, new))
        return (logits, tuple(new)) if use_cache else logits


class Named(Core):
    """An output with .logits and .past_key_values."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: Any = None) -> Any:
        new: list[Pair] = []
        logits = self.run(
            input_ids, after(past_key_values, input_ids), joined(past_key_values, new)
        )
        return SimpleNamespace(logits=logits, past_key_values=new if use_cache else None)


class InDict(Core):
    def forward(self, ids: Tensor, kv_cache: Any = None) -> Any:
        new: list[Pair] = []
        logits = self.run(ids, after(kv_cache, ids), joined(kv_cache, new))
        return {"logits": logits, "kv_cache": new}


class WithLoss(Core):
    """(logits, loss, cache), and a required argument that is of no use here."""

    def forward(self, ids: Tensor, targets: Any, past: Any = None) -> Any:
        new: list[Pair] = []
        return self.run(ids, after(past, ids), joined(past, new)), None, new


class LastOnly(Core):
    """Logits of the last token alone."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        new: list[Pair] = []
        return self.run(ids, after(cache, ids), joined(cache, new))[:, -1], new


class GivenPositions(Core):
    def forward(self, ids: Tensor, position_ids: Tensor, cache: Any = None) -> Any:
        new: list[Pair] = []
        return self.run(ids, position_ids, joined(cache, new)), new


class GivenStart(Core):
    """An int where the tokens start, of a name that may as well mean a tensor."""

    def forward(self, ids: Tensor, pos, cache: Any = None) -> Any:  # type: ignore[no-untyped-def]
        new: list[Pair] = []
        positions = torch.arange(ids.shape[1]) + pos
        return self.run(ids, positions, joined(cache, new)), new


class FilledList(Core):
    """A list that the module fills, one entry a layer."""

    def forward(self, ids: Tensor, cache: list[Any] | None = None) -> Tensor:
        new: list[Pair] = []
        past = list(cache) if cache else None
        logits = self.run(ids, after(past, ids), joined(past, new))
        if cache is not None:
            cache[:] = new
        return logits


class PerLayer(Core):
    """A list with None for each layer."""

    def forward(self, ids: Tensor, caches: Any) -> Any:
        new: list[Pair] = []
        past = [None] * LAYERS if caches is None else caches
        assert len(past) == LAYERS
        return self.run(ids, after(past, ids), joined(past, new)), (new if caches else None)


class Buffers:
    """Keys and values of fixed size, changed in place."""

    def __init__(self, batch: int, max_len: int, dtype: torch.dtype) -> None:
        shape = (LAYERS, 2, batch, HEADS, max_len, WIDTH // HEADS)
        self.kv = torch.zeros(shape, dtype=dtype)
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        end = self.length + k.shape[2]
        self.kv[layer, 0, :, :, self.length : end] = k
        self.kv[layer, 1, :, :, self.length : end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def crop(self, length: int) -> None:
        self.length = length

    def reset(self) -> None:
        self.length = 0

    def select(self, rows: Tensor) -> None:
        self.kv = self.kv[:, :, rows]


class MadeCache(Core):
    """new_cache(batch, max_len) makes a cache that is changed in place."""

    def new_cache(self, batch: int, max_len: int) -> Buffers:
        return Buffers(batch, max_len, self.head.weight.dtype)

    def forward(self, ids: Tensor, cache: Buffers | None = None, start_pos: int = 0) -> Tensor:
        update = (lambda layer, k, v: (k, v)) if cache is None else cache.update
        logits = self.run(ids, torch.arange(start_pos, start_pos + ids.shape[1]), update)
        if cache is not None:
            cache.length += ids.shape[1]
        return logits


class NeedsCache(Core):
    """Cannot go without a cache, and finds its positions in it."""

    def init_cache(self, batch_size: int, max_seq_len: int, dtype: torch.dtype) -> Buffers:
        return Buffers(batch_size, max_seq_len, dtype)

    def forward(self, ids: Tensor, cache: Buffers) -> tuple[Tensor, Buffers]:
        end = cache.length + ids.shape[1]
        logits = self.run(ids, torch.arange(cache.length, end), cache.update)
        cache.length = end
        return logits, cache


class OwnCaches(Core):
    """setup_caches() makes caches inside the module, which input_pos says to use."""

    caches: Buffers | None = None

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        self.caches = Buffers(max_batch_size, max_seq_length, self.head.weight.dtype)

    def forward(self, ids: Tensor, input_pos: Tensor | None = None) -> Tensor:
        if input_pos is None:
            return self.run(ids, torch.arange(ids.shape[1]), lambda layer, k, v: (k, v))
        assert self.caches is not None
        self.caches.length = int(input_pos[0])
        return self.run(ids, input_pos, self.caches.update)


SHAPES: dict[str, type[Core]] = {
    shape.__name__: shape
    for shape in (
        Pairs, Flagged, Named, InDict, WithLoss, LastOnly, GivenPositions, GivenStart, FilledList,
        PerLayer, MadeCache, NeedsCache, OwnCaches,
    )
}  # fmt: skip


# Objects of the protocol


class Stepper:
    """full and step, on a state that is changed in place."""

    vocab_size, context = VOCAB, CONTEXT

    def __init__(self, core: Core | None = None) -> None:
        self.core = core or Core()

    def full(self, ids: Tensor) -> Tensor:
        return self.core.run(ids, torch.arange(ids.shape[1]), lambda layer, k, v: (k, v))

    def start(self, batch: int, capacity: int) -> Buffers:
        return Buffers(batch, capacity, self.core.head.weight.dtype)

    def positions(self, state: Buffers, n: int) -> Tensor:
        return torch.arange(state.length, state.length + n)

    def step(self, ids: Tensor, state: Buffers) -> tuple[Tensor, Buffers]:
        logits = self.core.run(ids, self.positions(state, ids.shape[1]), state.update)
        state.length += ids.shape[1]
        return logits, state

    def crop(self, state: Buffers, length: int) -> Any:
        state.crop(length)

    def select(self, state: Buffers, rows: Tensor) -> Any:
        state.select(rows)

    def reset(self, state: Buffers) -> Any:
        state.reset()
