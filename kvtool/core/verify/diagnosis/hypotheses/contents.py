"""Hypotheses: what the slots hold, or what is read out of them, is not what it should be."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.core.cache.cross import CrossCache
from kvtool.core.models import Model
from kvtool.core.models.rope import Rotary
from kvtool.core.verify.diagnosis.hypothesis import ZERO, Column, Hypothesis
from kvtool.core.verify.subject import Start

# Slots


class EmptySlots(Hypothesis):
    """Zeros after the last token are attended; how many is a guess of buffers in use."""

    hint = "slots that nothing was written to are attended: the mask covers the whole buffer"

    def past_columns(self, layer: int, row: int) -> list[Column]:
        used = len(self.rows[row]) + self.n_new
        n = self.buffer_end(used) - used if self.rows[row] else 0
        return [*super().past_columns(layer, row), *[Column(ZERO, ZERO, 0)] * max(n, 0)]

    def buffer_end(self, used: int) -> int:
        """How many slots of the buffer are attended, of which `used` are filled."""
        return self.capacity


class EmptyBlock(EmptySlots):
    """The slots of the block that is filled last are attended."""

    def buffer_end(self, used: int) -> int:
        return min(-(-used // 64) * 64, self.capacity)


class OneEmptySlot(EmptySlots):
    hint = "one slot after the last token is attended"

    def buffer_end(self, used: int) -> int:
        return used + 1


class _KnowsPrompt(Hypothesis):
    """Remembers how many tokens the first step had."""

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.prompt = 0

    def feed(self, ids: Tensor) -> Tensor:
        logits = super().feed(ids)
        self.prompt = self.prompt or ids.shape[1]
        return logits


class SlotBefore(_KnowsPrompt):
    hint = "new tokens are stored one slot too low: over the prompt's last, and one stays empty"

    def past_columns(self, layer: int, row: int) -> list[Column]:
        held = list(self.rows[row])
        if held:
            held[self.prompt - 1] = Column(ZERO, ZERO, 0)
        return held


class NotStored(_KnowsPrompt):
    hint = "only the prompt is ever stored: later tokens are read once, and lost"

    def past_columns(self, layer: int, row: int) -> list[Column]:
        return self.rows[row][: self.prompt]


class NotStoredLastLayer(NotStored):
    hint = "the last layer stores only the prompt: zeros are read for the tokens after it"

    def past_columns(self, layer: int, row: int) -> list[Column]:
        held = self.rows[row]
        if layer < self.n_layers - 1:
            return held
        lost = [c._replace(key=ZERO, value=ZERO) for c in held[self.prompt :]]
        return [*held[: self.prompt], *lost]


class LostInGrowth(Hypothesis):
    hint = "growing the buffer copies nothing: what was stored before reads as zero"
    columns = 64  # of the first buffer

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.lost = 0  # tokens before this one

    def feed(self, ids: Tensor) -> Tensor:
        held = len(self.rows[0])
        if held <= self.columns < held + ids.shape[1]:
            self.lost = held
        return super().feed(ids)

    def past_columns(self, layer: int, row: int) -> list[Column]:
        held = self.rows[row]
        empty = [c._replace(key=ZERO, value=ZERO) for c in held[: self.lost]]
        return [*empty, *held[self.lost :]]


# Contents


def rotary_of(model: Model) -> Rotary | None:
    """The rotation of a model's decoder, if it has one."""
    return getattr(model, "decoder", model).rotary  # type: ignore[return-value]


class RotatedAgain(Hypothesis):
    hint = "stored keys are rotated again each time that they are read"
    fresh = False  # whether the step's own keys are too

    def as_read(self, part: str, layer: int, stored: Tensor, columns: list[list[Column]]) -> Tensor:
        rotary = rotary_of(self.subject.model)
        if part == "v" or rotary is None or not any(self.rows):
            return stored
        pos = torch.tensor([[c.at for c in row] for row in columns], device=stored.device)
        turned = rotary(stored.transpose(1, 2), pos).transpose(1, 2)
        n_past = 0 if self.fresh else stored.shape[1] - self.n_new
        return turned if self.fresh else torch.cat([turned[:, :n_past], stored[:, n_past:]], dim=1)


