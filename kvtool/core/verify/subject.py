"""The subject of a check: a decoder that computes whole sequences, and decodes them with a
cache."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kvtool.core.verify.schedules import NORMAL

# What a subject may be able to do; a scenario names those that it needs.
ABILITIES = (
    "batch", "padding", "right-padding", "crop", "select", "reset", "fork", "capacity", "source",
    "window", "quantized", "pages", "save",
)  # fmt: skip


class Same:
    """An object as part of a key: equal to itself alone, and alive as long as the key is."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


class Source(NamedTuple):
    """The source of an encoder-decoder: ids (B,S), and mask (B,S) bool with True = a real token."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Start:
    """How a session begins: rows, room for tokens, padding if any, and the source.

    padding: how many columns on the left (B,); or the columns (B,2) from the first on and up to
    an end, which is where a row is padded that is shorter than its prompt.
    """

    batch: int
    capacity: int
    padding: Tensor | None = None
    source: Source | None = None

    @property
    def has_holes(self) -> bool:
        """Whether padding stands between tokens of a row, behind its prompt."""
        return self.padding is not None and self.padding.dim() == 2

    def real(self, first: int, n: int) -> Tensor:
        """Which of n columns from `first` on are not padding (B,n), where there is padding."""
        assert self.padding is not None
        columns = torch.arange(first, first + n, device=self.padding.device)
        if self.padding.dim() == 1:
            return columns >= self.padding[:, None]
        return (columns < self.padding[:, :1]) | (columns >= self.padding[:, 1:])

    def select(self, rows: Tensor) -> Start:
        """How sessions on `rows` (n,) of it begin, in that order."""
        padding = None if self.padding is None else self.padding[rows]
        source = self.source and Source(self.source.ids[rows], self.source.mask[rows])
        return Start(len(rows), self.capacity, padding, source)


class Session(Protocol):
    """One run of a decoder with its cache. Methods beyond the subject's abilities may be
    missing."""

    def feed(self, ids: Tensor) -> Tensor:
        """The next tokens of each row (B,n) -> their logits (B,n,V)."""

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens, left padding included."""

    def select(self, rows: Tensor) -> None:
        """Go on from the histories of `rows` (n,), in that order."""

    def reset(self, start: Start) -> None:
        """Forget everything and begin again on the same cache object."""

    def fork(self) -> Session:
        """A second session that holds the same tokens and goes its own way."""

    def reload(self) -> None:
        """Save the cache, and go on with a new one that is loaded from it."""

    def vacuous(self) -> str | None:
        """Why equal logits would prove nothing about the cache, if so."""


class SharedPasses(Protocol):
    """Uncached passes that subjects share: see kvtool.core.verify.passes."""

    def full(self, subject: Subject, ids: Tensor, start: Start) -> Tensor:
        """The subject's `full`: (B,T) -> (B,T,V), which the caller leaves as it is."""

    def clear(self) -> None:
        """Forget all passes, and the subjects that answered them."""


class Evidence(Protocol):
    """Float64 evidence that several kinds of cache share: see kvtool.core.verify.by_layer."""

    def arms(self, subject: Any, case: Any, plain: bool = False) -> Any:
        """The Arms of a subject in a case, or None if they cannot be computed."""


class Feeding:
    """How much of its context a subject is fed. The defaults feed all that a scenario asks for."""

    reach: int = 0  # tokens of the longest history; 0: their cost is not known
    level: int = NORMAL  # of the schedules
    fed_little: bool = False  # most sizes of steps take too long
    sizes: tuple[int, ...] = ()  # tokens of its windows, chunks and pages
    special_ids: tuple[int, ...] = ()  # to which it gives a meaning

    @property
    def largest_step(self) -> int:
        """The most tokens that a step takes, 0 for any number."""
        return 0

    @property
    def single_steps_only(self) -> bool:
        """Whether steps behind the first take one token."""
        return False


class Subject(Protocol):
    """A decoder under test. `abilities` are of ABILITIES. `Feeding` has defaults for its last
    fields."""

    name: str
    stores: bool  # whether its cache stores anything: one that does not is there to compare with
    abilities: frozenset[str]
    vocab_size: int
    source_vocab_size: int
    context: int
    window: int  # tokens that a query sees, its own included; 0: all
    dtype: torch.dtype
    device: torch.device
    rounds_alike: (
        bool  # whether its uncached pass rounds as its cache does, so that a loss is a bug
    )
    lossy: bool  # whether it declares that its cache rounds on purpose
    converts: bool  # whether its float64 copy is known to be the same model
    pure: bool  # whether its uncached pass is known to answer the same each time
    passes: SharedPasses | None  # the uncached passes that it shares, if any

    @property
    def pass_key(self) -> Hashable:
        """The key of an uncached pass: all that it depends on apart from its arguments and the
        format."""

    reach: int
    level: int
    fed_little: bool
    sizes: tuple[int, ...]
    special_ids: tuple[int, ...]

    @property
    def largest_step(self) -> int:
        """The most tokens that a step takes, 0 for any number."""

    @property
    def single_steps_only(self) -> bool:
        """Whether steps behind the first take one token."""

    def full(self, ids: Tensor, start: Start) -> Tensor:
        """Whole sequences (B,T) in one uncached pass -> logits (B,T,V)."""

    def start(self, start: Start) -> Session:
        """An empty session."""

    def to(self, dtype: torch.dtype) -> Subject:
        """The same mathematics in another format."""

    def moved(self, by: float, seed: int = 0, tables: bool = False) -> Subject:
        """The same decoder with weights, or `tables`, that differ by about `by` of themselves.

        Raises NotImplementedError if it holds none.
        """

    def unrounded(self) -> Subject | None:
        """The same decoder with a cache that rounds nothing, if this one's does."""
