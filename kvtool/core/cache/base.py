"""The interface of all caches, and its contract.

A cache is an argument of the model, never a part of it. `begin` and `commit` work on the host
(capacity, masks). `write` and `attend` work on the device, and touch only tensors.
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
from kvtool.core import cache_bytes
from kvtool.core.cache.quantization import Float8, Quantization
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.kernels.masks import LazyMask, make_mask
from kvtool.errors import CapacityError, UsageError

EMPTY = -(2**30)  # the position of an empty key column; no padding is that long


@dataclass(frozen=True)
class CacheSpec:
    """The sizes, dtype, device and kernels of a cache; key-value heads are stored unexpanded.

    shared: values are the keys once more, as in latent attention, so that they need no memory.
    """

    n_layers: int
    batch: int
    n_kv_heads: int
    head_dim: int
    capacity: int  # tokens a row, left padding included
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    kernels: Kernels = DEFAULT
    shared: bool = False

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
        """The spec for a model and `batch` sequences of at most `capacity` tokens."""
        return cls(
            n_layers=config.n_layers,
            batch=batch,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            capacity=capacity,
            dtype=dtype,
            device=device or torch.device("cpu"),
            kernels=kernels,
            shared=config.shared_values,
        )

    def apart(self) -> CacheSpec:
        """The same for a kind that stores values in another way than keys, and so cannot share."""
        return replace(self, shared=False)

    @property
    def kept(self) -> cache_bytes.Kept:
        """What a layer keeps of a token in a row."""
        value_dim = 0 if self.shared else self.head_dim
        return cache_bytes.Kept(self.n_kv_heads, self.head_dim, value_dim, self.dtype.itemsize)

    @property
    def token_nbytes(self) -> int:
        """Bytes of keys and values of one token, over all layers and rows, stored in `dtype`."""
        return self.n_layers * self.batch * self.kept.token


@dataclass(frozen=True)
class Step:
    """The positions of the tokens of one forward pass, and which keys they may see.

    q_pos (B,T): absolute position of each new token, negative = left padding.
    k_pos (B,S): absolute position of each key column, EMPTY = an empty column. If a position has
        two columns, quantized and exact, `mask` shows each query one of the two.
    slots (T,): the storage column of each new token.
    mask (B,1,T,S) bool, True = attend. None: every query sees every column, or `causal` holds. A
        large mask is a LazyMask.
    causal: T == S, in order, and each query sees its own column and those before it.
    """

    q_pos: Tensor
    k_pos: Tensor
    slots: Tensor
    mask: Tensor | LazyMask | None
    causal: bool
    kernels: Kernels = DEFAULT
    quantization: Quantization | Float8 | None = None  # for a pass without a cache: how it rounds

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
        """The step of `n` tokens a row from position 0, for a pass without a cache.

        left_padding (B,): padding tokens at the start of each row. window, sinks, quantization:
        those of the cache that the pass is compared with, since such a cache loses keys or rounds
        them. Without these, the pass would be another computation.
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
        """The same step, but each token sees at most `window` positions with its own; 0: no limit.

        This is the model's window. If the cache has one as well, a query sees what both allow.
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a pass without a cache: q (B,H,T,D), k, v (B,Hkv,T,D) -> (B,H,T,D)"""
        if self.quantization is not None:
            k, v = self.quantization.both_copies(k, v, self.q_pos)
        return self.kernels.attention(q, k, v, self.mask, self.causal)

    @classmethod
    def bidirectional(cls, mask: Tensor, kernels: Kernels = DEFAULT) -> Step:
        """The step of an encoder: every token sees all real ones; mask (B,S) bool, True = real."""
        slots = torch.arange(mask.shape[1], device=mask.device)
        q_pos = slots.expand(mask.shape)
        return cls(q_pos, q_pos, slots, mask[:, None, None, :], False, kernels)


class Bytes(NamedTuple):
    """The memory of a cache, in bytes over all layers and rows."""

    allocated: int  # all storage that the cache owns
    live: int  # keys and values of committed tokens
    read_per_step: int  # keys and values that the next single-token step reads

    @property
    def overhead(self) -> int:
        """Bytes that hold no committed token."""
        return self.allocated - self.live


