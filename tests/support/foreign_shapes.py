"""Decoders that are called as public ones are, whatever their files are named: small imitations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from decoder_shapes import LAYERS, Buffers, Core, Pair, after, joined, length


class KVCache:
    """A cache whose class the decoder's file knows, and the decoder does not build."""

    def __init__(self, n_layers: int) -> None:
        self.pairs: list[Any] = [None] * n_layers

    def reset(self) -> None:
        self.pairs = [None] * len(self.pairs)


class StartPos(Core):
    """forward(tokens, start_pos): buffers in the module, without a method to set them up."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers_of = Buffers(4, self.context, self.head.weight.dtype)

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        b, n = tokens.shape
        cache = self.buffers_of
        cache.kv = cache.kv.to(self.head.weight.dtype)
        cache.length = start_pos

        def update(layer: int, k: Tensor, v: Tensor) -> Pair:
            cache.kv[layer, :, :b, :, start_pos : start_pos + n] = torch.stack([k, v])
            k, v = cache.kv[layer, :, :b, :, : start_pos + n]
            return k, v

        return self.run(tokens, torch.arange(start_pos, start_pos + n), update)


class FlagInside(Core):
    """forward(in_idx, use_cache): keys, values and a counter in the module."""

    def __init__(self) -> None:
        super().__init__()
        self.reset_kv_cache()

    def reset_kv_cache(self) -> None:
        self.pairs: list[Any] = [None] * LAYERS
        self.current_pos = 0

    def forward(self, in_idx: Tensor, use_cache: bool = False) -> Tensor:
        if not use_cache:
            return self.run(in_idx, torch.arange(in_idx.shape[1]), lambda layer, k, v: (k, v))
        new: list[Pair] = []
        places = torch.arange(self.current_pos, self.current_pos + in_idx.shape[1])
        logits = self.run(in_idx, places, joined(self.pairs, new))
        self.pairs, self.current_pos = list(new), self.current_pos + in_idx.shape[1]
        return logits


class CounterInside(Core):
    """A cache from outside, of a class that the file knows, and a counter in the module."""

    current_pos = 0
    cache_class = KVCache

    def reset_kv_cache(self) -> None:
        self.current_pos = 0

    def forward(self, in_idx: Tensor, cache: KVCache | None = None) -> Tensor:
        n = in_idx.shape[1]
        if cache is None:
            return self.run(in_idx, torch.arange(n), lambda layer, k, v: (k, v))
        new: list[Pair] = []
        places = torch.arange(self.current_pos, self.current_pos + n)
        logits = self.run(in_idx, places, joined(cache.pairs, new))
        cache.pairs, self.current_pos = list(new), self.current_pos + n
        return logits


class MaskInside(Core):
    """setup_caches(batch_size, dtype), then mask (B,n,room) and input_pos, by their names."""

    caches: Buffers | None = None

    def setup_caches(
        self, batch_size: int, dtype: torch.dtype, *, decoder_max_seq_len: int
    ) -> None:
        self.caches = Buffers(batch_size, decoder_max_seq_len, dtype)

    def reset_caches(self) -> None:
        assert self.caches is not None
        self.caches.kv.zero_()

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None
    ) -> Tensor:
        if self.caches is None:
            return self.run(tokens, torch.arange(tokens.shape[1]), lambda layer, k, v: (k, v))
        if mask is None or input_pos is None:
            raise ValueError("caches are set up: mask and input_pos must be provided")
        assert mask.shape[-1] == self.caches.kv.shape[-2]
        self.caches.length = int(input_pos[0])
        return self.run(tokens, input_pos, self.caches.update)


class MustBeMasked(Core):
    """Sees all there is, unless its mask, which is required and comes first, says otherwise."""

    def forward(self, mask: Tensor | None, input_ids: Tensor, past_kv: Any = None) -> Any:
        new: list[Pair] = []
        x = self.tokens(input_ids) + self.pos_embedding(after(past_kv, input_ids))
        update = joined(past_kv, new)
        for block in self.blocks:
            x = x + self._attended(block, x, mask, update)
            x = x + block.mlp(block.norm2(x))
        return self.head(self.norm(x)), new

    def _attended(self, block: Any, x: Tensor, mask: Tensor | None, update: Any) -> Tensor:
        attention = block.attention
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        k, v = update(attention.layer, k, v)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attention.out(y.transpose(1, 2).flatten(2))


class AllAgain(Core):
    """Given all ids so far, it computes the last, if it has a past."""

    def forward(self, ids: Tensor, cache: Any = None, return_intermediates: bool = False) -> Any:
        new: list[Pair] = []
        fed = ids if cache is None else ids[:, -1:]
        places = torch.arange(ids.shape[1])[-fed.shape[1] :]
        logits = self.run(fed, places, joined(cache, new))
        return (logits, new) if return_intermediates else logits


class RowStarts(Core):
    """A start for each row, in a tensor (B,)."""

    def forward(self, ids: Tensor, kv_cache: Any = None, start_pos: Any = None) -> Any:
        new: list[Pair] = []
        start = torch.zeros(ids.shape[0], dtype=torch.long) if start_pos is None else start_pos
        places = start[:, None] + torch.arange(ids.shape[1])
        return self.run(ids, places, joined(kv_cache, new)), new


class Singly(Core):
    """One token a step behind a prompt, and says so."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        if cache is not None and ids.shape[1] > 1:
            raise NotImplementedError("one token at a time")
        new: list[Pair] = []
        return self.run(ids, after(cache, ids), joined(cache, new)), new


class AtMostEight(Core):
    """Asserts that a step has at most eight tokens."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        assert cache is None or ids.shape[1] <= 8
        new: list[Pair] = []
        return self.run(ids, after(cache, ids), joined(cache, new)), new


class CrashesAtThree(Core):
    """A right decoder, but for a step of three tokens, where shapes do not fit."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        new: list[Pair] = []
        if cache is not None and ids.shape[1] == 3:
            torch.zeros(3, 3) + torch.zeros(4, 4)
        return self.run(ids, after(cache, ids), joined(cache, new)), new


class RefusesThree(Core):
    """Refuses a step of three tokens alone: that is no limit."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        if cache is not None and ids.shape[1] == 3:
            raise ValueError("never three")
        new: list[Pair] = []
        return self.run(ids, after(cache, ids), joined(cache, new)), new


class CrashesBehindPrompts(Core):
    """Its mask fits the prompt alone."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        new: list[Pair] = []
        if cache is not None:
            torch.zeros(length(cache)) + torch.zeros(length(cache) + ids.shape[1])
        return self.run(ids, after(cache, ids), joined(cache, new)), new


FOREIGN: dict[str, type[Core]] = {
    shape.__name__: shape
    for shape in (
        StartPos, FlagInside, CounterInside, MaskInside, MustBeMasked, AllAgain, RowStarts, Singly,
        AtMostEight,
    )
}  # fmt: skip
