"""Are cached and uncached logits the same? Both arms get equal ids, in two precisions.

Rounding shrinks with the precision and a bug does not: in float64 a right cache is left with a gap
of about 1e-15, a wrong one with the gap that it had. So the float64 run decides, and no tolerance
has to be tuned. Other kernels may serve the working format, and a bug be in them alone: there a
cache must not be further from the float64 run than the uncached run, which has the same rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec, Step, cache_class
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.engine import begin, check_context, feed
from kvtool.core.models import Model
from kvtool.errors import CheckFailed

ROUNDING_64 = 1e-12  # between right caches (about 1e-15) and everything else (1e-9 and more)
# How much further a right cache may be from float64 than the uncached run: 2.0 was the most in 144
# tiny models in each of float32, bfloat16 and float16.
NOISE = 10

IDENTICAL, ROUNDING, BUG, VACUOUS = "identical", "rounding", "bug", "vacuous"


class Gap(NamedTuple):
    """How two runs differ. A step is one generated token; step 0 has the whole prompt's logits."""

    steps: int
    identical: int  # steps whose logits are equal bit for bit
    first: int | None  # the first step that is not
    relative: float  # max |a - b| / max |b| over everything
    ulps: float  # max |a - b| of a step, in units of the spacing at its largest |b|


@dataclass(frozen=True)
class Verdict:
    """What was found for one kind of cache."""

    kind: str
    verdict: str
    working: Gap
    float64: Gap
    first_wrong: int | None  # the first step that differs by more than rounding

    @property
    def right(self) -> bool:
        return self.verdict in (IDENTICAL, ROUNDING)


@torch.inference_mode()
def uncached(
    model: Model, prompt: Tensor, n_new: int, ids: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The reference: each step computes the whole sequence again, the encoder included.

    No cache class is involved. prompt (1,P) is the source of an encoder-decoder. Step 0 yields the
    logits (P,V) of the whole prompt, the others (1,V). The tokens fed are those of `ids` (1,P+N),
    or without it the likeliest ones. Returns the logits of every step, and the ids (1,P+N).
    Raises CapacityError, and CheckFailed if logits are not finite.
    """
    tokens, source = begin(model, prompt)
    n_start = tokens.shape[1]
    check_context(n_start, n_new, model.config.context)
    found = []
    for step in range(n_new):
        if source is not None:
            _, source = begin(model, prompt)
        logits = model(tokens, source=source, last=step > 0)
        if not bool(logits.isfinite().all()):
            raise CheckFailed(
                f"step {step}: the logits are not finite", "Look for NaN in the weights."
            )
        found.append(logits[0])
        end = n_start + step
        token = logits[:, -1:].argmax(-1) if ids is None else ids[:, end : end + 1]
        tokens = torch.cat([tokens, token], dim=1)
    return found, tokens


@torch.inference_mode()
def cached(
    model: Model, prompt: Tensor, ids: Tensor, make: Callable[[CacheSpec], Cache]
) -> list[Tensor]:
    """The logits of the same steps with a cache: the prompt at once, then token by token."""
    weight = next(model.parameters())
    cache = make(CacheSpec.of(model.config, 1, ids.shape[1], weight.dtype, weight.device))
    tokens, source = begin(model, prompt)
    ends = range(tokens.shape[1], ids.shape[1])
    return [feed(model, cache, ids[:, :end], source, last=end > ends[0])[0] for end in ends]


def compare(found: list[Tensor], expected: list[Tensor]) -> Gap:
    """The gap between two runs in one format. NaN counts as infinite."""
    scale = _largest(expected)
    same = [bool(torch.equal(a, b)) for a, b in zip(found, expected, strict=True)]
    gaps = distances(found, expected)
    ulps = [
        gap * scale / spacing(float(b.abs().max()), b.dtype)
        for gap, b in zip(gaps, expected, strict=True)
    ]
    first = same.index(False) if False in same else None
    return Gap(len(same), sum(same), first, max(gaps), max(ulps))


def distances(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Each step's max |a - b|, over max |b| of all steps. NaN counts as infinite."""
    scale = _largest(expected)
    differences = [
        float((a.double() - b.double()).abs().max()) for a, b in zip(found, expected, strict=True)
    ]
    return [math.inf if math.isnan(d) else d / scale for d in differences]


def _largest(logits: list[Tensor]) -> float:
    return max(float(b.abs().max()) for b in logits) or 1.0


def spacing(value: float, dtype: torch.dtype) -> float:
    """The distance from `value` to the next larger number of the format."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(value, info.tiny)))


class Check:
    """Judges caches of one model: the two uncached runs are made once and shared by all kinds."""

    def __init__(self, model: Model, prompt: Tensor, n_new: int) -> None:
        """prompt (1,P); n_new tokens are generated. Raises CapacityError, CheckFailed."""
        self.model = model
        self.prompt = prompt
        self.n_new = n_new
        self._model64 = copy.deepcopy(model).double()
        self._expected, self.ids = uncached(model, prompt, n_new)
        self._expected64, _ = uncached(self._model64, prompt, n_new, self.ids)
        noise = max(distances(self._expected, self._expected64))
        self._limit = NOISE * max(noise, torch.finfo(self._expected[0].dtype).eps)

    def judge(self, kind: str, make: Callable[[CacheSpec], Cache] | None = None) -> Verdict:
        """Run a kind of cache in both precisions; `make` stands in for the registered class."""
        make = make or cache_class(kind)
        found = cached(self.model, self.prompt, self.ids, make)
        found64 = cached(self._model64, self.prompt, self.ids, make)
        working, exact = compare(found, self._expected), compare(found64, self._expected64)
        gaps = zip(
            distances(found64, self._expected64),
            distances(found, self._expected64),
            strict=True,
        )
        wrong = [i for i, (gap, low) in enumerate(gaps) if gap > ROUNDING_64 or low > self._limit]
        if wrong:
            verdict = BUG
        elif getattr(make, "recompute", False) or self.n_new < 2:
            verdict = VACUOUS  # nothing was ever read from a cache
        else:
            verdict = IDENTICAL if working.identical == working.steps else ROUNDING
        return Verdict(kind, verdict, working, exact, wrong[0] if wrong else None)

    def control(self) -> Verdict:
        """Judge a cache with a planted bug: a check that calls this right is worth nothing."""
        return self.judge("planted bug", LostKey)


class LostKey(DynamicCache):
    """A cache that never stores the first token's key in its last layer: small, and wrong."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        if self.length > 0 and layer == self.spec.n_layers - 1:
            keys = keys.clone()
            keys[:, :, 0] = 0.0
        return keys, values
