"""What generate does with one checkpoint: draw, take the likeliest, or search with beams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool import ending
from kvtool.errors import CapacityError, CheckFailed, FileError, UsageError
from kvtool.ui.output import Output

if TYPE_CHECKING:
    import torch

    from kvtool.commands.generate.prompts import Prompts
    from kvtool.commands.generate.settings import Settings
    from kvtool.core.cache import Cache, CacheSpec
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.decoding.beam import Beam, Hypothesis
    from kvtool.core.decoding.dispatch import DecodingForm
    from kvtool.core.decoding.prompt_cache import SavedCache
    from kvtool.core.decoding.sampling import LogProb, Sampler
    from kvtool.core.text.chat import Piece

DEFAULT_TOKENS = 200


@dataclass
class Result:
    """One prompt and what was made of it."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    ended: bool  # by the model, not by --max-tokens
    rank: int = 1  # among the --n-best of a prompt
    log_prob: float = 0.0  # nats, of all new tokens by the model itself, however they were chosen
    score: float | None = None  # of beam search: log_prob with the length penalty
    number: int = 1  # of the prompt
    ids: list[int] = field(default_factory=list)  # of the new tokens, the end token included

    def row(self) -> dict[str, Any]:
        """What a document says of it."""
        return {name: value for name, value in vars(self).items() if name != "ids"}


BLANK = Result("", "", 0, 0, False)  # the answer to a blank line


def with_blanks(results: list[Result], encoded: list[list[int]]) -> list[Result]:
    """`results` of those prompts that have tokens, and a blank one for each that has none, all with
    the number of their prompt."""
    of_prompts: list[list[Result]] = []
    for result in results:
        if result.rank == 1:
            of_prompts.append([])
        of_prompts[-1].append(result)
    found = iter(of_prompts)
    return [
        replace(result, number=number)
        for number, ids in enumerate(encoded, start=1)
        for result in (next(found) if ids else [BLANK])
    ]


