"""Decoding many sources of an encoder-decoder together: padding, limits and batches."""

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
    """Rows of ids -> ids (B,S) padded at the right with PAD, and mask (B,S) bool, True = real."""
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
    """The greedy target of each source, without special tokens; arguments and errors as `search`.

    -> ids, one list for each source.
    """
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
    on_step: Callable[[int], None] = lambda nbytes: None,
    on_batch: Callable[[list[int], list[list[Hypothesis]]], None] = lambda rows, best: None,
) -> list[list[Hypothesis]]:
    """The best targets of each source by beam search, in the order of the sources.

    max_tokens: of each target; 0 takes `target_limit`. kind: of the cache. on_step: called after
    each step with the bytes of the caches. on_batch: called after each batch with the indices of
    its sources and the targets of each, so that they outlive what ends the search. Sources of
    similar length are decoded together; up to rounding, the result is that of each source alone.
    Raises CapacityError for a source that is empty or too long, or if the cache does not fit into
    memory, and CheckFailed if logits are not finite.
    """
    found: list[list[Hypothesis]] = [[] for _ in sources]
    size = max(1, DECODING_BATCH // beam.size)
    for rows, ids, mask, limits in _batches(model, sources, max_tokens, size):
        source = model.encode(ids, mask, kernels)
        start = torch.full((len(rows), 1), BOS, device=ids.device)
        best = beam_search(model, start, kind, limits, beam, EOS, source, kernels, on_step)
        for i, hypotheses in zip(rows, best, strict=True):
            found[i] = hypotheses
        on_batch(rows, best)
    return found


def _batches(
    model: Model, sources: Sequence[Ids], max_tokens: int, size: int
) -> Iterator[tuple[list[int], Tensor, Tensor, list[int]]]:
    """Yield padded batches of sources of similar length.

    Each is the indices of its sources, ids (B,S), mask (B,S), and the limit of each target. Raises
    CapacityError before the first batch.
    """
    context, device = model.config.context, next(model.parameters()).device
    check_sources(sources, context)
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        ids, mask = pad([sources[i] for i in rows], device)
        yield rows, ids, mask, [max_tokens or target_limit(len(sources[i]), context) for i in rows]


def target_limit(n_source: int, context: int) -> int:
    """The default limit of tokens for the target of a source of `n_source` tokens."""
    return min(2 * n_source + 20, context - 1)
