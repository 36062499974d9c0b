"""What an encoder-decoder makes of sources: padding, limits, and decoding many of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kvtool.core.decoding.beam import Beam, Hypothesis, beam_search
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.models import Model
from kvtool.core.text.tokenizer import BOS, EOS, PAD
from kvtool.errors import CapacityError

Ids = Sequence[int]
DECODING_BATCH = 256  # sources decoded together


def pad(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids (B,S) with PAD after the shorter ones, and mask (B,S), True = real."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def check_sources(sources: Sequence[Ids], context: int, first: int = 0) -> None:
    """Raise CapacityError for a source that is empty or longer than the model's context.

    Messages count from 1; `first` is the index of the first of `sources`.
    """
    for number, source in enumerate(sources, start=first + 1):
        if not source:
            raise CapacityError(f"source {number}: is empty (expected 1 token or more)")
        if len(source) > context:
            raise CapacityError(
                f"source {number}: is {len(source)} tokens long (the model holds {context})",
                "Shorten it, or train with a longer --context.",
            )


def translate(
    model: Model,
    sources: Sequence[Ids],
    max_tokens: int = 0,
    kind: str = "dynamic",
    kernels: Kernels = DEFAULT,
) -> list[list[int]]:
    """The greedy target of each source, without special tokens; else as `search`."""
    found = search(model, sources, Beam(1), max_tokens, kind, kernels)
    return [hypotheses[0].ids for hypotheses in found]


@torch.inference_mode()
def search(
    model: Model,
    sources: Sequence[Ids],
    beam: Beam,
    max_tokens: int = 0,
    kind: str = "dynamic",
    kernels: Kernels = DEFAULT,
    tell: Callable[[int], None] = lambda nbytes: None,
) -> list[list[Hypothesis]]:
    """The best targets of each source by beam search, in the order of the sources.

    max_tokens 0: as `target_limit` says for each source. Sources of similar length are decoded
    together, and each target is what it would be alone. `tell` is given the bytes of the caches.
    Raises CapacityError.
    """
    found: list[list[Hypothesis]] = [[] for _ in sources]
    size = max(1, DECODING_BATCH // beam.size)
    for rows, ids, mask, limits in _batches(model, sources, max_tokens, size):
        source = model.encode(ids, mask, kernels)
        start = torch.full((len(rows), 1), BOS, device=ids.device)
        best = beam_search(model, start, kind, limits, beam, EOS, source, kernels, tell)
        for i, hypotheses in zip(rows, best, strict=True):
            found[i] = hypotheses
    return found


def _batches(
    model: Model, sources: Sequence[Ids], max_tokens: int, size: int
) -> Iterator[tuple[list[int], Tensor, Tensor, list[int]]]:
    """Sources of similar length together, padded: their indices, ids and mask (B,S), and how long
    each target may become. Raises CapacityError before the first."""
    context, device = model.config.context, next(model.parameters()).device
    check_sources(sources, context)
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        ids, mask = pad([sources[i] for i in rows], device)
        yield rows, ids, mask, [max_tokens or target_limit(len(sources[i]), context) for i in rows]


def target_limit(n_source: int, context: int) -> int:
    """How long a target may become where nobody says."""
    return min(2 * n_source + 20, context - 1)
