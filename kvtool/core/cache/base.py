"""The cache interface: what a cache is told, what it answers, and what it promises.

A cache is an argument of the model, never a part of it. `begin` and `commit` are host work
(capacity, masks); `write` and `attend` are device work and touch only tensors.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kvtool.config import ModelConfig
from kvtool.core.cache.quantization import Float8, Quantization
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.kernels.masks import LazyMask, make_mask
from kvtool.errors import CapacityError, UsageError

EMPTY = -(2**30)  # the position of a key column that holds nothing; no padding is that long


@dataclass(frozen=True)
class CacheSpec:
    """The sizes a cache is made for. Key-value heads are stored as they are, never expanded."""

    n_layers: int
    batch: int
    n_kv_heads: int
    head_dim: int
    capacity: int  # tokens a row, left padding included
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    kernels: Kernels = DEFAULT

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        kernels: Kernels = DEFAULT,
    ) -> CacheSpec:
        """The spec for `batch` sequences of at most `capacity` tokens of a model."""
        return cls(
            n_layers=config.n_layers,
            batch=batch,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            capacity=capacity,
            dtype=dtype,
            device=device or torch.device("cpu"),
            kernels=kernels,
        )

    @property
    def token_nbytes(self) -> int:
        """Bytes of keys and values of one token, over all layers and rows, stored in `dtype`."""
        width = self.n_kv_heads * self.head_dim * self.dtype.itemsize
        return 2 * self.n_layers * self.batch * width


@dataclass(frozen=True)
class Step:
    """Where the tokens of one forward pass stand, and which keys they may see.

    q_pos (B,T): absolute position of each new token, negative = left padding.
    k_pos (B,S): absolute position held by each key column, EMPTY = nothing. If a position is there
        twice, quantized and exactly, `mask` lets each query see one of the two.
    slots (T,): the storage column of each new token.
    mask (B,1,T,S) bool, or None if every query sees every column (or `causal`); a LazyMask for one
        that would be large.
    causal: T == S, in order, and nothing else is masked.
    """

    q_pos: Tensor
    k_pos: Tensor
    slots: Tensor
    mask: Tensor | LazyMask | None
    causal: bool
    kernels: Kernels = DEFAULT
    # Of a pass without a cache, if it has any.
    quantization: Quantization | Float8 | None = None

    @classmethod
    def full(
        cls,
        batch: int,
        n: int,
        device: torch.device | None = None,
        left_padding: Tensor | None = None,
        kernels: Kernels = DEFAULT,
        window: int = 0,
        sinks: int = 0,
        quantization: Quantization | Float8 | None = None,
    ) -> Step:
        """A whole sequence at once, from position 0 and without a cache.

        window, sinks, quantization: of the cache that this is to be compared with. One that keeps
        no more than a window, or rounds what it keeps, cannot give what a pass without them does.
        """
        slots = torch.arange(n, device=device)
        q_pos = slots.expand(batch, n)
        n_quantized = 0 if quantization is None else quantization.n_quantized(n - 1)
        in_place = quantization if quantization is not None and quantization.in_place else None
        if left_padding is None and (not window or n <= window) and not n_quantized:
            return cls(q_pos, q_pos, slots, None, True, kernels, in_place)
        if left_padding is not None:
            q_pos = q_pos - left_padding[:, None]
        if not isinstance(quantization, Quantization) or not n_quantized:
            mask = make_mask(q_pos, q_pos, window, sinks)
            return cls(q_pos, q_pos, slots, mask, False, kernels, in_place)
        k_pos = torch.cat([q_pos[:, :n_quantized], q_pos], dim=1)
        copies = quantization.copy_rule(range(n), range(n_quantized), range(n)).to(slots.device)
        mask = make_mask(q_pos, k_pos, window, sinks, copies)
        return cls(q_pos, k_pos, slots, mask, False, kernels, quantization)

    def within(self, window: int) -> Step:
        """The same step where a token sees `window` positions, its own included; 0: all before it.

        The window is the model's; a cache may have its own, and a query sees what both let it see.
        """
        if not window or (self.causal and self.q_pos.shape[1] <= window):
            return self
        mask: Tensor | LazyMask
        if self.causal or self.mask is None:
            mask = make_mask(self.q_pos, self.k_pos, window)
        elif isinstance(self.mask, LazyMask):
            mask = self.mask.within(window)
        else:
            in_window = self.q_pos[:, :, None] - self.k_pos[:, None] < window
            mask = self.mask & in_window[:, None]
        return replace(self, mask=mask, causal=False)

    @classmethod
    def bidirectional(cls, mask: Tensor, kernels: Kernels = DEFAULT) -> Step:
        """An encoder's pass: every token sees the real ones; mask (B,S) bool, True = real."""
        slots = torch.arange(mask.shape[1], device=mask.device)
        q_pos = slots.expand(mask.shape)
        return cls(q_pos, q_pos, slots, mask[:, None, None, :], False, kernels)