class Generator:
    """One checkpoint and one way of choosing tokens, for any number of prompts.

    attempt: Output's, for what is written while tokens are generated.
    """

    def __init__(
        self,
        loaded: Checkpoint,
        settings: Settings,
        device: torch.device,
        dtype: torch.dtype,
        attempt: Callable[[Callable[[], None]], bool],
    ) -> None:
        from kvtool.core.kernels.default import make_kernels

        self.loaded = loaded
        self.settings = settings
        self.device = device
        self.dtype = dtype
        self.attempt = attempt
        self.kernels = make_kernels(settings.kernels)
        self.cache_bytes = 0
        self.kept = False  # the prompt's cache, in --save-cache
        self.saved: SavedCache | None = None
        self.reused = 0  # tokens of the prompt that came from it
        if settings.top_k > loaded.config.vocab_size:
            raise UsageError(
                f"--top-k: {settings.top_k} is above the vocabulary of {loaded.config.vocab_size}"
            )

    @cached_property
    def decode(self) -> DecodingForm:
        """The model in the form that decodes, for all prompts."""
        from kvtool.core.decoding.dispatch import decoding_form

        return decoding_form(self.loaded.model)

    def encode_all(self, prompts: Prompts, chats: list[list[Piece]] | None) -> list[list[int]]:
        """Token ids of every prompt, or of it as a chat template wrote it; [] of a blank line.
        Raises CapacityError."""
        return [
            [] if prompts.is_blank(i) else self.encode(text, i, chats[i] if chats else None)
            for i, text in enumerate(prompts.texts)
        ]

    def encode(self, text: str, index: int, chat: list[Piece] | None = None) -> list[int]:
        """Token ids of a prompt, after checking that everything fits. Raises CapacityError."""
        from kvtool.core.decoding.engine import check_context
        from kvtool.core.training.translation import check_sources

        context = self.loaded.config.context
        if self.loaded.source_tokenizer is not None:
            ids = self.loaded.source_tokenizer.encode(text)
            check_sources([ids], context, first=index)
            check_context(1, self.n_new(ids), context)
            return ids
        tokenizer = self.loaded.tokenizer
        spelled = self.settings.special_tokens
        ids = tokenizer.encode(text, spelled) if chat is None else tokenizer.encode_pieces(chat)
        try:
            if not ids:  # blanks are no token of a word tokenizer
                raise CapacityError(f"the prompt holds no token (found {text!r})")
            check_context(len(ids), self.n_new(ids), context)
        except CapacityError as error:
            if self.settings.input_file is None:
                raise
            where = f"{self.settings.input_file}: line {index + 1}"
            raise CapacityError(f"{where}: {error.message}", error.hint) from error
        return ids

    def n_new(self, ids: list[int]) -> int:
        """How many tokens to generate at most."""
        from kvtool.core.training.translation import target_limit

        if self.settings.max_tokens is not None:
            return self.settings.max_tokens
        context = self.loaded.config.context
        if self.loaded.source_tokenizer is not None:
            return target_limit(len(ids), context)
        return max(1, min(DEFAULT_TOKENS, context - len(ids)))

    def one(self, text: str, ids: list[int], out: Output | None) -> Result:
        """Generate from one prompt, streaming to `out`."""
        from kvtool.core.decoding.sampling import LogProb

        emit: Callable[[str], None] = out.stream if out is not None else lambda text: None
        goes_on = self.loaded.source_tokenizer is None and not self.settings.chat
        if out is not None and out.interactive and goes_on:
            out.echo(text)
        ends = self.loaded.tokenizer.end_ids
        stream, log_prob = self.loaded.tokenizer.stream(), LogProb()
        made: list[int] = []
        pieces: list[str] = []
        for token in self.tokens(ids, log_prob):
            made.append(int(token))
            if made[-1] in ends:
                break
            pieces.append(stream.step(made[-1]))
            emit(pieces[-1])
        pieces.append(stream.finish())
        emit(pieces[-1])
        ended = bool(made) and made[-1] in ends
        value = log_prob.total
        return Result(text, "".join(pieces), len(ids), len(made), ended, log_prob=value, ids=made)

    @property
    def greedy_pairs(self) -> bool:
        """Whether sources can be decoded in batches: nothing is drawn, and each ends by itself."""
        return self.loaded.source_tokenizer is not None and not self.settings.temperature

    def together(self, texts: list[str], encoded: list[list[int]]) -> list[Result]:
        """All prompts by beam search, or by the same with a beam of one, which is greedy: sources
        in batches, other prompts one by one."""
        from kvtool.core.decoding.beam import Beam
        from kvtool.core.text.tokenizer import EOS
        from kvtool.core.training.translation import search

        s = self.settings
        kernels, beam = self.kernels, Beam(s.beams, s.length_penalty, s.n_best)
        if self.loaded.source_tokenizer is not None:
            limit = s.max_tokens or 0
            model = self.loaded.model
            found = search(model, encoded, beam, limit, s.cache, kernels, self._used)
        else:
            found = [self._continue(ids, beam) for ids in encoded]
        return [
            Result(
                text,
                self.loaded.tokenizer.decode(hypothesis.ids),
                len(ids),
                len(hypothesis.ids) + hypothesis.ended,
                hypothesis.ended,
                rank,
                hypothesis.log_prob,
                hypothesis.score if s.beams > 1 else None,
                number,
                [*hypothesis.ids, *[EOS] * hypothesis.ended],
            )
            for number, (text, ids, hypotheses) in enumerate(
                zip(texts, encoded, found, strict=True), start=1
            )
            for rank, hypothesis in enumerate(hypotheses, start=1)
        ]

    def _continue(self, ids: list[int], beam: Beam) -> list[Hypothesis]:
        import torch

        from kvtool.core.decoding.beam import beam_search

        prompt, kind = torch.tensor([ids], device=self.device), self.settings.cache
        ends = self.loaded.tokenizer.end_ids
        limits = [self.n_new(ids)]
        found = beam_search(
            self.decode, prompt, kind, limits, beam, ends, None, self.kernels, self._used
        )
        return found[0]

    def _used(self, nbytes: int) -> None:
        self.cache_bytes = max(self.cache_bytes, nbytes)

    def check_saving(self) -> None:
        """Raise CacheOpUnsupported if the kind of cache is one that cannot be saved."""
        from kvtool.core.decoding.prompt_cache import require_whole

        require_whole(self._new_cache(self._spec(1)), "be saved")

    def load_prompt(self, path: Path) -> None:
        """Take what is known of prompts from a saved cache. Raises FileError."""
        from kvtool.core.checkpoint.safetensors_file import DamagedFile
        from kvtool.core.decoding.prompt_cache import Origin, load_cache, require_whole

        spec = self._spec(1)
        require_whole(self._new_cache(spec), "be filled from a file")
        try:
            self.saved = load_cache(path, spec, Origin.of(self.loaded))
        except FileError as error:
            hint = "" if isinstance(error, DamagedFile) else error.hint
            raise FileError(
                f"--load-cache {error.message}", hint or "Give a file that --save-cache wrote."
            ) from error

    def tokens(self, ids: list[int], log_prob: LogProb) -> Any:
        """The tokens that follow `ids`, each a tensor (1,), and counted in `log_prob`."""
        import torch

        from kvtool.core.decoding import engine
        from kvtool.core.decoding.prompt_cache import Origin, common_prefix, save_cache

        with torch.inference_mode():
            start = torch.tensor([ids], device=self.device)
            prompt, source = engine.begin(self.loaded.model, start, self.kernels)
        n_new = self.n_new(ids)
        cache = self._new_cache(self._fitting(prompt.shape[1], n_new))
        if self.saved is not None:
            # The last token is always computed: its logits are what comes next.
            self.reused = min(common_prefix(self.saved.ids, ids), len(ids) - 1)
            self.saved.fill(cache, self.reused)
        steps = engine.generate(self.decode, prompt, cache, n_new, self.sampler(), source, log_prob)
        try:
            for i, token in enumerate(steps):
                ending.check()
                if i == 0 and (path := self.settings.save_cache) is not None:
                    origin = Origin.of(self.loaded)
                    self.kept = self.attempt(partial(save_cache, path, cache, ids, origin))
                self._used(cache.nbytes().allocated + (source.nbytes() if source else 0))
                yield token
        except CheckFailed as error:
            if not self.reused:
                raise
            raise FileError(
                f"--load-cache {self.settings.load_cache}: {error.message}",
                "Leave it out to see whether its values are the reason.",
            ) from error

    def _fitting(self, n_prompt: int, n_new: int) -> CacheSpec:
        """The spec for a prompt and `n_new` tokens. Raises CapacityError if they do not fit."""
        from kvtool.core import footprint
        from kvtool.core.cache import predicted_nbytes
        from kvtool.core.machine import require_memory

        spec, config = self._spec(n_prompt + n_new), self.loaded.config
        kind = self.settings.cache
        kept = predicted_nbytes(kind, spec, spec.capacity, n_prompt)
        # A kind that stores holds what is read at once exactly, until that is done.
        held = kept and max(kept, n_prompt * spec.token_nbytes)
        longest = n_prompt if kept else spec.capacity
        read = footprint.activations(config, longest, spec.dtype.itemsize)
        logits = config.vocab_size * (spec.dtype.itemsize + footprint.FLOAT64)
        what = f"--cache {kind} for {spec.capacity:,} tokens"
        require_memory(what, held + read + logits, self.device, dtype=spec.dtype)
        return spec

    def _spec(self, capacity: int) -> CacheSpec:
        from kvtool.core.cache import CacheSpec

        config = self.loaded.config
        return CacheSpec.of(config, 1, capacity, self.dtype, self.device, self.kernels)

    def _new_cache(self, spec: CacheSpec) -> Cache:
        from kvtool.core.cache import make_cache

        return make_cache(self.settings.cache, spec)

    def sampler(self) -> Sampler:
        """A fresh sampler, so that a prompt's result does not depend on those before it."""
        from kvtool.core.decoding.sampling import Sampler

        s = self.settings
        temperature = s.temperature
        if temperature is None:
            temperature = 0.0 if self.loaded.source_tokenizer is not None else 0.8
        return Sampler(temperature, s.top_k, s.top_p, s.run.seed)
