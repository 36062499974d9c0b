"""The common part of most caches: one buffer per layer, with columns in order of arrival."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from kvtool.core.cache.base import EMPTY, Bytes, Cache, CacheSpec, Step
from kvtool.core.cache.direct_access import DirectAccess, StepAddresses, no_sinks
from kvtool.core.kernels.masks import make_mask
from kvtool.core.native.arrays import Array


class BufferedCache(DirectAccess, Cache):
    """Stores tokens in columns 0, 1, 2 ... of `_keys[layer]` and `_values[layer]`.

    Each of these is (rows,Hkv,columns,D); where values are shared, both are one list. Columns from
    `length` on may hold anything: they are overwritten before a query sees them.
    """

    _keys: list[Tensor]
    _values: list[Tensor]

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        self.spec = spec
        self._allocate(spec.batch, self._first_columns())
        super().__init__(spec, left_padding)

    def reset(self, left_padding: Tensor | None = None) -> None:
        """As Cache.reset; allocates anew only if `select` had changed the number of rows."""
        super().reset(left_padding)
        if self._keys[0].shape[0] != self.batch:
            self._allocate(self.batch, self._columns)

    def _gather_rows(self, rows: Tensor) -> None:
        """Replace the buffers by copies of the histories of `rows`."""
        for buffers in self._stored():
            for layer, old in enumerate(buffers):
                buffers[layer] = torch.index_select(old, 0, rows)

    def _stored(self) -> tuple[list[Tensor], ...]:
        """The lists of buffers, each once: of keys and of values, or of both."""
        return (self._keys,) if self.spec.shared else (self._keys, self._values)

    def _first_columns(self) -> int:
        """How many columns a new cache has."""
        return self.spec.capacity

    def _allocate(self, batch: int, columns: int) -> None:
        s = self.spec
        shape = (batch, s.n_kv_heads, columns, s.head_dim)
        self._keys = [torch.zeros(shape, dtype=s.dtype, device=s.device) for _ in range(s.n_layers)]
        self._values = self._keys if s.shared else [torch.zeros_like(k) for k in self._keys]

    @property
    def _columns(self) -> int:
        return self._values[-1].shape[2]  # it grows last: if memory runs out, all grow again

    def _reserve(self, length: int) -> None:
        """Make sure that `length` columns exist."""

    def _reach(self, length: int) -> int:
        """How many columns a later step reads when `length` columns are filled."""
        return length

    def make_room(self, n_new: int) -> int:
        """As Cache.make_room; the buffers grow here if the kind grows."""
        start = super().make_room(n_new)
        self._reserve(start + n_new)
        return start

    def _make_step(self, start: int, n_new: int) -> Step:
        end = start + n_new
        # A first step of several tokens reads only its own columns; without padding it is causal.
        reach = end if start == 0 and n_new > 1 else self._reach(end)
        causal = start == 0 and reach == end and self.left_padding is None
        # One new token sees every filled column; without empty ones or padding it needs no mask.
        # A compilable kind makes one, or the last token of a block would need another capture.
        all_seen = n_new == 1 and reach == end and self.left_padding is None
        unmasked = causal or (all_seen and not self.compilable)
        slots = torch.arange(start, end, device=self.spec.device)
        has_unfilled = reach > end or self.compilable
        return self._device_step(slots, self.left_padding, reach, has_unfilled, causal, unmasked)

    def _device_step(
        self,
        slots: Tensor,
        padding: Tensor | None,
        reach: int,
        has_unfilled: bool = True,
        causal: bool = False,
        unmasked: bool = False,
    ) -> Step:
        """The step of tokens in `slots` (T,) that read `reach` columns, made on the device alone.

        has_unfilled: some of the columns come after the last token. unmasked: no mask is needed.
        """
        columns = torch.arange(reach, device=self.spec.device)
        q_pos, k_pos = self._at(slots, padding), self._at(columns, padding)
        if has_unfilled:
            k_pos = k_pos.masked_fill(columns > slots[-1], EMPTY)
        mask = None if unmasked else make_mask(q_pos, k_pos)
        return Step(q_pos, k_pos, slots, mask, causal, self.spec.kernels)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """As Cache.write; returns views of the buffers."""
        # index_copy_ refuses a column that does not exist; a slice assignment would store nothing.
        keys, values = self._keys[layer], self._values[layer]
        if self.batch < keys.shape[0]:
            keys, values = keys[: self.batch], values[: self.batch]
        keys.index_copy_(2, step.slots, k)
        if not self.spec.shared:
            values.index_copy_(2, step.slots, v)
        reach = step.k_pos.shape[1]
        return keys.narrow(2, 0, reach), values.narrow(2, 0, reach)

    def step_addresses(self, n_new: int) -> StepAddresses | None:
        """As DirectAccess.step_addresses; the tokens follow one another in the buffers."""
        if not self._is_unpatched():
            return None
        start = self.make_room(n_new)
        return self._addresses_from(start, n_new, start, self._padding())

    def _addresses_from(
        self,
        start: int,
        n_new: int,
        slot: int,
        padding: Array | None,
        window: int = 0,
        sinks: Array | None = None,
    ) -> StepAddresses | None:
        """The StepAddresses of new tokens from column `slot` on.

        None unless the padding is known and the buffers have the spec's layout and room for all.
        """
        rows, n_kv_heads, columns, head_dim = self._keys[0].shape
        fits = (n_kv_heads, head_dim) == (self.spec.n_kv_heads, self.spec.head_dim)
        if not fits or rows < self.batch or not 0 <= slot <= columns - n_new:
            return None
        addresses = self._addresses_of(self._keys, self._values)
        if padding is None or addresses is None:
            return None
        self._begun = n_new
        sinks = no_sinks(self.batch) if sinks is None else sinks
        return StepAddresses(start, padding, addresses, columns, slot, window, sinks)

    def snapshot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """As Cache.snapshot."""
        keys, values = (
            t[layer][: self.batch, :, : self.length] for t in (self._keys, self._values)
        )
        return keys.clone(), values.clone(), self._positions(0, self.length).clone()

    def nbytes(self) -> Bytes:
        """As Cache.nbytes."""
        token = self.spec.token_nbytes // self.spec.batch * self.batch
        allocated = sum(t.untyped_storage().nbytes() for t in chain(*self._stored()))
        allocated += self._padding_nbytes()
        return Bytes(allocated, self.length * token, self._reach(self.length + 1) * token)
