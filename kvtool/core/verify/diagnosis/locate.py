"""Where a bug first shows: the layer, and what in it is wrong while all before it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.cache import Step
from kvtool.core.kernels.default import Kernels
from kvtool.core.kernels.masks import LazyMask, mask_tensor
from kvtool.core.models import Model
from kvtool.core.models.attention import CrossAttention, SelfAttention
from kvtool.core.models.latent import LatentAttention
from kvtool.core.verify.arms import Case
from kvtool.core.verify.model_subject import ModelSubject
from kvtool.core.verify.scenario_run import Stopped

TOLERANCE = 1e-10  # of the largest value of the uncached pass; both are float64


@dataclass(frozen=True)
class Location:
    """The first thing that is wrong. Heads are key-value heads for stored keys and values."""

    layer: int | None  # None: after the last layer
    part: str  # "attention input", "queries", "visible keys", "stored K", "stored V" ...
    heads: tuple[int, ...] = ()  # none: not a matter of heads
    detail: str = ""

    def __str__(self) -> str:
        where = "after the last layer" if self.layer is None else f"layer {self.layer}"
        heads = ""
        if self.heads:
            word = "head" if len(self.heads) == 1 else "heads"
            heads = f", {word} {ranges(self.heads)}"
        return f"{where}, {self.part}{heads}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Record:
    """What one attention layer saw and answered in one pass."""

    x: Tensor | None = None  # (B,T,d) the normalised input
    step: Step | None = None
    q: Tensor | None = None  # (B,H,T,D)
    k: Tensor | None = None  # (B,Hkv,S,D) all keys that it could read
    v: Tensor | None = None
    mask: Tensor | None = None  # (B,1,T,S) bool
    out: Tensor | None = None  # (B,T,d)


class AttentionRecorder:
    """Kernels that keep what attention was given, under the layer that is running."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.name = kernels.name
        self.records: dict[tuple[str, int], Record] = {}
        self.current: Record | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def __deepcopy__(self, memo: object) -> AttentionRecorder:
        return self  # a forked cache reports to the same place

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | LazyMask | None,
        causal: bool,
        cap: float = 0.0,
    ) -> Tensor:
        if self.current is not None:
            mask = mask_tensor(mask)
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            seen = (seen.tril() if causal else seen) if mask is None else mask
            shape = (q.shape[0], 1, q.shape[2], k.shape[2])
            self.current.q, self.current.k, self.current.v = q.clone(), k.clone(), v.clone()
            self.current.mask = seen.expand(shape).clone()
        asked = (cap,) if cap else ()  # kernels need not know one
        return self.kernels.attention(q, k, v, mask, causal, *asked)


