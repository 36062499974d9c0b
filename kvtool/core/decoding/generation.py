"""`kvtool.generate`: continue a text, or turn a source into its target; the command's way too."""

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
    """What was generated from one prompt."""

    ids: list[int]  # of the new tokens, the end token included
    text: str  # "" of a model without a tokenizer
    ended: bool  # by the model, not by the most tokens asked for
    log_prob: float  # nats, of all new tokens by the model itself, however they were chosen
    rank: int = 1  # among the n_best of a prompt
    score: float | None = None  # of beam search: log_prob with the length penalty


@dataclass(frozen=True)
class Generated:
    """What was generated from one prompt or several: for each the `n_best`, the best first."""

    results: list[Continuation] = field(default_factory=list)
    cache_bytes: int = 0  # the largest, keys and values of a source included

    @property
    def text(self) -> str:
        """The best of the first prompt."""
        return self.results[0].text

    @property
    def ids(self) -> list[int]:
        """The new tokens of the best of the first prompt."""
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
    """Continue a prompt, or turn a source into its target, as `kvtool generate` does.

    model: a checkpoint that was loaded, the name or folder of one, or a model alone, which has no
    tokenizer and so takes ids. prompt: a text, or ids (P,) or (B,P); rows are decoded one after the
    other. cache: a kind with its settings, "paged:page=8". on_text: is given each piece of text as
    it comes, but of beam search nothing. choices: kernels, temperature, top_k, top_p, beams,
    length_penalty, n_best and seed, as in GenerateConfig.
    Raises UsageError for what cannot be asked for, FileError for a folder that cannot be read,
    CapacityError for what does not fit into the context or the memory, and CheckFailed for logits
    that are not finite.

    >>> found = kvtool.generate("shakespeare-2l", "ROMEO:", 12, temperature=0.0)
    >>> len(found.ids), found.text
    (12, "\\nI have awhile I not, I'll")
    """
    how = GenerateConfig(max_tokens=max_tokens, cache=cache, **choices)
    if isinstance(model, (str, Path)):
        model = checkpoint.load(str(model), *prepare(RunConfig(seed=how.seed)))
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
    """Rows of ids. Raises UsageError for what are none of the model's."""
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
    """One model and one way of choosing tokens, for any number of prompts.

    saved: keys and values of a prompt, for those that begin as it does. on_prefill: is given the
    cache that holds a prompt, and the prompt's ids. Raises UsageError for more of the likeliest
    tokens than there are.
    """

    def __init__(
        self,
        model: Checkpoint | Model,
        how: GenerateConfig,
        saved: SavedCache | None = None,
        on_prefill: Callable[[Cache, list[int]], object] | None = None,
    ) -> None:
        self.tokenizer: Tokenizer | None = None  # of what is written
        self.reader: Tokenizer | None = None  # of what is read
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
        self.cache_bytes = 0  # the largest so far
        self.n_reused = 0  # tokens of the last prompt that came from `saved`
        if how.top_k > self.config.vocab_size:
            raise UsageError(
                f"--top-k: {how.top_k} is above the vocabulary of {self.config.vocab_size}"
            )

    @cached_property
    def decode(self) -> DecodingForm:
        """The model in the form that decodes, for all prompts."""
        return decoding_form(self.model)

    @property
    def reads_sources(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return bool(self.config.n_encoder_layers)

    @property
    def n_readable(self) -> int:
        """How many tokens there are that a prompt may have."""
        return self.config.source_vocab_size or self.config.vocab_size

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        if self.tokenizer is not None:
            return self.tokenizer.end_ids
        return frozenset({EOS} if self.reads_sources else ())

    @property
    def temperature(self) -> float:
        """The one asked for, or that of the kind of model."""
        if self.how.temperature is None:
            return 0.0 if self.reads_sources else 0.8
        return self.how.temperature

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt. Raises UsageError for a model without a tokenizer."""
        if self.reader is None:
            raise UsageError("prompt: text needs a tokenizer", "Give ids, or a checkpoint.")
        return self.reader.encode(text)

    def n_new(self, ids: list[int]) -> int:
        """How many tokens to generate after a prompt at most."""
        if self.how.max_tokens is not None:
            return self.how.max_tokens
        if self.reads_sources:
            return target_limit(len(ids), self.config.context)
        return max(1, min(DEFAULT_TOKENS, self.config.context - len(ids)))

    def require_fit(self, ids: list[int], text: str = "", index: int = 0) -> None:
        """Raise CapacityError for a prompt, the `index`-th, that is empty, or does not fit with
        what is to follow it."""
        if self.reads_sources:
            check_sources([ids], self.config.context, first=index)
            engine.check_context(1, self.n_new(ids), self.config.context)
            return
        if not ids:  # blanks are no token of a word tokenizer
            raise CapacityError(f"the prompt holds no token (found {text!r})")
        engine.check_context(len(ids), self.n_new(ids), self.config.context)

    def one(self, ids: list[int], on_text: Callable[[str], object] | None = None) -> Continuation:
        """Take or draw one token after the other, handing text to `on_text` as it comes."""
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
        """The tokens that follow `ids`, each (1,), counted in `log_prob`. Raises CapacityError and
        CheckFailed."""
        with torch.inference_mode():
            start = torch.tensor([ids], device=self.device)
            prompt, source = engine.first_input(self.model, start, self.kernels)
        n_new = self.n_new(ids)
        cache = make_cache(self.how.cache, self._fitting(prompt.shape[1], n_new))
        if self.saved is not None:
            # The last token is always computed: its logits are what comes next.
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
        """The `n_best` of each prompt by beam search, or by the same with a beam of one, which is
        greedy: sources in batches, other prompts one by one."""
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
        # Beam search does not say which of several tokens ended a text.
        ids = [*found.ids, *sorted(self.end_ids)[: found.ended]]
        return Continuation(ids, text, found.ended, found.log_prob, rank, score)

    def _used(self, nbytes: int) -> None:
        self.cache_bytes = max(self.cache_bytes, nbytes)

    def _fitting(self, n_prompt: int, n_new: int) -> CacheSpec:
        """The spec for a prompt and `n_new` tokens. Raises CapacityError if they do not fit."""
        spec, kind = self.spec(n_prompt + n_new), self.how.cache
        kept = predicted_nbytes(kind, spec, spec.capacity, n_prompt)
        # A kind that stores holds what is read at once exactly, until that is done.
        held = kept and max(kept, n_prompt * spec.token_nbytes)
        longest = n_prompt if kept else spec.capacity
        read = footprint.activations(self.config, longest, spec.dtype.itemsize)
        logits = self.config.vocab_size * (spec.dtype.itemsize + footprint.FLOAT64)
        what = f"--cache {kind} for {spec.capacity:,} tokens"
        require_memory(what, held + read + logits, self.device, dtype=spec.dtype)
        return spec

    def spec(self, capacity: int) -> CacheSpec:
        """That of a cache for one prompt with what follows it: `capacity` tokens."""
        return CacheSpec.of(self.config, 1, capacity, self.dtype, self.device, self.kernels)

    def sampler(self) -> Sampler:
        """A fresh sampler, so that a prompt's result does not depend on those before it."""
        how = self.how
        return Sampler(self.temperature, how.top_k, how.top_p, how.seed)
