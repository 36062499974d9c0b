"""Beam search: several continuations side by side, the likeliest kept, by rows of one cache."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec, make_cache
from kvtool.core.cache.cross import CrossCache
from kvtool.core.decoding.dispatch import DecodingForm, decoding_form
from kvtool.core.decoding.engine import check_context, feed
from kvtool.core.decoding.sampling import require_finite
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.machine import require_memory
from kvtool.core.models import Model

NOTHING = float("-inf")  # the logarithm of what cannot be

Choice = tuple[int, int, float]  # a row, the token after it, nats of both


@dataclass(frozen=True)
class Beam:
    """How to search: `size` live continuations at a time, and the best `n_best` are returned."""

    size: int = 4  # 1: the greedy continuation alone
    length_penalty: float = 0.6  # 0: none, which favours short targets
    n_best: int = 1

    @property
    def n_rows(self) -> int:
        """Rows that one prompt may need: the greedy continuation may be none of the likeliest."""
        return self.size + (self.size > 1)

    def score(self, log_prob: float, length: int) -> float:
        """What hypotheses of different lengths are compared by (Wu 2016, eq. 14)."""
        return log_prob / ((5 + length) / 6) ** self.length_penalty

    def bound(self, log_prob: float, length: int, limit: int) -> float:
        """The best score that a live continuation of `length` tokens may still reach.

        It can only lose probability, and will have from one token more to `limit`. The penalty
        rises or falls with the length all the way, so one of these two lengths is the best.
        """
        return max(self.score(log_prob, length + 1), self.score(log_prob, limit))


@dataclass(frozen=True)
class Hypothesis:
    """A continuation without its end token, which counts in the logarithm of its probability."""

    ids: list[int]
    log_prob: float  # nats
    score: float
    ended: bool  # by the model, not by the limit


@torch.inference_mode()
def beam_search(
    model: Model | DecodingForm,
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

    `eos` ends a continuation; there may be several such tokens. What ends takes no place from what
    is live: each live row may end at each step, and the `beam.n_best` best of all that ended are
    kept, while the `beam.size` likeliest that did not end live on. A row leaves the batch when it
    can no longer become one of the best, whatever the length penalty (`Beam.bound`), and a prompt
    with its last row. What reaches the limit unended is ranked with the rest by the same score:
    targets that ended, and those cut at the limit, are all there is, and their probabilities add up
    to one.

    The best is never below the greedy continuation, which plain beam search may lose: where that is
    not among the likeliest, one more row carries it on, and nothing but it: the cost is that row,
    as long as it lives, and room for it in the cache. (With default kernels
    a row's rounding depends on the batch, so near ties may fall otherwise than alone.) Nor is it
    below plain beam search of this size; a larger beam may still find less than a smaller one.

    `tell` is given the bytes of the cache after each step. Raises CapacityError before any work if
    the context is too short, CheckFailed if logits are not finite.
    """
    check_context(prompt.shape[1], max(limits), model.config.context)
    search = _Search(prompt, limits, beam, eos)
    decode = decoding_form(model)
    weight = next(decode.model.parameters())
    capacity = prompt.shape[1] + max(limits)
    n_rows = len(limits) * beam.n_rows
    spec = CacheSpec.of(model.config, n_rows, capacity, weight.dtype, weight.device, kernels)
    what, needed = f"a cache for {n_rows} beams", capacity * spec.token_nbytes
    require_memory(what, needed, weight.device, dtype=weight.dtype)
    cache: Cache = make_cache(kind, spec)
    cache.select(torch.arange(len(limits), device=prompt.device))  # one row reads a prompt
    read, reading = source, search.prompts
    while search.rows:
        logits = feed(decode, cache, search.ids, read, last=True)[:, -1]
        tell(cache.nbytes().allocated + (read.nbytes() if read else 0))
        require_finite(logits, search.n_made)
        n_before, rows = len(search.rows), search.advance(logits)
        if rows and rows != list(range(n_before)):
            cache.select(torch.tensor(rows, device=prompt.device))
        if source is not None and rows and reading != search.prompts:
            reading = search.prompts
            read = source.select(torch.tensor(reading, device=prompt.device))
    return search.best


class _Row(NamedTuple):
    """A continuation that has not ended: that of row `parent` of the step before, and `token`."""

    prompt: int
    parent: int
    token: int
    log_prob: float  # nats
    in_beam: bool  # among the likeliest; else here only for being greedy
    is_greedy: bool


