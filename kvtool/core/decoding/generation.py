"""`kvtool.generate`: continue a prompt or translate a source; the command uses the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool import ending
from kvtool.config import GenerateConfig, RunConfig
from kvtool.core import footprint
from kvtool.core.cache import Cache, CacheSpec, make_cache, predicted_nbytes
from kvtool.core.checkpoint import checkpoint
from kvtool.core.checkpoint.checkpoint import Checkpoint
from kvtool.core.decoding import engine
from kvtool.core.decoding.beam import Beam, Hypothesis, beam_search
from kvtool.core.decoding.dispatch import DecodingForm, decoding_form
from kvtool.core.decoding.prompt_cache import SavedCache, common_prefix
from kvtool.core.decoding.sampling import LogProb, Sampler
from kvtool.core.decoding.sources import check_sources, search, target_limit
from kvtool.core.kernels.default import make_kernels
from kvtool.core.machine import prepare, require_memory
from kvtool.core.models import Model
from kvtool.core.native import arrays as native
from kvtool.core.text.tokenizer import EOS, Tokenizer
from kvtool.errors import CapacityError, UsageError
from kvtool.registry import with_own_window

DEFAULT_TOKENS = 200


@dataclass(frozen=True)
class Continuation:
    """One continuation of one prompt."""

    ids: list[int]  # the new tokens, the end token included
    text: str  # "" if the model has no tokenizer
    ended: bool  # True: by an end token; False: by the limit of tokens
    log_prob: float  # nats, of all new tokens, before temperature, top-k and top-p
    rank: int = 1  # among the n_best of a prompt
    score: float | None = None  # beam search only: log_prob with the length penalty


@dataclass(frozen=True)
class Generated:
    """The `n_best` continuations of each prompt, prompt by prompt, the best first."""

    results: list[Continuation] = field(default_factory=list)
    cache_bytes: int = 0  # peak of the caches' bytes, the source's keys and values included

    @property
    def text(self) -> str:
        """The text of the best continuation of the first prompt."""
        return self.results[0].text

    @property
    def ids(self) -> list[int]:
        """The new tokens of the best continuation of the first prompt."""
        return self.results[0].ids


def generate(
    model: Checkpoint | Model | str | Path,
    prompt: str | Tensor | Sequence[int],
    max_tokens: int | None = None,
    *,
    cache: str = "dynamic",
    on_text: Callable[[str], object] | None = None,
    **choices: Any,
) -> Generated:
    """Continue a prompt, or translate a source, as `kvtool generate` does.

    model: a loaded checkpoint, the name or folder of one, or a bare model. A bare model has no
    tokenizer, so it needs ids. prompt: text, or ids (P,) or (B,P); rows are decoded one after the
    other. max_tokens: at most so many new tokens. cache: a kind with its settings, such as
    "paged:page=8". on_text: called with each piece of text as it is generated; beam search does not
    call it. choices: kernels, temperature, top_k, top_p, beams, length_penalty, n_best and seed, as
    in GenerateConfig.
    Raises UsageError for arguments that are wrong or contradict each other, FileError for a folder
    that cannot be read, CapacityError if the context or the memory is too small, and CheckFailed if
    logits are not finite.

    >>> found = kvtool.generate("shakespeare-2l", "ROMEO:", 12, temperature=0.0)
    >>> len(found.ids), found.text
    (12, "\\nI'll tell thee, I'll tell thee, and")
    """
    how = GenerateConfig(max_tokens=max_tokens, cache=cache, **choices)
    if isinstance(model, (str, Path)):
        model = checkpoint.load(str(model), *prepare(RunConfig(seed=how.seed)))
    if not isinstance(model, (Checkpoint, Model)):
        kind = type(model).__name__
        raise UsageError(f"model: {kind} is no model of kvtool's", "Give a folder or a name.")
    generator = Generator(model, how)
    rows = [generator.encode(prompt)] if isinstance(prompt, str) else _rows(prompt, generator)
    for ids in rows:
        generator.require_fit(ids)
    with native.native_if_worthwhile(sum(map(generator.n_new, rows))):
        if how.beams > 1:
            results = [found for ranked in generator.search(rows) for found in ranked]
        else:
            results = [generator.one(ids, on_text) for ids in rows]
    return Generated(results, generator.cache_bytes)


def _rows(prompt: Tensor | Sequence[int], generator: Generator) -> list[list[int]]:
    """The ids of a prompt, row by row. Raises UsageError if the model does not know them."""
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"prompt: {prompt!r} is neither text nor whole numbers (P,)") from error
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point() or ids.is_complex():
        shape = tuple(ids.shape)
        raise UsageError(f"prompt: {shape} of {ids.dtype} (expected whole numbers (B,P))")
    n_vocab = generator.n_readable
    unknown = ids[(ids < 0) | (ids >= n_vocab)].tolist()
    if unknown:
        raise UsageError(f"prompt: {unknown[0]} is none of the model's {n_vocab} tokens")
    rows: list[list[int]] = ids.tolist()
    return rows


class Generator:
    """Generates from any number of prompts with one model and one GenerateConfig.

    saved: the keys and values of a prompt, reused for prompts with the same beginning. on_prefill:
    called after a prefill with the cache and the prompt's ids. Raises UsageError if top_k exceeds
    the vocabulary.
    """

    def __init__(
        self,
        model: Checkpoint | Model,
        how: GenerateConfig,
        saved: SavedCache | None = None,
        on_prefill: Callable[[Cache, list[int]], object] | None = None,
    ) -> None:
        self.tokenizer: Tokenizer | None = None  # of the output
        self.reader: Tokenizer | None = None  # of the input
        if isinstance(model, Checkpoint):
            if model.reads_text:
                self.tokenizer = model.tokenizer
                self.reader = model.source_tokenizer or model.tokenizer
            model = model.model
        self.model, self.config = model, model.config
        self.how = replace(how, cache=with_own_window(how.cache, self.config.window))
        self.kernels = make_kernels(how.kernels)
        weight = next(self.model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.saved, self.on_prefill = saved, on_prefill
        self.cache_bytes = 0  # peak so far
        self.n_reused = 0  # tokens of the last prompt whose keys and values came from `saved`
        if how.top_k > self.config.vocab_size:
            raise UsageError(
                f"--top-k: {how.top_k} is above the vocabulary of {self.config.vocab_size}"
            )

    @cached_property
    def decode(self) -> DecodingForm:
        """The model's decoding form, shared by all prompts."""
        return decoding_form(self.model)

    @property
    def reads_sources(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return bool(self.config.n_encoder_layers)

    @property
    def n_readable(self) -> int:
        """The size of the vocabulary that prompts are read with."""
        return self.config.source_vocab_size or self.config.vocab_size

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids of the end tokens."""
        if self.tokenizer is not None:
            return self.tokenizer.end_ids
        return frozenset({EOS} if self.reads_sources else ())

    @property
    def temperature(self) -> float:
        """The temperature: as configured, else 0 for an encoder-decoder and 0.8 for a decoder."""
        if self.how.temperature is None:
            return 0.0 if self.reads_sources else 0.8
        return self.how.temperature

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises UsageError for a model without a tokenizer."""
        if self.reader is None:
            raise UsageError("prompt: text needs a tokenizer", "Give ids, or a checkpoint.")
        return self.reader.encode(text)

    def n_new(self, ids: list[int]) -> int:
        """The largest number of tokens to generate for a prompt."""
        if self.how.max_tokens is not None:
            return self.how.max_tokens
        if self.reads_sources:
            return target_limit(len(ids), self.config.context)
        return max(1, min(DEFAULT_TOKENS, self.config.context - len(ids)))

    def require_fit(self, ids: list[int], text: str = "", index: int = 0) -> None:
        """Raise CapacityError if a prompt is empty, or if the context is too short for it and what
        follows.

        text and index: the prompt as it was typed and its place among the prompts, for the message.
        """
        if self.reads_sources:
            check_sources([ids], self.config.context, first=index)
            engine.check_context(1, self.n_new(ids), self.config.context)
            return
        if not ids:  # a word tokenizer makes no token of blanks
            raise CapacityError(f"the prompt holds no token (found {text!r})")
        engine.check_context(len(ids), self.n_new(ids), self.config.context)

    def one(self, ids: list[int], on_text: Callable[[str], object] | None = None) -> Continuation:
        """Generate one continuation of `ids`, greedy or by sampling, as `tokens`.

        on_text: called with each piece of text. Raises CapacityError and CheckFailed.
        """
        emit = on_text or (lambda piece: None)
        stream = self.tokenizer.stream() if self.tokenizer is not None else None
        ends, log_prob = self.end_ids, LogProb()
        made: list[int] = []
        pieces: list[str] = []
        for token in self.tokens(ids, log_prob):
            made.append(int(token))
            if made[-1] in ends:
                break
            if stream is not None:
                pieces.append(stream.step(made[-1]))
                emit(pieces[-1])
        if stream is not None:
            pieces.append(stream.finish())
            emit(pieces[-1])
        return Continuation(made, "".join(pieces), made[-1] in ends, log_prob.total)

    def tokens(self, ids: list[int], log_prob: LogProb) -> Iterator[Tensor]:
        """Yield the tokens that follow `ids`, each (1,), and add them up in `log_prob`.

        Raises CapacityError if the cache does not fit, and CheckFailed if logits are not finite.
        """
        with torch.inference_mode():
            start = torch.tensor([ids], device=self.device)
            prompt, source = engine.first_input(self.model, start, self.kernels)
        n_new = self.n_new(ids)
        cache = make_cache(self.how.cache, self._fitting(prompt.shape[1], n_new))
        if self.saved is not None:
            # The last token is always computed, since its logits choose the next one.
            self.n_reused = min(common_prefix(self.saved.ids, ids), len(ids) - 1)
            self.saved.fill(cache, self.n_reused)
        steps = engine.generate(self.decode, prompt, cache, n_new, self.sampler(), source, log_prob)
        for i, token in enumerate(steps):
            ending.check()
            if i == 0 and self.on_prefill is not None:
                self.on_prefill(cache, ids)
            self._used(cache.nbytes().allocated + (source.nbytes() if source else 0))
            yield token

    def search(self, rows: list[list[int]]) -> list[list[Continuation]]:
        """The `n_best` continuations of each prompt by beam search; one beam is greedy search.

        Sources are decoded in batches, other prompts one by one. Raises as `beam_search`.
        """
        how = self.how
        beam = Beam(how.beams, how.length_penalty, how.n_best)
        if self.reads_sources:
            limit = how.max_tokens or 0
            found = search(self.model, rows, beam, limit, how.cache, self.kernels, self._used)
        else:
            found = [self._continue(ids, beam) for ids in rows]
        return [
            [self._ranked(rank, best) for rank, best in enumerate(hypotheses, start=1)]
            for hypotheses in found
        ]

    def _continue(self, ids: list[int], beam: Beam) -> list[Hypothesis]:
        prompt = torch.tensor([ids], device=self.device)
        how, limits, ends = self.how.cache, [self.n_new(ids)], self.end_ids
        return beam_search(
            self.decode, prompt, how, limits, beam, ends, None, self.kernels, self._used
        )[0]

    def _ranked(self, rank: int, found: Hypothesis) -> Continuation:
        text = self.tokenizer.decode(found.ids) if self.tokenizer is not None else ""
        score = found.score if self.how.beams > 1 else None
        # Beam search does not tell which end token it was: take the first.
        ids = [*found.ids, *sorted(self.end_ids)[: found.ended]]
        return Continuation(ids, text, found.ended, found.log_prob, rank, score)

    def _used(self, nbytes: int) -> None:
        self.cache_bytes = max(self.cache_bytes, nbytes)

    def _fitting(self, n_prompt: int, n_new: int) -> CacheSpec:
        """The cache spec for a prompt and `n_new` tokens. Raises CapacityError if they do not fit
        into memory."""
        spec, kind = self.spec(n_prompt + n_new), self.how.cache
        kept = predicted_nbytes(kind, spec, spec.capacity, n_prompt)
        # During the prefill, a kind that stores keys and values holds the whole prompt unrounded.
        held = kept and max(kept, n_prompt * spec.token_nbytes)
        longest = n_prompt if kept else spec.capacity
        read = footprint.activations(self.config, longest, spec.dtype.itemsize)
        logits = self.config.vocab_size * (spec.dtype.itemsize + footprint.FLOAT64)
        what = f"--cache {kind} for {spec.capacity:,} tokens"
        require_memory(what, held + read + logits, self.device, dtype=spec.dtype)
        return spec

    def spec(self, capacity: int) -> CacheSpec:
        """The spec of a cache for one prompt and its continuation, `capacity` tokens together."""
        return CacheSpec.of(self.config, 1, capacity, self.dtype, self.device, self.kernels)

    def sampler(self) -> Sampler:
        """A new sampler, so that a prompt's result does not depend on earlier prompts."""
        how = self.how
        return Sampler(self.temperature, how.top_k, how.top_p, how.seed)
