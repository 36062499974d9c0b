"""Decoding by the book, to try out what a bug might be.

A `Hypothesis` keeps the key and value of every token ever fed, and computes for each step which of
them the new tokens attend to. As it stands it gives the logits of a whole-sequence pass. A subclass
changes one rule, as a bug would: if it then gives the wrong logits that a cache gave, to rounding,
it is the bug. No class of kvtool.core.cache that stores anything takes part.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.cache import Step
from kvtool.core.cache.quantization import Float8, Quantization
from kvtool.core.kernels.default import DEFAULT, CappedKernels
from kvtool.core.verify.model_subject import ModelSubject
from kvtool.core.verify.subject import Start

ZERO = -1  # in place of a token's number: zeros


class Column(NamedTuple):
    """One key column: which token's key and value it has, and where the token stands."""

    key: int  # the token's number in the store
    value: int
    at: int  # place in the row's history; below 0: left padding


class Store:
    """Keys and values of every token ever fed, by layer (N,Hkv,D); it only grows, so that forks of
    a session share it."""

    def __init__(self, n_layers: int) -> None:
        self.k: list[Tensor | None] = [None] * n_layers
        self.v: list[Tensor | None] = [None] * n_layers
        self.n_tokens = 0

    def add(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Append k, v (B,Hkv,n,D), row after row."""
        for held, new in ((self.k, k), (self.v, v)):
            flat, old = new.transpose(1, 2).flatten(0, 1), held[layer]
            held[layer] = flat if old is None else torch.cat([old, flat])

    def get(self, part: str, layer: int, tokens: list[list[int]]) -> Tensor:
        """Keys ("k") or values ("v") of tokens (B,S) by number -> (B,S,Hkv,D); ZERO gives zeros."""
        held = getattr(self, part)[layer]
        index = torch.tensor(tokens, device=held.device)
        return held[index.clamp(min=0)].masked_fill((index == ZERO)[..., None, None], 0.0)


class Hypothesis:
    """A session that remembers everything; a subclass changes one rule.

    `rows` are the columns of the past, a list for each row of the batch; `new` are those of the
    step, `n_new` each.
    """

    hint = ""  # what it means if this reproduces a cache's logits
    needs: tuple[str, ...] = ()  # of ABILITIES: without them in the scenario it changes nothing

    def __init__(self, subject: ModelSubject, start: Start) -> None:
        self.subject = subject
        self.n_layers = subject.model.config.n_layers
        self.store = Store(self.n_layers)
        self.capacity = start.capacity
        self._begin(start)

    def _begin(self, start: Start) -> None:
        self.source = self.subject.encode(start)
        pads = [0] * start.batch if start.padding is None else start.padding.tolist()
        self.padding: list[int] = pads
        self.rows: list[list[Column]] = [[] for _ in pads]

    # The session

    def feed(self, ids: Tensor) -> Tensor:
        """The next tokens of each row (B,n) -> their logits (B,n,V)."""
        batch, n = ids.shape
        self.n_new = n
        self.new = [[self._column(b, i, n) for i in range(n)] for b in range(batch)]
        q_pos = torch.tensor([self.positions(b, n) for b in range(batch)], device=ids.device)
        slots = torch.arange(n, device=ids.device)
        step = Step(q_pos, q_pos, slots, None, False)
        logits = self.subject.model(ids, step, self, self.source)  # type: ignore[arg-type]
        self.store.n_tokens += batch * n
        for row, new in zip(self.rows, self.new, strict=True):
            row.extend(new)
        return logits

    def crop(self, length: int) -> None:
        self.rows = [row[:length] for row in self.rows]

    def select(self, rows: Tensor) -> None:
        chosen = rows.tolist()
        self.rows = [list(self.rows[r]) for r in chosen]
        self.padding = [self.padding[r] for r in chosen]
        if self.source is not None:
            self.source = self.source.select(rows)

    def reset(self, start: Start) -> None:
        self._begin(start)

    def fork(self) -> Hypothesis:
        other = copy.copy(self)
        other.rows = [list(row) for row in self.rows]
        return other

    def reload(self) -> None:
        """What was saved and loaded is the same."""

    def vacuous(self) -> str | None:
        return None

    # The rules

    def _index(self, row: int, i: int) -> int:
        return len(self.rows[row]) + i - self.padding[row]

    def _column(self, row: int, i: int, n: int) -> Column:
        token = self.store.n_tokens + row * n + i
        return Column(token, token, self._index(row, i))

    def positions(self, row: int, n: int) -> list[int]:
        """The positions of the n new tokens of a row, as embedding and rotation see them."""
        return [self._index(row, i) for i in range(n)]

    def past_columns(self, layer: int, row: int) -> list[Column]:
        """The columns of earlier steps that a row of this layer may attend to."""
        return self.rows[row]

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        """Whether the i-th token of the step attends to a column; `new`: one of the same step."""
        if column.at > query.at or (column.at < 0 and column is not query):
            return False
        window, sinks = self.subject.window, self.subject.sinks
        near = query.at - column.at < window or column.at < sinks
        return not window or near

    def as_read(self, part: str, layer: int, stored: Tensor, columns: list[list[Column]]) -> Tensor:
        """What a layer reads of the keys ("k") or values ("v") `stored` (B,S,Hkv,D) in columns."""
        return stored

    @property
    def quantization(self) -> Quantization | Float8 | None:
        """How old keys and values are rounded."""
        return self.subject.quantization

    def rounded(
        self, quantization: Quantization, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B,Hkv,n,D) of quantized columns at positions (B,n), as they are read."""
        return quantization.rounded(k, v, positions)

    def quantized_as_of(self, end: int) -> Sequence[int]:
        """The tokens as of which the new ones, up to `end`, find older ones quantized."""
        return range(end - self.n_new, end)

    # Attention, called by the model in place of a cache's

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Keep k, v (B,Hkv,n,D), and attend by the rules: q (B,H,n,D) -> (B,H,n,D)."""
        self.cap = step.kernels.cap if isinstance(step.kernels, CappedKernels) else 0.0
        self.store.add(layer, k, v)
        columns = [[*self.past_columns(layer, b), *self.new[b]] for b in range(q.shape[0])]
        width = max(map(len, columns))
        filler = Column(ZERO, ZERO, -1)
        # In front, so that the new tokens are the last columns of every row.
        rows = [[filler] * (width - len(row)) + row for row in columns]
        keys = self.store.get("k", layer, [[c.key for c in row] for row in rows])
        values = self.store.get("v", layer, [[c.value for c in row] for row in rows])
        keys = self.as_read("k", layer, keys, rows).transpose(1, 2)
        values = self.as_read("v", layer, values, rows).transpose(1, 2)
        seen = [[self._seen(b, i, row, filler) for i in range(self.n_new)]
                for b, row in enumerate(rows)]  # fmt: skip
        mask = torch.tensor(seen, device=q.device)[:, None]
        by = self.quantization
        if isinstance(by, Quantization):
            keys, values, mask = self._quantized(by, keys, values, mask, rows)
        elif by is not None:
            keys, values = by.rounded(keys, values, step.k_pos)
        return self.attention(q, keys, values, mask)

    def _quantized(
        self, by: Quantization, k: Tensor, v: Tensor, mask: Tensor, rows: list[list[Column]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with quantized columns in front, each read in place of its exact one."""
        width = k.shape[2]
        if not (n := by.n_quantized(width - 1)):
            return k, v, mask
        at = torch.tensor([[c.at for c in row[:n]] for row in rows], device=k.device)
        keys, values = self.rounded(by, k[:, :, :n], v[:, :, :n], at)
        tokens = self.quantized_as_of(width)
        read = by.copy_mask(tokens, range(n), range(width)).to(mask.device)
        mask = torch.cat([mask[..., :n], mask], dim=3) & read
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), mask

    def _seen(self, row: int, i: int, columns: list[Column], filler: Column) -> list[bool]:
        query, first = self.new[row][i], len(columns) - self.n_new
        return [
            c is not filler and self.sees(i, query, c, j >= first) for j, c in enumerate(columns)
        ]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return DEFAULT.attention(q, k, v, mask, False, self.cap)