class _Search:
    """The rows of all prompts that are not done: those of the first, then of the next."""

    def __init__(
        self,
        prompt: Tensor,
        limits: Sequence[int],
        beam: Beam,
        eos: int | Collection[int] | None,
    ) -> None:
        self.beam, self.limits = beam, limits
        self.ends = sorted({eos} if isinstance(eos, int) else set(eos or ()))
        self.n_prompt = prompt.shape[1]
        self.n_made = 0
        self.ids = prompt  # (R,P+n_made)
        self.rows = [_Row(i, i, -1, 0.0, beam.size > 1, True) for i in range(len(limits))]
        self.best: list[list[Hypothesis]] = [[] for _ in limits]

    @property
    def prompts(self) -> list[int]:
        """That of each row."""
        return [row.prompt for row in self.rows]

    def advance(self, logits: Tensor) -> list[int]:
        """Take logits (R,V) of the rows -> the rows to go on from, one for each that is left."""
        before = torch.tensor([row.log_prob for row in self.rows], dtype=torch.float64)
        found = before.to(logits.device)[:, None] + logits.double().log_softmax(-1)
        top = logits.max(-1).indices
        greedy = list(zip(top.tolist(), found.gather(1, top[:, None])[:, 0].tolist(), strict=True))
        ending = [NOTHING] * len(found)
        if self.ends:
            # Of several ways to end only the likeliest: others would be the same target again.
            ending = found[:, self.ends].amax(-1).tolist()
            found[:, self.ends] = NOTHING
        self.n_made += 1
        members: dict[int, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            members.setdefault(prompt, []).append(i)
        likeliest = self._likeliest(list(members.values()), found)
        rows: list[_Row] = []
        for (prompt, own), choices in zip(members.items(), likeliest, strict=True):
            rows += self._follow(prompt, own, choices, ending, greedy)
        self.rows, parents = rows, [row.parent for row in rows]
        tokens = self.ids.new_tensor([row.token for row in rows])
        self.ids = torch.cat([self.ids[parents], tokens[:, None]], dim=1)
        return parents

    def _likeliest(self, members: list[list[int]], found: Tensor) -> list[list[Choice]]:
        """How the beams of each prompt, which are among its rows `members`, go on, the likeliest
        `size` ways by found (R,V)."""
        beams = [[i for i in own if self.rows[i].in_beam] for own in members]
        width, n_vocab = max(map(len, beams)), found.shape[1]
        if not width:
            return [[] for _ in members]
        rows = [i for own in beams for i in own]
        if len(rows) < len(beams) * width or len(rows) < len(found):
            places = [n * width + i for n, own in enumerate(beams) for i in range(len(own))]
            padded = found.new_full((len(beams) * width, n_vocab), NOTHING)
            padded[places] = found[rows]
            found = padded
        best = found.view(len(beams), -1).topk(min(self.beam.size, width * n_vocab), dim=1)
        return [
            [(own[i // n_vocab], i % n_vocab, value) for value, i in ranked if value > NOTHING]
            for own, ranked in zip(
                beams, map(zip, best.values.tolist(), best.indices.tolist()), strict=True
            )
        ]

    def _follow(
        self,
        prompt: int,
        own: list[int],
        choices: list[Choice],
        ending: list[float],
        greedy: list[tuple[int, float]],
    ) -> list[_Row]:
        """Take in what ends of a prompt's rows `own` -> how they go on, if they may still win."""
        going = [
            _Row(prompt, i, token, value, True, self.rows[i].is_greedy and token == greedy[i][0])
            for i, token, value in choices
        ]
        for i in own:
            token, value = greedy[i]
            ends = token in self.ends
            if self.rows[i].in_beam:
                self._take(prompt, i, None, ending[i])
            elif ends:
                self._take(prompt, i, None, value)
            if self.rows[i].is_greedy and not ends and not any(row.is_greedy for row in going):
                going.append(_Row(prompt, i, token, value, False, True))
        if self.n_made == self.limits[prompt]:
            for row in going:
                self._take(prompt, row.parent, row.token, row.log_prob)
            return []
        worst = self._worst(prompt)
        limit = self.limits[prompt]
        return [r for r in going if self.beam.bound(r.log_prob, self.n_made, limit) > worst]

    def _worst(self, prompt: int) -> float:
        """What a hypothesis must surpass to be one of the best."""
        best = self.best[prompt]
        return best[-1].score if len(best) == self.beam.n_best else NOTHING

    def _take(self, prompt: int, row: int, token: int | None, log_prob: float) -> None:
        """Make a row a hypothesis, ended or with its last token, if it is one of the best."""
        score = self.beam.score(log_prob, self.n_made)
        if score <= self._worst(prompt):
            return
        made = self.ids[row, self.n_prompt :].tolist()
        ids = made if token is None else [*made, token]
        best = self.best[prompt]
        insort(best, Hypothesis(ids, log_prob, score, token is None), key=lambda h: -h.score)
        del best[self.beam.n_best :]