class Cache(ABC):
    """Holds the keys and values of past tokens, so that a decoder need not compute them again.

    One step: `step = begin(n)`; for each layer `attend(layer, q, k, v, step)`; `commit(n)`. Tokens
    that were written but not committed are not part of the sequence: after an exception, call
    `begin` again.
    """

    kind: ClassVar[str]
    exact: ClassVar[bool] = True  # stored keys and values are bit for bit the model's
    compilable: ClassVar[bool] = False  # fixed addresses and no host sync in write and attend
    # Settings small enough for a short check to reach every case.
    small: ClassVar[Mapping[str, int]] = {}
    stores: ClassVar[bool] = True  # False: stores nothing on purpose, as a reference
    recompute: ClassVar[bool] = False  # stores nothing: every step needs the whole sequence
    quantization: Quantization | Float8 | None = None  # how tokens are rounded, and when
    window: int = 0  # how many positions a token sees, with its own; 0: all before it
    sinks: int = 0  # how many of the first positions it always sees too
    page: int = 0  # tokens per page; 0: no pages

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        """An empty cache; left_padding (B,): padding tokens at the start of each row.

        Raises UsageError for left padding that is negative, not whole, or of another shape.
        """
        self.spec = spec
        self.reset(left_padding)

    def reset(self, left_padding: Tensor | None = None) -> None:
        """Forget all tokens and start new sequences; a compilable kind keeps its memory.

        left_padding: as in the constructor. Raises UsageError.
        """
        self.length = 0  # committed tokens a row, left padding included
        self._begun = 0  # tokens of the step that has begun and is not committed
        self.batch = self.spec.batch
        self.left_padding = None if left_padding is None else self._checked(left_padding)

    def _checked(self, left_padding: Tensor) -> Tensor:
        """A copy as int64. Raises UsageError for a wrong shape, type or sign."""
        wrong = left_padding.shape != (self.batch,) or left_padding.is_floating_point()
        if wrong or (not left_padding.is_meta and bool((left_padding < 0).any())):
            raise UsageError(
                f"left padding must be a whole number >= 0 for each row (found {left_padding}, and "
                f"{self.batch} rows)"
            )
        return left_padding.to(torch.long, copy=True)

    def begin(self, n_new: int) -> Step:
        """Make room for `n_new` tokens a row -> their step.

        Raises UsageError for a step without tokens, and CapacityError if they do not fit.
        """
        start = self.make_room(n_new)
        step = self._make_step(start, n_new)
        self._begun = n_new
        return step

    def make_room(self, n_new: int) -> int:
        """The first part of `begin`: make room -> the number of tokens before the new ones.

        Raises UsageError for a step without tokens, and CapacityError if they do not fit.
        """
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
        """The step of `n_new` tokens after `start` others; there is room for them."""

    @abstractmethod
    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Store k, v (B,Hkv,T,D) -> all keys and values (B,Hkv,S,D), with columns as step.k_pos."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Store k, v (B,Hkv,T,D) and attend with q (B,H,T,D) -> (B,H,T,D)."""
        keys, values = self.write(layer, k, v, step)
        return step.kernels.attention(q, keys, values, step.mask, step.causal)

    def commit(self, n_new: int) -> None:
        """Add the first `n_new` tokens of the step to the sequence; call it after all layers.

        Raises UsageError for more tokens than the step has, and after a `select`, `crop` or `reset`
        that came after `begin`.
        """
        if not 0 <= n_new <= self._begun:
            raise UsageError(
                f"{self.kind} cache was given {self._begun} tokens to write, cannot commit {n_new}"
            )
        self.length = n_new if self.recompute else self.length + n_new
        self._begun = 0

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises UsageError if it holds fewer."""
        if not 0 <= length <= self.length:
            raise UsageError(
                f"{self.kind} cache holds {self.length} tokens, cannot crop to {length}"
            )
        self.length = length
        self._begun = 0

    def select(self, rows: Tensor) -> None:
        """Replace the rows by `rows` (n,), in that order, to continue from their histories.

        A row may be taken more than once. Raises UsageError for a row that does not exist.
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
        """Whether it changes predictions by more than rounding: it evicts or quantizes tokens."""
        return not self.exact or bool(self.window)

    def vacuous(self) -> str | None:
        """Why a comparison with no cache would prove nothing, as when a window never evicted a
        token; None if it would prove something."""
        if self.recompute:
            return "it stores nothing: every step computes the whole sequence again"
        return None

    def fork(self) -> Cache:
        """An independent cache with the same tokens."""
        return copy.deepcopy(self)

    @abstractmethod
    def snapshot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of a layer's committed k, v (B,Hkv,S,D), and of their positions (B,S).

        An empty column has the position EMPTY.
        """

    @abstractmethod
    def nbytes(self) -> Bytes:
        """The memory of the cache now, in bytes."""

    @classmethod
    @abstractmethod
    def predict_nbytes(cls, spec: CacheSpec, length: int, prompt: int = 1) -> int:
        """Bytes of keys and values that the kind allocates for `length` tokens.

        The first `prompt` tokens come in one step, the others one by one.
        """

    def _padding_nbytes(self) -> int:
        """Bytes of the counts of left padding."""
        return 0 if self.left_padding is None else self.left_padding.untyped_storage().nbytes()

    def _positions(self, start: int, end: int) -> Tensor:
        """Absolute positions of storage columns start..end-1 -> (B, end - start)."""
        return self._at(torch.arange(start, end, device=self.spec.device), self.left_padding)

    def _at(self, columns: Tensor, padding: Tensor | None) -> Tensor:
        """Absolute positions of the tokens with numbers `columns` (n,), by arrival -> (B,n)."""
        return columns.expand(self.batch, -1) if padding is None else columns - padding[:, None]