class RotatedAgainAll(RotatedAgain):
    """The step's own keys are rotated again too."""

    fresh = True


class RotatedEachStep(RotatedAgain):
    hint = "stored keys are rotated again and written back: the angle grows with each step"

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.calls = 0

    def feed(self, ids: Tensor) -> Tensor:
        self.calls += 1
        self.fed = getattr(self, "fed", {})  # the call that brought a token, by its number
        first = self.store.n_tokens
        self.fed.update({first + i: self.calls for i in range(ids.numel())})
        return super().feed(ids)

    def as_read(self, part: str, layer: int, stored: Tensor, columns: list[list[Column]]) -> Tensor:
        rotary = rotary_of(self.subject.model)
        if part == "v" or rotary is None:
            return stored
        ages = [[self.calls - self.fed.get(c.key, self.calls) for c in row] for row in columns]
        turns = torch.tensor(ages, device=stored.device)
        at = torch.tensor([[c.at for c in row] for row in columns], device=stored.device)
        return rotary(stored.transpose(1, 2), at.clamp(min=0) * turns).transpose(1, 2)


class FirstLayerValues(Hypothesis):
    hint = "past values are read from layer 0 in every layer"
    part = "v"

    def as_read(self, part: str, layer: int, stored: Tensor, columns: list[list[Column]]) -> Tensor:
        if part != self.part:
            return stored
        tokens = [[getattr(c, "key" if part == "k" else "value") for c in r] for r in columns]
        other = self.store.get(part, 0, tokens)
        n_past = stored.shape[1] - self.n_new
        return torch.cat([other[:, :n_past], stored[:, n_past:]], dim=1)


class FirstLayerKeys(FirstLayerValues):
    hint = "past keys are read from layer 0 in every layer"
    part = "k"


class HeadsTiled(Hypothesis):
    hint = "grouped heads are expanded by tiling: query heads read another group's keys and values"

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        n = q.shape[1] // k.shape[1]
        if any(self.rows):
            k, v = k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1)
        return super().attention(q, k, v, mask)


# Sources


class SourceKept(Hypothesis):
    hint = "the source's keys and values are kept over a reset: a second source is never read"
    needs = ("source", "reset")

    def reset(self, start: Start) -> None:
        source = self.source
        super().reset(start)
        if source is not None and self.source is not None:
            self.source = self.source_read(source, self.source)

    def source_read(self, old: CrossCache, new: CrossCache) -> CrossCache:
        """What is read of both sources after the reset."""
        return old


class SourceAppended(SourceKept):
    hint = "a second source is appended to the first one's keys and values"

    def source_read(self, old: CrossCache, new: CrossCache) -> CrossCache:
        pairs = zip(old.layers, new.layers, strict=True)
        layers = [(torch.cat([a, c], 2), torch.cat([b, d], 2)) for (a, b), (c, d) in pairs]
        return CrossCache(layers, torch.cat([old.mask, new.mask], 1))


class SourceMaskKept(SourceKept):
    hint = "a second source is read through the first one's padding mask"

    def source_read(self, old: CrossCache, new: CrossCache) -> CrossCache:
        width = new.mask.shape[1]
        missing = max(width - old.mask.shape[1], 0)
        return replace(new, mask=F.pad(old.mask, (0, missing))[:, :width])


class SourceUnmasked(Hypothesis):
    hint = "the source's padding is attended"
    needs = ("source",)

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        if self.source is not None:
            self.source = replace(self.source, mask=torch.ones_like(self.source.mask))


class SourceFirstLayer(SourceUnmasked):
    hint = "every layer reads the source's keys and values of layer 0"

    def _begin(self, start: Start) -> None:
        Hypothesis._begin(self, start)
        if self.source is not None:
            self.source = replace(self.source, layers=[self.source.layers[0]] * self.n_layers)


CONTENTS: tuple[type[Hypothesis], ...] = (
    EmptySlots, EmptyBlock, OneEmptySlot, LostInGrowth, SlotBefore, NotStored, NotStoredLastLayer,
    RotatedAgain, RotatedAgainAll, RotatedEachStep, FirstLayerValues, FirstLayerKeys, HeadsTiled,
    SourceKept, SourceAppended, SourceMaskKept, SourceUnmasked, SourceFirstLayer,
)  # fmt: skip