@contextmanager
def recording(model: Model, recorder: AttentionRecorder) -> Iterator[None]:
    """Within, each pass of the decoder leaves a Record for every attention layer."""
    handles = []
    decoder = getattr(model, "decoder", model)
    for module in decoder.modules():
        if isinstance(module, (SelfAttention, LatentAttention, CrossAttention)):
            key = ("cross" if isinstance(module, CrossAttention) else "self", module.layer)
            handles.append(module.register_forward_pre_hook(_enter(recorder, key)))
            handles.append(module.register_forward_hook(_leave(recorder)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(recorder: AttentionRecorder, key: tuple[str, int]) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        step = args[1] if isinstance(args[1], Step) else None
        recorder.current = recorder.records[key] = Record(args[0].clone(), step)

    return hook


def _leave(recorder: AttentionRecorder) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if recorder.current is not None:
            recorder.current.out = out.clone()
        recorder.current = None

    return hook


@torch.inference_mode()
def locate(subject: ModelSubject, case: Case, step: int) -> Location | None:
    """Compare both arms layer by layer at `step`, the first that is wrong, in float64.

    None if the step cannot be reached again, or shows no difference.
    """
    recorder = AttentionRecorder(subject.kernels)
    watched = subject.with_kernels(recorder)
    run = case.run(watched, last=step)
    with recording(subject.model, recorder):
        try:
            case.scenario.play(run)
            return None
        except Stopped as stopped:
            segment, answer = stopped.segment, stopped.answer
        cached, recorder.records = recorder.records, {}
        logits = watched.full(segment.history, segment.start)
    columns = slice(answer.first, answer.first + answer.logits.shape[1])
    place = _first_difference(cached, recorder.records, columns, segment.start.padding)
    if place is None and differs(answer.logits, logits[:, columns]):
        return Location(None, "logits")
    return place


def _first_difference(
    cached: dict[tuple[str, int], Record],
    full: dict[tuple[str, int], Record],
    columns: slice,
    padding: Tensor | None,
) -> Location | None:
    """Go through the attention layers in the order in which they ran."""
    for (kind, layer), record in cached.items():
        found = _in_layer(record, full[kind, layer], kind, columns, padding)
        if found is not None:
            if layer == 0 and found.part == "attention input":
                found = replace(found, detail="of the embedding: the tokens or their positions")
            return replace(found, layer=layer)
    return None


def _in_layer(
    cached: Record, full: Record, kind: str, columns: slice, padding: Tensor | None
) -> Location | None:
    """The first thing in one layer that differs, in the order in which they are computed."""
    cross = "" if kind == "self" else "cross-attention "
    row = _wrong_row(cached.x, full.x, columns, padding)
    if row is not None:
        return Location(None, f"{cross}attention input")
    if cached.q is None or full.q is None or cached.k is None or full.k is None:
        return _output(cached, full, columns, cross)  # a cache with a kernel of its own
    heads = _heads(cached.q, full.q[:, :, columns], padding, columns)
    if heads:
        return Location(None, f"{cross}queries", heads, "their positions, where positions rotate")
    return (
        _keys_seen(cached, full, columns, cross, padding)
        or _stored(cached, full, columns, cross, padding)
        or _output(cached, full, columns, cross)
    )


def _wrong_row(
    found: Tensor | None, expected: Tensor | None, columns: slice, padding: Tensor | None
) -> int | None:
    """The first row of (B,n,d) that differs from the same columns of (B,T,d)."""
    if found is None or expected is None:
        return None
    for row in range(found.shape[0]):
        keep = _real_tokens(padding, row, columns)
        if differs(found[row, keep], expected[row, columns][keep]):
            return row
    return None


def _real_tokens(padding: Tensor | None, row: int, columns: slice) -> slice:
    """The tokens of a step that are no left padding."""
    n_padding = 0 if padding is None else int(padding[row])
    return slice(max(n_padding - columns.start, 0), None)


def _heads(
    found: Tensor, expected: Tensor, padding: Tensor | None, columns: slice
) -> tuple[int, ...]:
    """The heads of (B,H,n,D) that differ, padding aside."""
    wrong: set[int] = set()
    for row in range(found.shape[0]):
        keep = _real_tokens(padding, row, columns)
        for head in range(found.shape[1]):
            if differs(found[row, head, keep], expected[row, head, keep]):
                wrong.add(head)
    return tuple(sorted(wrong))


def _pairs(
    cached: Record, full: Record, columns: slice, padding: Tensor | None
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(row, token of the step, key columns it sees cached, key columns it sees uncached), each
    column list in the order of positions."""
    assert cached.mask is not None and full.mask is not None
    for row in range(cached.mask.shape[0]):
        for i in range(cached.mask.shape[2])[_real_tokens(padding, row, columns)]:
            seen = cached.mask[row, 0, i % cached.mask.shape[2]].nonzero()[:, 0]
            if cached.step is not None and cached.step.k_pos.shape[1] == cached.mask.shape[3]:
                seen = seen[cached.step.k_pos[row, seen].argsort(stable=True)]
            whole = full.mask[row, 0, columns.start + i if full.mask.shape[2] > 1 else 0]
            yield row, i, seen, whole.nonzero()[:, 0]


def _keys_seen(
    cached: Record, full: Record, columns: slice, cross: str, padding: Tensor | None
) -> Location | None:
    """Whether a token sees another number of keys than it should."""
    for row, i, seen, expected in _pairs(cached, full, columns, padding):
        if len(seen) != len(expected):
            detail = f"token {columns.start + i} of row {row} sees {len(seen)}, not {len(expected)}"
            return Location(None, f"{cross}visible keys", (), detail)
    return None


def _stored(
    cached: Record, full: Record, columns: slice, cross: str, padding: Tensor | None
) -> Location | None:
    """Whether keys, then values, are others than those of the positions that should be seen."""
    for part in ("k", "v"):
        found, expected = getattr(cached, part), getattr(full, part)
        if found.shape[1] != expected.shape[1]:  # a cache that expands grouped heads
            expected = expected.repeat_interleave(found.shape[1] // expected.shape[1], dim=1)
        heads: set[int] = set()
        places: set[int] = set()
        for row, _, seen, right in _pairs(cached, full, columns, padding):
            gap = (found[row, :, seen] - expected[row, :, right]).abs().amax(-1)  # (Hkv, S)
            wrong = ~(gap <= TOLERANCE * scale(expected))
            heads.update(wrong.any(1).nonzero()[:, 0].tolist())
            places.update(_tokens(full, right[wrong.any(0)]))
        if heads:
            every = len(heads) == found.shape[1]
            detail = f"of {'token' if len(places) == 1 else 'tokens'} {ranges(sorted(places))}"
            shown = () if every else tuple(sorted(heads))
            return Location(None, f"{cross}stored {part.upper()}", shown, detail)
    return None


def _tokens(full: Record, columns: Tensor) -> list[int]:
    """The numbers of the tokens in these columns of an uncached pass. If it quantizes, some are
    there twice: what comes first is quantized, and everything follows exactly."""
    if full.step is None or full.k is None:
        return columns.tolist()
    n_quantized = full.k.shape[2] - full.step.q_pos.shape[1]
    return [c - n_quantized if c >= n_quantized else c for c in columns.tolist()]


def _output(cached: Record, full: Record, columns: slice, cross: str) -> Location | None:
    if cached.out is None or full.out is None or not differs(cached.out, full.out[:, columns]):
        return None
    return Location(None, f"{cross}attention output")


def scale(values: Tensor) -> float:
    """The largest finite absolute value; 1 if there is none, or all are 0."""
    sizes = values.abs()
    return float(sizes.where(sizes.isfinite(), 0.0).max()) or 1.0


def differs(found: Tensor, expected: Tensor) -> bool:
    """Whether float64 values of one computation are further apart than rounding. NaN differs."""
    if not expected.numel():
        return False
    # Equal infinities, of masks, are no gap, though their difference is NaN.
    gap = float((found - expected).abs().where(found != expected, 0.0).max())
    return not gap <= TOLERANCE * scale(expected)


def ranges(numbers: Sequence[int]) -> str:
    """3, 4, 5 and 9 -> "3-5, 9"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
