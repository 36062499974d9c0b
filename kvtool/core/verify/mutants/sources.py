"""Planted bugs of class 18: a source's keys and values that outlive it, or are read wrongly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from kvtool.core.cache.cross import CrossCache
from kvtool.core.verify.diagnosis.hypotheses import contents
from kvtool.core.verify.model_subject import ModelSession
from kvtool.core.verify.mutants.mutant import Mutant
from kvtool.core.verify.subject import Start

SEEN, KEYS = "visible keys", "stored K"


class KeepsSource(ModelSession):
    """A flag says that the source is there, and is never cleared."""

    first: CrossCache | None = None

    def encode(self, start: Start) -> CrossCache | None:
        new = super().encode(start)
        if self.first is None or new is None:
            self.first = new
            return new
        return self.both(self.first, new)

    def both(self, old: CrossCache, new: CrossCache) -> CrossCache:
        """What is read after the reset."""
        return old


class AppendsSource(KeepsSource):
    """Appends the second source to the first."""

    def both(self, old: CrossCache, new: CrossCache) -> CrossCache:
        layers = [
            (torch.cat([old.layers[i][0], k], dim=2), torch.cat([old.layers[i][1], v], dim=2))
            for i, (k, v) in enumerate(new.layers)
        ]
        return CrossCache(layers, torch.cat([old.mask, new.mask], dim=1))


class KeepsMask(KeepsSource):
    """Reads the second source through the first one's mask."""

    def both(self, old: CrossCache, new: CrossCache) -> CrossCache:
        width = new.mask.shape[1] - old.mask.shape[1]
        return replace(new, mask=F.pad(old.mask, (0, width)))


class SeesPadding(ModelSession):
    """Reads the padding of its source."""

    def encode(self, start: Start) -> CrossCache | None:
        source = super().encode(start)
        return source and replace(source, mask=source.mask | True)


class ReadsFirstSourceLayer(ModelSession):
    """Every layer reads the source's keys and values of layer 0."""

    def encode(self, start: Start) -> CrossCache | None:
        source = super().encode(start)
        return source and replace(source, layers=source.layers[:1] * len(source.layers))


def source(name: str, session: Any, seen_in: str, step: int, layer: int, part: str, hint: str,
           model: str = "seq2seq") -> Mutant:  # fmt: skip
    """A planted bug of sources, in the scenario that has two."""
    return Mutant(
        name, session=session, model=model, bug_class=18, seen_in=seen_in, scenario="two-sources",
        step=step, layer=layer, part=f"cross-attention {part}", hint=hint,
    )  # fmt: skip


SOURCES = (
    source("the source is kept", KeepsSource, "transformers #46111", 7, 0, SEEN,
           contents.SourceKept.hint),
    source("a source is appended", AppendsSource, "transformers #45773", 7, 0, SEEN,
           contents.SourceAppended.hint, "seq2seq, rotary"),
    source("the source's padding is seen", SeesPadding, "x-transformers #311", 0, 0, SEEN,
           contents.SourceUnmasked.hint, "seq2seq, rotary"),
    source("the source's mask is kept", KeepsMask, "", 7, 0, SEEN, contents.SourceMaskKept.hint),
    source("the source's first layer is read", ReadsFirstSourceLayer, "", 0, 1, KEYS,
           contents.SourceFirstLayer.hint),
)  # fmt: skip
