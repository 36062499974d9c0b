"""Beam search: the likeliest continuations of a prompt, each in a row of one cache."""

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

NOTHING = float("-inf")  # the logarithm of probability 0

Choice = tuple[int, int, float]  # a row, its next token, and the log probability of both in nats


@dataclass(frozen=True)
class Beam:
    """How to search: with `size` live continuations of each prompt, for the best `n_best`."""

    size: int = 4  # 1: only the greedy continuation
    length_penalty: float = 0.6  # 0: no penalty, which favours short targets
    n_best: int = 1

    @property
    def n_rows(self) -> int:
        """Cache rows for one prompt: the beam, and one for a greedy continuation outside it."""
        return self.size + (self.size > 1)

    def score(self, log_prob: float, length: int) -> float:
        """The score that ranks hypotheses of different lengths (Wu 2016, eq. 14)."""
        return log_prob / ((5 + length) / 6) ** self.length_penalty

    def bound(self, log_prob: float, length: int, limit: int) -> float:
        """The best score that a live continuation of `length` tokens may still reach.

        Its probability can only fall, and it will end with between length + 1 and `limit` tokens.
        The penalty is monotonic in the length, so one of these two lengths gives the best score.
        """
        return max(self.score(log_prob, length + 1), self.score(log_prob, limit))


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation."""

    ids: list[int]  # without the end token
    log_prob: float  # nats, the end token included
    score: float  # `Beam.score`
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
    on_step: Callable[[int], None] = lambda nbytes: None,
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt (S,P), at most `limits[s]` tokens long, best first.

    kind: of the cache. eos: the tokens that end a continuation. source: the encoded sources (S,...)
    of an encoder-decoder. on_step: called after each step with the bytes of the caches.

    Every live row may end at every step. The `beam.n_best` best ended continuations are kept. The
    `beam.size` likeliest that did not end stay live; ended ones take none of these places. A row
    leaves the batch when no length can make it one of the best (`Beam.bound`), and a prompt leaves
    with its last row. A continuation cut at the limit is ranked by the same score as those that
    ended. Together they are all possible outcomes, and their probabilities add up to one.

    The best score is never below that of the greedy continuation, which plain beam search may lose.
    If the greedy continuation is not among the likeliest, an extra row of the cache carries it on.
    Nor is the best score below that of plain beam search of this size. A larger beam may still find
    a worse one than a smaller beam. With default kernels the rounding of a row depends on the
    batch, so near ties may be decided otherwise than alone.

    Raises CapacityError, before any work, if the context is too short or the cache does not fit
    into memory, and CheckFailed if logits are not finite.
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
    cache.select(torch.arange(len(limits), device=prompt.device))  # one row prefills each prompt
    read, reading = source, search.prompts
    while search.rows:
        logits = feed(decode, cache, search.ids, read, last=True)[:, -1]
        on_step(cache.nbytes().allocated + (read.nbytes() if read else 0))
        require_finite(logits, search.n_generated)
        n_before, rows = len(search.rows), search.advance(logits)
        if rows and rows != list(range(n_before)):
            cache.select(torch.tensor(rows, device=prompt.device))
        if source is not None and rows and reading != search.prompts:
            reading = search.prompts
            read = source.select(torch.tensor(reading, device=prompt.device))
    return search.best


class _Row(NamedTuple):
    """A live continuation: that of row `parent` of the step before, then `token`."""

    prompt: int  # index of its prompt
    parent: int
    token: int
    log_prob: float  # nats
    in_beam: bool  # False: it is kept only because it is the greedy continuation
    is_greedy: bool


class _Search:
    """The live rows of all unfinished prompts, in the order of the prompts."""

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
        self.n_generated = 0
        self.ids = prompt  # (R,P+n_generated)
        self.rows = [_Row(i, i, -1, 0.0, beam.size > 1, True) for i in range(len(limits))]
        self.best: list[list[Hypothesis]] = [[] for _ in limits]

    @property
    def prompts(self) -> list[int]:
        """The prompt of each row."""
        return [row.prompt for row in self.rows]

    def advance(self, logits: Tensor) -> list[int]:
        """Extend the rows by their logits (R,V) -> the parent row of each row that is live now."""
        before = torch.tensor([row.log_prob for row in self.rows], dtype=torch.float64)
        found = before.to(logits.device)[:, None] + logits.double().log_softmax(-1)
        top = logits.max(-1).indices
        greedy = list(zip(top.tolist(), found.gather(1, top[:, None])[:, 0].tolist(), strict=True))
        ending = [NOTHING] * len(found)
        if self.ends:
            # Only the likeliest end token counts: the others would give the same target again.
            ending = found[:, self.ends].amax(-1).tolist()
            found[:, self.ends] = NOTHING
        self.n_generated += 1
        members: dict[int, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            members.setdefault(prompt, []).append(i)
        likeliest = self._likeliest(list(members.values()), found)
        rows: list[_Row] = []
        for (prompt, own), choices in zip(members.items(), likeliest, strict=True):
            rows += self._extend(prompt, own, choices, ending, greedy)
        self.rows, parents = rows, [row.parent for row in rows]
        tokens = self.ids.new_tensor([row.token for row in rows])
        self.ids = torch.cat([self.ids[parents], tokens[:, None]], dim=1)
        return parents

    def _likeliest(self, members: list[list[int]], found: Tensor) -> list[list[Choice]]:
        """The `size` likeliest next choices for each prompt, among the beam rows in `members`.

        found (R,V): the log probability of each row with each next token.
        """
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

    def _extend(
        self,
        prompt: int,
        own: list[int],
        choices: list[Choice],
        ending: list[float],
        greedy: list[tuple[int, float]],
    ) -> list[_Row]:
        """Record the ended continuations of a prompt's rows `own` -> its next rows, without those
        that cannot become one of the best.

        ending: each row's log probability with the end token. greedy: its likeliest token with the
        log probability.
        """
        going = [
            _Row(prompt, i, token, value, True, self.rows[i].is_greedy and token == greedy[i][0])
            for i, token, value in choices
        ]
        for i in own:
            token, value = greedy[i]
            ends = token in self.ends
            if self.rows[i].in_beam:
                self._add_hypothesis(prompt, i, None, ending[i])
            elif ends:
                self._add_hypothesis(prompt, i, None, value)
            if self.rows[i].is_greedy and not ends and not any(row.is_greedy for row in going):
                going.append(_Row(prompt, i, token, value, False, True))
        if self.n_generated == self.limits[prompt]:
            for row in going:
                self._add_hypothesis(prompt, row.parent, row.token, row.log_prob)
            return []
        worst = self._score_to_beat(prompt)
        limit = self.limits[prompt]
        return [r for r in going if self.beam.bound(r.log_prob, self.n_generated, limit) > worst]

    def _score_to_beat(self, prompt: int) -> float:
        """The score that a hypothesis must exceed to become one of the best."""
        best = self.best[prompt]
        return best[-1].score if len(best) == self.beam.n_best else NOTHING

    def _add_hypothesis(self, prompt: int, row: int, token: int | None, log_prob: float) -> None:
        """Add a row to the hypotheses if it is one of the best; token None: it has ended."""
        score = self.beam.score(log_prob, self.n_generated)
        if score <= self._score_to_beat(prompt):
            return
        made = self.ids[row, self.n_prompt :].tolist()
        ids = made if token is None else [*made, token]
        best = self.best[prompt]
        insort(best, Hypothesis(ids, log_prob, score, token is None), key=lambda h: -h.score)
        del best[self.beam.n_best :]