class Bytes(NamedTuple):
    """Memory of a cache, in bytes."""

    allocated: int  # every storage that the cache owns
    live: int  # keys and values of committed tokens
    read_per_step: int  # keys and values that one more token reads, over all layers

    @property
    def overhead(self) -> int:
        """Bytes that hold no committed token."""
        return self.allocated - self.live


class Cache(ABC):
    """Keys and values of past tokens, so that a decoder need not compute them again.

    One step: `step = begin(n)`; for each layer `attend(layer, q, k, v, step)`; `commit(n)`. What
    was written and not committed does not exist: after an exception, `begin` starts over.
    """

    kind: ClassVar[str]
    exact: ClassVar[bool] = True  # stored keys and values are what the model computed
    compilable: ClassVar[bool] = False  # fixed addresses and no host sync in write and attend
    # Settings so small that a short check exercises everything.
    small: ClassVar[Mapping[str, int]] = {}
    stores: ClassVar[bool] = True  # False: caches nothing on purpose, to be compared with
    recompute: ClassVar[bool] = False  # holds nothing: must be given the whole sequence each time
    quantization: Quantization | Float8 | None = None  # how tokens are rounded, and by when
    window: int = 0  # how many positions a token sees, its own included; 0: all before it
    sinks: int = 0  # and how many of the first ones, always
    page: int = 0  # tokens of a page; 0: columns are not in pages

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        """An empty cache; left_padding (B,) counts the padding tokens at the start of each row."""
        self.spec = spec
        self.reset(left_padding)

    def reset(self, left_padding: Tensor | None = None) -> None:
        """Forget every token and start on new sequences; a compilable kind, in the same memory."""
        self.length = 0  # committed tokens a row, left padding included
        self._begun = 0  # tokens of the step that has begun and is not committed
        self.batch = self.spec.batch
        self.left_padding = None if left_padding is None else self._checked(left_padding)

    def _checked(self, left_padding: Tensor) -> Tensor:
        """A copy. Raises UsageError."""
        wrong = left_padding.shape != (self.batch,) or left_padding.is_floating_point()
        if wrong or (not left_padding.is_meta and bool((left_padding < 0).any())):
            raise UsageError(
                f"left padding must be a whole number >= 0 for each row (found {left_padding}, and "
                f"{self.batch} rows)"
            )
        return left_padding.to(torch.long, copy=True)

    def begin(self, n_new: int) -> Step:
        """Make room for `n_new` tokens a row and say where they stand. Raises CapacityError."""
        start = self.make_room(n_new)
        step = self._make_step(start, n_new)
        self._begun = n_new
        return step

    def make_room(self, n_new: int) -> int:
        """The first part of `begin` -> how many tokens come before the new ones. Raises UsageError
        for a step without tokens, and CapacityError."""
        start = 0 if self.recompute else self.length
        if n_new < 1:
            raise UsageError(f"a step needs 1 token or more (found {n_new})")
        if start + n_new > self.spec.capacity:
            raise CapacityError(
                f"{self.kind} cache is full: {start} tokens held and {n_new} new ones "
                f"need {start + n_new} (capacity {self.spec.capacity})",
                "Make the cache larger, or generate fewer tokens.",
            )
        return start

    @abstractmethod
    def _make_step(self, start: int, n_new: int) -> Step:
        """The Step of `n_new` tokens after the first `start`; capacity has been checked."""

    @abstractmethod
    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Store k, v (B,Hkv,T,D) -> all keys and values (B,Hkv,S,D), in columns as step.k_pos."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Store k, v (B,Hkv,T,D) and attend with q (B,H,T,D) -> (B,H,T,D)."""
        keys, values = self.write(layer, k, v, step)
        return step.kernels.attention(q, keys, values, step.mask, step.causal)

    def commit(self, n_new: int) -> None:
        """Make the first `n_new` tokens of the step part of the sequence; call it after all layers.

        Raises UsageError beyond what the step has begun, or if rows or length have changed since.
        """
        if not 0 <= n_new <= self._begun:
            raise UsageError(
                f"{self.kind} cache was given {self._begun} tokens to write, cannot commit {n_new}"
            )
        self.length = n_new if self.recompute else self.length + n_new
        self._begun = 0

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises UsageError beyond what is held."""
        if not 0 <= length <= self.length:
            raise UsageError(
                f"{self.kind} cache holds {self.length} tokens, cannot crop to {length}"
            )
        self.length = length
        self._begun = 0

    def select(self, rows: Tensor) -> None:
        """Continue from the histories of `rows` (n,), in that order; repeats are allowed.

        Raises UsageError for a row that is not there.
        """
        if bool(((rows < 0) | (rows >= self.batch)).any()):
            raise UsageError(
                f"{self.kind} cache cannot select rows {rows.tolist()} (it holds {self.batch})"
            )
        self._begun = 0
        if self.left_padding is not None:
            self.left_padding = self.left_padding.index_select(0, rows)
        self.batch = rows.shape[0]

    @property
    def loses(self) -> bool:
        """Whether it changes what is predicted, beyond rounding."""
        return not self.exact or bool(self.window)

    def vacuous(self) -> str | None:
        """Why results equal to those without a cache would prove nothing; None if they would
        prove something."""
        if self.recompute:
            return "it stores nothing: every step computes the whole sequence again"
        return None

    def fork(self) -> Cache:
        """A cache that holds the same tokens and goes its own way from here."""
        return copy.deepcopy(self)

    @abstractmethod
    def snapshot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the committed k, v (B,Hkv,S,D) of a layer, and their positions (B,S).

        EMPTY is the position of a column that holds nothing in that row.
        """

    @abstractmethod
    def nbytes(self) -> Bytes:
        """What the cache occupies now."""

    @classmethod
    @abstractmethod
    def predict_nbytes(cls, spec: CacheSpec, length: int, prompt: int = 1) -> int:
        """Bytes of keys and values that the kind allocates to hold `length` tokens, of which the
        first `prompt` arrive at once and the others one by one."""

    def _padding_nbytes(self) -> int:
        """Bytes of the counts of left padding."""
        return 0 if self.left_padding is None else self.left_padding.untyped_storage().nbytes()

    def _positions(self, start: int, end: int) -> Tensor:
        """Absolute positions of storage columns start..end-1 -> (B, end - start)."""
        return self._at(torch.arange(start, end, device=self.spec.device), self.left_padding)

    def _at(self, columns: Tensor, padding: Tensor | None) -> Tensor:
        """Absolute positions of the tokens that arrive as number `columns` (n,) -> (B,n)."""
        return columns.expand(self.batch, -1) if padding is None else columns - padding[:, None]
