"""Beam search: several continuations side by side, the likeliest kept, by rows of one cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec, make_cache
from kvtool.core.cache.cross import CrossCache
from kvtool.core.engine import check_context, feed
from kvtool.core.kernels import DEFAULT, Kernels
from kvtool.core.machine import require_memory
from kvtool.core.models import Model
from kvtool.core.models.flat import decoding_form
from kvtool.core.sampling import require_finite


@dataclass(frozen=True)
class Beam:
    """How to search: `size` continuations at a time, of which the best `n_best` are returned."""

    size: int = 4
    length_penalty: float = 0.6  # 0: none, which favours short targets
    n_best: int = 1

    def score(self, log_prob: float, length: int) -> float:
        """What hypotheses of different lengths are compared by (Wu 2016, eq. 14)."""
        return log_prob / ((5 + length) / 6) ** self.length_penalty


@dataclass(frozen=True)
class Hypothesis:
    """A continuation without its end token, which counts in the logarithm of its probability."""

    ids: list[int]
    log_prob: float  # nats
    score: float
    ended: bool  # by the model, not by the limit


@torch.inference_mode()
def beam_search(
    model: Model,
    prompt: Tensor,
    kind: str,
    limits: Sequence[int],
    beam: Beam,
    eos: int | Collection[int] | None = None,
    source: CrossCache | None = None,
    kernels: Kernels = DEFAULT,
    tell: Callable[[int], None] = lambda nbytes: None,
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt (S,P), at most `limits[s]` tokens long, best first.

    `eos` ends a continuation; there may be several such tokens. A prompt is done when `beam.size`
    of its continuations have ended, or at its limit; its rows then leave the batch. `tell` is given
    the bytes of the cache after each step. Raises CapacityError before any work if the context is
    too short, CheckFailed if logits are not finite.
    """
    check_context(prompt.shape[1], max(limits), model.config.context)
    search = _Search(prompt, limits, beam, eos)
    weight = next(model.parameters())
    capacity = prompt.shape[1] + max(limits)
    n_rows = len(limits) * beam.size
    spec = CacheSpec.of(model.config, n_rows, capacity, weight.dtype, weight.device, kernels)
    require_memory(f"a cache for {n_rows} beams", capacity * spec.token_nbytes, weight.device)
    cache: Cache = make_cache(kind, spec)
    if source is not None:
        rows = torch.arange(len(limits), device=prompt.device).repeat_interleave(beam.size)
        source = source.select(rows)
    decode = decoding_form(model)
    while search.active:
        logits = feed(decode, cache, search.ids, source, last=True)[:, -1]
        tell(cache.nbytes().allocated + (source.nbytes() if source else 0))
        require_finite(logits, search.n_made)
        rows = search.advance(logits)
        if search.active:
            cache.select(rows)
            source = None if source is None else source.select(rows)
    return [sorted(found, key=lambda h: -h.score)[: beam.n_best] for found in search.finished]


class _Search:
    """The rows of all prompts that are not done: `beam.size` of the first, then of the next."""

    def __init__(
        self,
        prompt: Tensor,
        limits: Sequence[int],
        beam: Beam,
        eos: int | Collection[int] | None,
    ) -> None:
        self.beam, self.limits = beam, limits
        self.ends = frozenset({eos} if isinstance(eos, int) else eos or ())
        self.n_prompt = prompt.shape[1]
        self.n_made = 0
        self.active = list(range(len(limits)))
        self.finished: list[list[Hypothesis]] = [[] for _ in limits]
        self.ids = prompt.repeat_interleave(beam.size, dim=0)
        # All rows of a prompt begin alike: only one of them counts, or all would stay alike.
        first = torch.full((beam.size,), float("-inf"), dtype=torch.float64)
        first[0] = 0.0
        self.log_probs = first.to(prompt.device).repeat(len(limits), 1)  # (active, size)

    def advance(self, logits: Tensor) -> Tensor:
        """Take logits (R,V) of the rows -> the rows to go on from, one for each that is left."""
        n, size, n_vocab = len(self.active), self.beam.size, logits.shape[1]
        found = self.log_probs[..., None] + logits.double().log_softmax(-1).view(n, size, n_vocab)
        # Each of `size` rows can end in each way once: so many more leave enough that do not.
        n_best = min((1 + max(len(self.ends), 1)) * size, size * n_vocab)
        best = found.flatten(1).topk(n_best, dim=1)
        self.n_made += 1
        rows, tokens, log_probs, left = [], [], [], []
        for i, prompt in enumerate(self.active):
            chosen = self._choose(
                i, prompt, best.values[i].tolist(), best.indices[i].tolist(), n_vocab
            )
            if len(self.finished[prompt]) >= size or self.n_made >= self.limits[prompt]:
                self._stop(prompt, chosen)
                continue
            left.append(prompt)
            rows += [row for row, _, _ in chosen]
            tokens += [token for _, token, _ in chosen]
            log_probs.append([value for _, _, value in chosen])
        self.active = left
        device = self.ids.device
        picked = torch.tensor(rows, dtype=torch.long, device=device)
        new = torch.tensor(tokens, dtype=torch.long, device=device)[:, None]
        self.ids = torch.cat([self.ids[picked], new], dim=1)
        self.log_probs = torch.tensor(log_probs, dtype=torch.float64, device=device)
        return picked

    def _choose(
        self, i: int, prompt: int, values: list[float], indices: list[int], n_vocab: int
    ) -> list[tuple[int, int, float]]:
        """(row, token, log probability) of what goes on; what ends among the best is finished."""
        size = self.beam.size
        going: list[tuple[int, int, float]] = []
        for rank, (value, index) in enumerate(zip(values, indices, strict=True)):
            row, token = i * size + index // n_vocab, index % n_vocab
            if token in self.ends:
                if rank < size and value > float("-inf"):
                    self._finish(prompt, row, None, value)
            elif len(going) < size:
                going.append((row, token, value))
        while len(going) < size:  # fewer tokens than rows: repeat one that counts for nothing
            going.append((going[0][0], going[0][1], float("-inf")))
        return going

    def _stop(self, prompt: int, going: list[tuple[int, int, float]]) -> None:
        """At the limit, what has not ended counts too; of a full beam it does not."""
        if len(self.finished[prompt]) < self.beam.size:
            for row, token, value in going:
                if value > float("-inf"):
                    self._finish(prompt, row, token, value)

    def _finish(self, prompt: int, row: int, token: int | None, log_prob: float) -> None:
        made = self.ids[row, self.n_prompt :].tolist()
        ids = made if token is None else [*made, token]
        score = self.beam.score(log_prob, self.n_made)
        self.finished[prompt].append(Hypothesis(ids, log_prob, score, token is None))
