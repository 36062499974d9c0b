"""Planted bugs of classes 12, 13, 16 and 17: taking back, starting anew, branching, reordering."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor

from kvtool.core.cache import Cache, Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.kernels.masks import mask_tensor
from kvtool.core.verify.diagnosis.hypotheses import rollback
from kvtool.core.verify.model_subject import ModelSession
from kvtool.core.verify.mutants.mutant import DirectSession, LayerwiseCache, Mutant
from kvtool.core.verify.subject import Start

EMBEDDED, ROTATED, SEEN = "attention input", "queries", "visible keys"


# Taking back


class KeepsOneMore(DirectSession):
    """Crops to one token more than it should."""

    def crop(self, length: int) -> None:
        self.cache.crop(length + 1)


class KeepsOneLess(DirectSession):
    """Crops to one token less than it should."""

    def crop(self, length: int) -> None:
        self.cache.crop(length - 1)


class NeverCrops(DirectSession):
    """Keeps what it should take back."""

    def crop(self, length: int) -> None:
        pass


class CropsFirstLayer(LayerwiseCache):
    """Crops the first layer alone."""

    def crop_layer(self, layer: int, pair: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
        return super().crop_layer(layer, pair, n) if layer == 0 else pair


class CropsOtherLayers(LayerwiseCache):
    """Crops all layers but the first."""

    def crop_layer(self, layer: int, pair: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
        return super().crop_layer(layer, pair, n) if layer > 0 else pair


class HighWater(StaticCache):
    """Its mask covers as many slots as were ever in use."""

    highest = 0

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        end = start + n_new
        mask = mask_tensor(step.mask)
        if mask is not None:
            mask = mask.clone()
            mask[..., end : self.highest] = True
            step = replace(step, mask=mask)
        self.highest = max(self.highest, end)
        return step


class StaleValue(StaticCache):
    """The first value after a crop reaches attention, and not the buffer."""

    stale = -1

    def crop(self, length: int) -> None:
        super().crop(length)
        self.stale = length

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        old = self._values[layer][:, :, self.stale].clone()
        keys, values = super().write(layer, k, v, step)
        values = values.clone()
        if self.length == self.stale:
            self._values[layer][:, :, self.stale] = old
        return keys, values


# Starting anew


class NeverResets(DirectSession):
    """Begins with another source, and keeps its cache."""

    def reset(self, start: Start) -> None:
        self.source = self.encode(start)


class PositionsGoOn(DynamicCache):
    """Counts positions in an attribute of its own, which is never reset."""

    seen = 0

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        return replace(step, q_pos=step.q_pos + self.seen)

    def reset(self, left_padding: Tensor | None = None) -> None:
        self.seen += getattr(self, "length", 0)
        super().reset(left_padding)


class LengthKept(StaticCache):
    """Clears its memory and keeps its length."""

    def reset(self, left_padding: Tensor | None = None) -> None:
        length = getattr(self, "length", 0)
        super().reset(left_padding)
        self.length = length
        for buffer in (*self._keys, *self._values):
            buffer.zero_()


class ResetsOtherLayers(LayerwiseCache):
    """Resets all layers but one, the first."""

    kept = 0

    def reset(self, left_padding: Tensor | None = None) -> None:
        held = getattr(self, "_held", {})
        super().reset(left_padding)
        if self.kept in held:
            self._held[self.kept] = held[self.kept]


class ResetsFirstLayer(ResetsOtherLayers):
    """Resets all layers but the second."""

    kept = 1


# Branching


class ForksShallowly(DynamicCache):
    """Shares its buffers with its forks."""

    def fork(self) -> Cache:
        return copy.copy(self)  # the lists of buffers are the same, and are written in place


class ForksKeysOnly(StaticCache):
    """Shares its values with its forks."""

    def fork(self) -> Cache:
        other = copy.deepcopy(self)
        other._values = self._values
        return other


class ForksNothing(DirectSession):
    """Hands out itself as a fork."""

    def fork(self) -> ModelSession:
        return copy.copy(self)


# Reordering


class SelectsNothing(DynamicCache):
    """Reorders the padding alone."""

    def select(self, rows: Tensor) -> None:
        Cache.select(self, rows)


class SelectsKeys(DynamicCache):
    """Reorders one of the two."""

    kept = "_values"

    def select(self, rows: Tensor) -> None:
        held = [t.clone() for t in getattr(self, self.kept)]
        super().select(rows)
        setattr(self, self.kept, held)


class SelectsValues(SelectsKeys):
    """Reorders the values alone."""

    kept = "_keys"


class SelectsFirstLayer(LayerwiseCache):
    """Reorders the first layer alone."""

    def select_layer(
        self, layer: int, keys: Tensor, values: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        return (keys[rows], values[rows]) if layer == 0 else (keys, values)


class SelectsOtherLayers(LayerwiseCache):
    """Reorders all layers but the first."""

    def select_layer(
        self, layer: int, keys: Tensor, values: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        return (keys[rows], values[rows]) if layer > 0 else (keys, values)


class SelectsInverse(StaticCache):
    """Scatters where it should gather."""

    def select(self, rows: Tensor) -> None:
        if len(rows.unique()) == self.batch:
            rows = rows.argsort()
        super().select(rows)


class SelectsHeads(LayerwiseCache):
    """Indexes the axis of heads: as many as rows, or it would not pass silently."""

    def select_layer(
        self, layer: int, keys: Tensor, values: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        return keys[:, rows], values[:, rows]


class SourceStays(ModelSession):
    """Beams are reordered and their sources are not."""

    def select(self, rows: Tensor) -> None:
        source = self.source
        self.source = None
        super().select(rows)
        self.source = source


ROLLBACK = (
    Mutant(
        "crop keeps one too many", session=KeepsOneMore,
        bug_class=12, seen_in="mlx-lm #1528", scenario="crop", step=5, layer=0, part=ROTATED,
        hint=rollback.CropShort.hint,
    ),
    Mutant(
        "crop keeps one too few", StaticCache, KeepsOneLess,
        model="sinusoidal", bug_class=12, seen_in="mlx-lm #1528", scenario="crop", step=5,
        layer=0, part=EMBEDDED, hint=rollback.CropLong.hint,
    ),
    Mutant(
        "crop does nothing", session=NeverCrops,
        model="rotary, one KV head", bug_class=12, scenario="crop", step=5, layer=0, part=ROTATED,
        hint=rollback.CropIgnored.hint,
    ),
    Mutant(
        "crop of the first layer only", CropsFirstLayer,
        model="learned", bug_class=12, seen_in="transformers #48000", scenario="crop", step=5,
        layer=1, part=SEEN, hint=rollback.CropOneLayer.hint,
    ),
    Mutant(
        "crop of all layers but the first", CropsOtherLayers,
        bug_class=12, seen_in="transformers #48000", scenario="crop", step=5, layer=0, part=SEEN,
        hint=rollback.CropOtherLayers.hint,
    ),
    Mutant(
        "taken-back slots stay visible", HighWater,
        model="seq2seq", bug_class=12, scenario="crop", step=5, layer=0, part=SEEN,
        hint=rollback.CropSeen.hint,
    ),
    Mutant(
        "one stale value after a crop", StaleValue,
        model="rotary, one KV head", bug_class=12, scenario="crop", step=6, layer=0,
        part="stored V", hint=rollback.ValueLate.hint,
    ),
    Mutant(
        "reset does nothing", session=NeverResets,
        bug_class=13, seen_in="transformers #48809", scenario="reset", step=3, layer=0,
        part=ROTATED, hint=rollback.ResetIgnored.hint,
    ),
    Mutant(
        "reset keeps the positions", PositionsGoOn,
        model="learned", bug_class=13, scenario="reset", step=3, layer=0, part=EMBEDDED,
        hint=rollback.ResetPosition.hint,
    ),
    Mutant(
        "reset clears keys, not the length", LengthKept, DirectSession,
        bug_class=13, seen_in="transformers #48809", scenario="reset", step=3, layer=0,
        part=ROTATED, hint=rollback.ResetZeros.hint,
    ),
    Mutant(
        "reset of all layers but the first", ResetsOtherLayers,
        model="sinusoidal", bug_class=13, scenario="reset", step=3, layer=0, part=SEEN,
        hint=rollback.ResetOneLayer.hint,
    ),
    Mutant(
        "reset of the first layer only", ResetsFirstLayer,
        model="rotary, one KV head", bug_class=13, seen_in="transformers #48809", scenario="reset",
        step=3, layer=1, part=SEEN, hint=rollback.ResetLastLayer.hint,
    ),
    Mutant(
        "forks share their buffers", ForksShallowly,
        bug_class=16, seen_in="transformers #32159", scenario="fork", step=11, layer=0,
        part="stored K", hint=rollback.ForkShares.hint,
    ),
    Mutant(
        "forks share their values", ForksKeysOnly,
        model="learned", bug_class=16, scenario="fork", step=11, layer=0, part="stored V",
        hint=rollback.ForkSharesValues.hint,
    ),
    Mutant(
        "a fork is the same cache", session=ForksNothing,
        model="sinusoidal", bug_class=16, scenario="fork", step=4, layer=0, part=EMBEDDED,
        hint=rollback.ForkSame.hint,
    ),
    Mutant(
        "beams not reordered", SelectsNothing,
        bug_class=17, seen_in="transformers #34232", scenario="permuted", step=3, layer=0,
        part="stored K", hint=rollback.SelectIgnored.hint,
    ),
    Mutant(
        "beams reordered in K only", SelectsKeys,
        model="sinusoidal", bug_class=17, seen_in="PaddleNLP #6672", scenario="permuted", step=3,
        layer=0, part="stored V", hint=rollback.SelectKeysOnly.hint,
    ),
    Mutant(
        "beams reordered in V only", SelectsValues,
        model="rotary, one KV head", bug_class=17, scenario="permuted", step=3, layer=0,
        part="stored K", hint=rollback.SelectValuesOnly.hint,
    ),
    Mutant(
        "beams reordered in layer 0 only", SelectsFirstLayer,
        model="learned", bug_class=17, seen_in="transformers #46612", scenario="permuted", step=3,
        layer=1, part="stored K", hint=rollback.SelectFirstLayer.hint,
    ),
    Mutant(
        "beams reordered, layer 0 is not", SelectsOtherLayers,
        model="seq2seq, rotary", bug_class=17, scenario="permuted", step=3, layer=0,
        part="stored K", hint=rollback.SelectOtherLayers.hint,
    ),
    Mutant(
        "beams reordered backwards", SelectsInverse,
        bug_class=17, scenario="permuted", step=3, layer=0, part="stored K",
        hint=rollback.SelectInverse.hint,
    ),
    Mutant(
        "beams reordered on the head axis", SelectsHeads,
        model="rotary, three KV heads", bug_class=17, seen_in="transformers #34232",
        scenario="permuted", step=3, layer=0, part="stored K", hint=rollback.SelectHeads.hint,
    ),
    Mutant(
        "sources of beams not reordered", session=SourceStays,
        model="seq2seq", bug_class=17, scenario="permuted", step=3, layer=0,
        part="cross-attention visible keys", hint=rollback.SourceNotSelected.hint,
    ),
)  # fmt: skip
