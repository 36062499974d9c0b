"""A sliding-window cache: it keeps the first few tokens and the last few."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvtool.config import check_int
from kvtool.core import cache_bytes
from kvtool.core.cache.base import EMPTY, Bytes, CacheSpec, Step
from kvtool.core.cache.buffered import BufferedCache
from kvtool.core.cache.direct_access import StepAddresses
from kvtool.core.kernels.masks import make_mask
from kvtool.core.native.arrays import Array
from kvtool.errors import CacheOpUnsupported


class SlidingCache(BufferedCache):
    """Keeps the first `sinks` positions of each row and the last `window`, as `visible` shows them.

    Without the first tokens, which get much attention, a model fails (StreamingLLM, Xiao 2023).
    StreamingLLM renumbers positions within the cache; here they stay absolute. So the logits equal
    those of one pass under the same window, and `capacity` bounds the length of the whole text.

    The columns are the sinks, then the tokens from number `_first` on in order of arrival. When
    these reach the end, the last `window - 1 + slack` tokens move to the start. Spare columns, an
    eighth of the window, make this rare. A ring buffer would move nothing, but its columns would be
    out of order. Before the first move the columns of the sinks are empty, and are not returned.

        window=2, sinks=1, two columns beside the sink, after tokens 0 to 3:
        0 -> [ |0 ]    1 -> [ |0 1]    2 -> [0|1 2]    3 -> [0|2 3]

    If a step has more tokens than fit, they are set aside until the commit. So its tokens see all
    that they should, and after an error the cache is unchanged. Until then the step takes the
    memory of all its tokens: a long prompt needs less memory in several steps.

    `slack` more tokens are kept, so that the last `slack` tokens can always be cropped.
    """

    kind: ClassVar[str] = "sliding"
    small: ClassVar[Mapping[str, int]] = {"window": 5, "sinks": 1, "slack": 4}

    def __init__(
        self,
        spec: CacheSpec,
        left_padding: Tensor | None = None,
        window: int = cache_bytes.WINDOW,
        sinks: int = cache_bytes.SINKS,
        slack: int = 0,
    ) -> None:
        """An empty cache. Raises UsageError for a window below 1, or negative sinks or slack."""
        check_int("window", window, 1)
        check_int("sinks", sinks, 0)
        check_int("slack", slack, 0)
        self.window, self.sinks, self.slack = window, sinks, slack
        self._kept = window - 1 + slack  # tokens that remain when others are evicted
        columns = cache_bytes.sliding_columns(spec.capacity, window, sinks, slack)
        self._n_sinks = sinks if columns < spec.capacity else 0  # else nothing is ever evicted
        self._room = columns - self._n_sinks
        super().__init__(spec, left_padding)

    def _first_columns(self) -> int:
        return self._n_sinks + self._room

    def reset(self, left_padding: Tensor | None = None) -> None:
        """As Cache.reset."""
        super().reset(left_padding)
        self._first = 0  # the number of the first token in the columns after the sinks
        self._largest_first = 0  # the largest `_first` so far
        self._set_aside: list[tuple[Tensor, Tensor]] = []  # (buffer, its tokens from _first on)

    def _make_step(self, start: int, n_new: int) -> Step:
        end = start + n_new
        self._evict_for(start, n_new)
        k_pos = self._held_positions(end)
        q_pos = k_pos[:, -n_new:]
        sinks_held = self._first == 0 or self._first >= self._n_sinks
        all_in_window = end - self._first <= self.window and sinks_held
        plain = all_in_window and self.left_padding is None
        causal = plain and start == 0
        unmasked = causal or (plain and n_new == 1)
        mask = None if unmasked else make_mask(q_pos, k_pos, self.window, self.sinks)
        slots = torch.arange(start, end, device=self.spec.device) - self._first + self._n_sinks
        return Step(q_pos, k_pos, slots, mask, causal, self.spec.kernels)

    def _evict_for(self, start: int, n_new: int) -> None:
        """Evict tokens that no query sees any more, if the new ones would not fit."""
        self._set_aside = []
        if start + n_new - self._first > self._room and start - self._first > self._kept:
            held = slice(self._n_sinks, self._n_sinks + start - self._first)
            self._evict([(b, b[:, :, held]) for b in chain(*self._stored())])

    def step_addresses(self, n_new: int) -> StepAddresses | None:
        """As DirectAccess.step_addresses; None too if the tokens are set aside, or if a row's sinks
        are not in one range of columns."""
        as_made = self.window > 0 <= self.sinks and self._n_sinks in (0, self.sinks)
        if not self._is_unpatched() or not as_made:
            return None
        start = self.make_room(n_new)
        self._evict_for(start, n_new)
        padding = self._padding()
        if padding is None or start + n_new - self._first > self._room:
            return None
        sinks = self._columns_of_sinks(padding)
        if sinks is None:
            return None
        slot = self._n_sinks + start - self._first
        return self._addresses_from(start, n_new, slot, padding, self.window, sinks)

    def _columns_of_sinks(self, padding: Array) -> Array | None:
        """The first column of each row's sinks, and the one after the last: (B,2).

        None while some rows' sinks are at the start, and those of rows with more padding are not.
        """
        if not self._first:  # nothing was moved: the sinks are the first tokens after the padding
            begin = self._n_sinks + padding
        elif padding.max() + self.sinks <= self._first:
            begin = np.zeros_like(padding)
        else:
            return None
        return np.stack([begin, begin + self.sinks], 1)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """As Cache.write; tokens that do not fit are set aside until `commit`."""
        begin = 0 if self._first else self._n_sinks
        end = begin + step.k_pos.shape[1]
        keys, values = self._keys[layer], self._values[layer]
        if end <= self._columns:
            keys.index_copy_(2, step.slots, k)
            if not self.spec.shared:
                values.index_copy_(2, step.slots, v)
            return keys[:, :, begin:end], values[:, :, begin:end]
        held = slice(begin, end - k.shape[2])
        pairs = ((keys, k),) if self.spec.shared else ((keys, k), (values, v))
        whole = [torch.cat([buffer[:, :, held], new], dim=2) for buffer, new in pairs]
        after_sinks = self._n_sinks - begin
        for (buffer, _), content in zip(pairs, whole, strict=True):
            self._set_aside.append((buffer, content[:, :, after_sinks:]))
        return whole[0], whole[-1]

    def commit(self, n_new: int) -> None:
        """As Cache.commit; if there is no more room, evicts tokens that no later one sees."""
        super().commit(n_new)
        if self._set_aside or self.length - self._first > self._room:
            self._evict(self._set_aside)
        self._set_aside = []

    def _evict(self, contents: list[tuple[Tensor, Tensor]]) -> None:
        """Keep the last tokens, and the sinks among the evicted ones.

        contents: for each buffer the tokens from `_first` on, (B,Hkv,n,D), which may be a view of
        the buffer.
        """
        first = max(self._first, self.length - self._kept)
        column = self._sink_tokens() - self._first
        leaves = ((column >= 0) & (column < first - self._first))[:, None, :, None]
        # If memory runs out, nothing has changed: no step reads the new sinks before `_first`
        # changes, and nothing is allocated after the first token has moved.
        for buffer, content in contents:
            sinks = buffer[:, :, : self._n_sinks]
            index = column.clamp(0, content.shape[2] - 1)[:, None, :, None]
            sinks.copy_(torch.where(leaves, content.take_along_dim(index, dim=2), sinks))
        tokens = slice(first - self._first, self.length - self._first)
        goal = slice(self._n_sinks, self._n_sinks + self.length - first)
        moved = torch.empty_like(self._keys[0][:, :, goal])
        for buffer, content in contents:
            buffer[:, :, goal] = moved.copy_(content[:, :, tokens])  # the two may overlap
        self._first = first
        self._largest_first = max(self._largest_first, first)

    def _sink_tokens(self) -> Tensor:
        """The number of the token for each sink column -> (B,n_sinks)."""
        sinks = torch.arange(self._n_sinks, device=self.spec.device).expand(self.batch, -1)
        return sinks if self.left_padding is None else sinks + self.left_padding[:, None]

    def _held_positions(self, end: int) -> Tensor:
        """The positions of the columns that `write` returns with tokens up to `end` -> (B,S)."""
        tokens = self._positions(self._first, end)
        if not self._first:
            return tokens
        sinks = torch.arange(self._n_sinks, device=self.spec.device)
        there = self._sink_tokens() < self._first
        return torch.cat([torch.where(there, sinks, EMPTY), tokens], dim=1)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises UsageError if it holds fewer, and CacheOpUnsupported if the next token would see a
        token that has been evicted.
        """
        if 0 <= length < self.length and self._first:
            padding = self._least_padding()  # the row with the least needs the most tokens
            needed = max(length - self.window + 1 - padding, self.sinks)
            if needed < min(self._first, length) - padding:
                raise CacheOpUnsupported(
                    self.kind,
                    f"crop to {length}",
                    f"it needs position {needed} and holds from {self._first - padding}",
                    f"Make it with slack={self.length - length}, or crop before that is evicted.",
                )
        super().crop(length)
        self._set_aside = []
        self._first = min(self._first, length)

    def _least_padding(self) -> int:
        return 0 if self.left_padding is None else int(self.left_padding.min())

    def select(self, rows: Tensor) -> None:
        """As Cache.select, by copies of the rows."""
        super().select(rows)
        self._set_aside = []
        self._gather_rows(rows)

    def vacuous(self) -> str | None:
        """As Cache.vacuous: a check in which no token was evicted."""
        if self._largest_first - self._least_padding() > self.sinks:
            return None
        return f"the window of {self.window} never evicted a token ({self.length} tokens held)"

    def snapshot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """As Cache.snapshot."""
        positions = self._held_positions(self.length).clone()
        begin = 0 if self._first else self._n_sinks
        held = slice(begin, begin + positions.shape[1])
        keys, values = self._keys[layer][:, :, held], self._values[layer][:, :, held]
        return keys.clone(), values.clone(), positions

    def nbytes(self) -> Bytes:
        """As Cache.nbytes."""
        token = self.spec.token_nbytes // self.spec.batch  # of one row
        live = int((self._held_positions(self.length) != EMPTY).sum())
        buffers = [*chain(*self._stored()), *(content for _, content in self._set_aside)]
        allocated = sum(t.untyped_storage().nbytes() for t in buffers) + self._padding_nbytes()
        read = self.length + 1 - self._first
        if read > self._room:
            read = self._kept + 1
        if read <= self.length:
            read += self._n_sinks
        return Bytes(allocated, live * token, read * self.batch * token)

    @classmethod
    def predict_nbytes(
        cls,
        spec: CacheSpec,
        length: int,
        prompt: int = 1,
        window: int = cache_bytes.WINDOW,
        sinks: int = cache_bytes.SINKS,
        slack: int = 0,
    ) -> int:
        """As Cache.predict_nbytes: all is allocated at once, whatever `length` is."""
        settings = {"window": window, "sinks": sinks, "slack": slack}
        held = cache_bytes.sliding(spec.kept, spec.batch, spec.capacity, length, **settings)
        return spec.n_layers * held.allocated


SlidingCache.freeze_methods("_held_positions")
