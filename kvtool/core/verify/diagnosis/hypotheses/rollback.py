"""Hypotheses: tokens taken back, sequences begun anew, rows reordered, and forks go wrong."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kvtool.core.verify.diagnosis.hypothesis import ZERO, Column, Hypothesis
from kvtool.core.verify.subject import Start


class CropIgnored(Hypothesis):
    hint = "crop does nothing: the tokens taken back stay"
    needs = ("crop",)

    def crop(self, length: int) -> None:
        pass


class CropShort(Hypothesis):
    hint = "crop leaves one token too many"
    needs = ("crop",)
    n_extra = 1

    def crop(self, length: int) -> None:
        super().crop(length + self.n_extra)


class CropLong(CropShort):
    hint = "crop takes one token too many"
    n_extra = -1


class _CropPart(Hypothesis):
    """After a crop, some columns still show the tokens that were taken back."""

    needs: tuple[str, ...] = ("crop",)

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.stale: list[list[Column]] = [[] for _ in self.rows]  # of all crops, in their order

    def crop(self, length: int) -> None:
        pairs = zip(self.stale, self.rows, strict=True)
        self.stale = [[*stale, *row[length:]] for stale, row in pairs]
        super().crop(length)


class CropOneLayer(_CropPart):
    hint = "crop acts on the first layer only"

    def past_columns(self, layer: int, row: int) -> list[Column]:
        return [*self.rows[row], *(self.stale[row] if layer else [])]

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        stale = any(column is c for row in self.stale for c in row)
        return stale or super().sees(i, query, column, new)


class CropOtherLayers(CropOneLayer):
    hint = "crop leaves out the first layer"

    def past_columns(self, layer: int, row: int) -> list[Column]:
        return super().past_columns(1 - layer if layer < 2 else 0, row)


class CropSeen(CropOneLayer):
    hint = "the slots of tokens taken back are attended until they are written again"

    def past_columns(self, layer: int, row: int) -> list[Column]:
        held = self.rows[row]
        reach = max((c.at for c in (*held, *self.new[row])), default=-1)
        last = {c.at: c for c in self.stale[row] if c.at > reach}
        return [*held, *last.values()]


class ValueLate(_CropPart):
    hint = "after a crop, the first value is not written: one of the tokens taken back stays"

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.values: list[dict[int, Column]] = [{} for _ in self.rows]

    def crop(self, length: int) -> None:
        for values, row in zip(self.values, self.rows, strict=True):
            values.update({old.at: old for old in row[length : length + 1]})
        super().crop(length)

    def past_columns(self, layer: int, row: int) -> list[Column]:
        old = self.values[row]
        return [c._replace(value=old[c.at].value) if c.at in old else c for c in self.rows[row]]


class RingCropped(_CropPart):
    hint = "a wrapped ring is cropped by its length alone: overwritten slots pass for older tokens"
    needs = ("crop", "window")

    def past_columns(self, layer: int, row: int) -> list[Column]:
        window = self.subject.window
        over = {c.at - window: c for c in self.stale[row]}  # they took the slots of these
        return [
            c if c.at not in over else c._replace(key=over[c.at].key, value=over[c.at].value)
            for c in self.rows[row]
        ]


class EvictedBeforeCrop(Hypothesis):
    hint = "a crop goes back to where keys were evicted that the next token needs"
    needs = ("crop", "window")

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.kept = 0  # the first token that was not evicted before a crop

    def crop(self, length: int) -> None:
        # A step of several tokens leaves room for one more.
        self.kept = len(self.rows[0]) - self.subject.window + int(self.n_new > 1)
        super().crop(length)

    def past_columns(self, layer: int, row: int) -> list[Column]:
        return [c for c in self.rows[row] if c.at >= self.kept or c.at < self.subject.sinks]


# Starting anew


class ResetIgnored(Hypothesis):
    hint = "reset does nothing: the second sequence goes on after the first"
    needs = ("reset",)

    def reset(self, start: Start) -> None:
        held = self.rows
        super().reset(start)
        if len(held) == len(self.rows):
            self.rows = held


class ResetPosition(Hypothesis):
    hint = "reset drops the keys but keeps the length: positions go on"
    needs = ("reset",)

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.offset = 0

    def reset(self, start: Start) -> None:
        length = len(self.rows[0])
        super().reset(start)
        self.offset = length

    def positions(self, row: int, n: int) -> list[int]:
        return [p + self.offset for p in super().positions(row, n)]


class ResetZeros(ResetPosition):
    hint = "reset clears the keys but keeps the length: cleared slots are attended"

    def past_columns(self, layer: int, row: int) -> list[Column]:
        return [*[Column(ZERO, ZERO, 0)] * self.offset, *super().past_columns(layer, row)]


class ResetOneLayer(Hypothesis):
    hint = "reset leaves out the first layer"
    needs = ("reset",)
    stale_layer = 0

    def _begin(self, start: Start) -> None:
        self.earlier = getattr(self, "rows", [])
        super()._begin(start)

    def past_columns(self, layer: int, row: int) -> list[Column]:
        kept = self.earlier[row] if layer == self.stale_layer and row < len(self.earlier) else []
        return [*(c._replace(at=0) for c in kept), *super().past_columns(layer, row)]


class ResetLastLayer(ResetOneLayer):
    hint = "reset leaves out the last layer"

    @property
    def stale_layer(self) -> int:  # type: ignore[override]
        return self.n_layers - 1


# Reordering


class SelectIgnored(Hypothesis):
    hint = "select does nothing: every row goes on from another row's past"
    needs = ("select",)
    parts: tuple[str, ...] = ("key", "value")
    layers: tuple[int, ...] | None = None  # None: all

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.unselected = [list(row) for row in self.rows]

    def feed(self, ids: Tensor) -> Tensor:
        logits = super().feed(ids)
        for row, new in zip(self.unselected, self.new, strict=True):
            row.extend(new)
        return logits

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        batch = len(self.rows)
        spare = [list(row) for row in self.rows]
        self.unselected = [
            self.unselected[b] if b < len(self.unselected) else spare[b] for b in range(batch)
        ]

    def past_columns(self, layer: int, row: int) -> list[Column]:
        true = self.rows[row]
        if self.layers is not None and layer not in self.layers:
            return true
        other = self.unselected[row]
        if len(other) != len(true):
            return true
        return [
            c._replace(**{part: getattr(o, part) for part in self.parts})
            for c, o in zip(true, other, strict=True)
        ]


class SelectKeysOnly(SelectIgnored):
    hint = "select reorders the keys only: each row meets another row's values"
    parts = ("value",)


class SelectValuesOnly(SelectIgnored):
    hint = "select reorders the values only: each row meets another row's keys"
    parts = ("key",)


class SelectFirstLayer(SelectIgnored):
    hint = "select reorders the first layer only"

    @property
    def layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(1, self.n_layers))


class SelectOtherLayers(SelectIgnored):
    hint = "select leaves out the first layer"
    layers = (0,)


class SelectInverse(Hypothesis):
    hint = "select applies the inverse of the permutation"
    needs = ("select",)

    def select(self, rows: Tensor) -> None:
        held = [list(row) for row in self.rows]
        super().select(rows)
        if sorted(rows.tolist()) == list(range(len(held))):
            self.rows = [held[i] for i in rows.argsort().tolist()]


class SelectHeads(Hypothesis):
    hint = "select reorders the heads: it is applied to the wrong axis"
    needs = ("select",)

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.orders: list[tuple[int, list[int]]] = []  # tokens that an order applies to, the order

    def select(self, rows: Tensor) -> None:
        if len(rows) != self.subject.model.config.n_kv_heads:
            raise ValueError("this would not go unnoticed")
        self.orders.append((self.store.n_tokens, rows.tolist()))

    def as_read(self, part: str, layer: int, stored: Tensor, columns: list[list[Column]]) -> Tensor:
        for n_tokens, order in self.orders:
            old = torch.tensor([[c.key < n_tokens for c in row] for row in columns])
            stored = torch.where(
                old[..., None, None].to(stored.device), stored[:, :, order], stored
            )
        return stored


class SourceNotSelected(Hypothesis):
    hint = "select leaves out the source: a row goes on with another row's source"
    needs = ("select", "source")

    def select(self, rows: Tensor) -> None:
        source = self.source
        super().select(rows)
        self.source = source


# Branching


class ForkShares(Hypothesis):
    hint = "forks share their storage: one continuation overwrites the other's tokens"
    needs: tuple[str, ...] = ("fork",)
    parts: tuple[str, ...] = ("key", "value")

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.slots: dict[tuple[int, int], Column] = {}  # what was written there last, by any fork

    def feed(self, ids: Tensor) -> Tensor:
        logits = super().feed(ids)
        for b, row in enumerate(self.rows):
            n = len(row) - self.n_new
            self.slots.update({(b, n + i): c for i, c in enumerate(row[n:])})
        return logits

    def past_columns(self, layer: int, row: int) -> list[Column]:
        written = [self.slots.get((row, j), c) for j, c in enumerate(self.rows[row])]
        return [
            c._replace(**{part: getattr(w, part) for part in self.parts})
            for c, w in zip(self.rows[row], written, strict=True)
        ]


class ForkSharesValues(ForkShares):
    hint = "forks share their values: one continuation overwrites the other's"
    parts = ("value",)


class ForkSame(Hypothesis):
    hint = "fork hands out the same cache: one continuation goes on after the other"
    needs = ("fork",)

    def fork(self) -> Hypothesis:
        return copy.copy(self)  # the lists of columns are shared


ROLLBACK: tuple[type[Hypothesis], ...] = (
    CropIgnored, CropShort, CropLong, CropOneLayer, CropOtherLayers, CropSeen, ValueLate,
    RingCropped, EvictedBeforeCrop, ResetIgnored, ResetPosition, ResetZeros, ResetOneLayer,
    ResetLastLayer, SelectIgnored, SelectKeysOnly, SelectValuesOnly, SelectFirstLayer,
    SelectOtherLayers, SelectInverse, SelectHeads, SourceNotSelected, ForkShares, ForkSharesValues,
    ForkSame,
)  # fmt: skip
