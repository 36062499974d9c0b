"""Encoder-decoders of transformers with its own caches as subjects.

The source is encoded once. Both arms read it: the uncached one in a pass of all tokens with
use_cache=False, the cached one with the EncoderDecoderCache that `generate` would make, in which
the source's keys and values stay. Rows of a batch have sources of different lengths, padded to the
longest: where padding does not change what the model computes, the uncached arm has none.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.verify.compare import ROUNDING_64, distances
from kvtool.core.verify.hf.library import quiet_transformers
from kvtool.core.verify.hf.subject import (
    HubDecoder,
    TransformersSubject,
    changes,
    context,
    ordinary_ids,
    require_static,
)
from kvtool.core.verify.precision import Promote
from kvtool.core.verify.subject import Source, Start
from kvtool.core.verify.target.adapter import State
from kvtool.core.verify.target.plans import Plan
from kvtool.core.verify.target.subject import NEEDED, TargetSubject, shaped
from kvtool.core.verify.target.vacuous import HISTORY
from kvtool.errors import CacheOpUnsupported, first_line, pass_on_shortage

DYNAMIC, STATIC = "dynamic", "static"
SOURCE = 7  # tokens of a source where nobody gave one


@dataclass
class Seq2SeqState(State):
    """A cache, and the source that it reads: the encoder's answer, and mask (B,S), 1 = real."""

    encoded: Any = None
    mask: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class EncoderDecoder(HubDecoder):
    """An encoder-decoder of transformers and a kind of cache, called as `generate` calls it."""

    source_word_ids: Tensor = field(default_factory=lambda: torch.empty(0))

    def full(
        self, ids: Tensor, padding: Tensor | None = None, source: Source | None = None
    ) -> Tensor:
        """Whole sequences (B,T) in one pass that no cache takes part in -> logits (B,T,V)."""
        assert source is not None
        given = {
            "input_ids": self.source_word_ids[source.ids],
            "attention_mask": source.mask.long(),
        }
        answer = self.module(**given, **self._tokens(ids, 0, padding), use_cache=False)
        logits: Tensor = answer["logits"]
        return logits

    def start(
        self,
        batch: int,
        capacity: int,
        padding: Tensor | None = None,
        source: Source | None = None,
    ) -> Seq2SeqState:
        """The state before the first token: the source is encoded, and its cache made."""
        assert source is not None
        encoded = self._encode(source)
        cache = generated_cache(self.module, self.kind, encoded, batch, capacity)
        mask = source.mask.long()
        return Seq2SeqState(cache, 0, batch, capacity, padding, encoded=encoded, mask=mask)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """The next tokens (B,n) -> their logits (B,n,V), and the next state.

        Raises TypeError if the model answers without a cache.
        """
        assert isinstance(state, Seq2SeqState)
        answer = self.module(
            encoder_outputs=state.encoded,
            attention_mask=state.mask,
            past_key_values=state.cache,
            use_cache=True,
            **self._tokens(ids, state.past, state.padding),
        )
        if answer["past_key_values"] is None:
            raise TypeError("it answered without a cache")
        past = state.past + ids.shape[1]
        return answer["logits"], replace(state, cache=answer["past_key_values"], past=past)

    def select(self, state: State, rows: Tensor) -> State:
        """Go on from the histories and sources of `rows` (n,), in that order."""
        assert isinstance(state, Seq2SeqState)
        hidden = state.encoded.last_hidden_state[rows]
        encoded = type(state.encoded)(last_hidden_state=hidden)
        return super().select(replace(state, encoded=encoded, mask=state.mask[rows]), rows)

    def reset(self, state: State, source: Source | None = None) -> State:
        """Begin again on the same cache with another source.

        Raises NotImplementedError for one that is longer than the room of a static cache.
        """
        assert isinstance(state, Seq2SeqState) and source is not None
        room, width = state.mask.shape[1], source.mask.shape[1]
        if self.kind == STATIC and width > room:
            raise NotImplementedError(f"there is room for a source of {room}, and it has {width}")
        if self.kind == STATIC:  # what was allocated for the longer source stays
            source = Source(*(nn.functional.pad(t, (0, room - width)) for t in source))
        encoded, mask = self._encode(source), source.mask.long()
        return super().reset(replace(state, encoded=encoded, mask=mask))

    def _encode(self, source: Source) -> Any:
        model: Any = self.module
        return model.get_encoder()(
            input_ids=self.source_word_ids[source.ids],
            attention_mask=source.mask.long(),
            return_dict=True,
        )

    def _tokens(self, ids: Tensor, past: int, padding: Tensor | None) -> dict[str, Any]:
        given = self._position_arguments(ids, past, padding)
        if "attention_mask" in given:
            given["decoder_attention_mask"] = given.pop("attention_mask")
        return {"decoder_input_ids": self.word_ids[ids], **given}


class EncoderDecoderSubject(TransformersSubject):
    """An encoder-decoder of transformers with one kind of its caches.

    Raises CacheOpUnsupported if the model does not take that kind, UsageError if it does not run.
    """

    decoder: EncoderDecoder

    def __init__(self, model: Any, kind: str) -> None:
        self.formats = {}
        self._shared: dict[str, float] = {}  # between this subject and its variants
        with quiet_transformers(), torch.inference_mode():
            decoder = encoder_decoder(model, kind)
            self.source_vocab_size = len(decoder.source_word_ids)
            TargetSubject.__init__(
                self, decoder, kind, len(decoder.word_ids), context(model.config)
            )
        self.abilities |= {"source"}
        self.find_limits(model.config, kind)

    # Calls

    def call_full(self, ids: Tensor, start: Start | None = None) -> Tensor:
        """One call of the decoder's full: (B,T) -> (B,T,V); without `start` of some source."""
        start = start or Start(ids.shape[0], ids.shape[1])
        logits = self.decoder.full(ids, start.padding, self._source(start))
        return shaped(logits, ids, "full")

    def full(self, ids: Tensor, start: Start) -> Tensor:
        """Each row alone, without padding of its source, where that should change nothing."""
        source = self._source(start)
        if bool(source.mask.all()) or self.padding_gap > ROUNDING_64:
            return super().full(ids, start)
        return self._each_alone(ids, start)

    def _each_alone(self, ids: Tensor, start: Start) -> Tensor:
        rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
        alone = [unpadded(start.select(row)) for row in rows]
        return torch.cat([self.call_full(ids[i], one) for i, one in zip(rows, alone, strict=True)])

    def initial_state(self, start: Start) -> Any:
        """The state before the first token."""
        return self.decoder.start(start.batch, start.capacity, start.padding, self._source(start))

    def reset_arguments(self, start: Start) -> tuple[Any, ...]:
        """The source, which the decoder's reset is given besides the state."""
        return (self._source(start),)

    def _source(self, start: Start) -> Source:
        return start.source or self._some_source(start.batch)

    def _some_source(self, batch: int) -> Source:
        ids = torch.arange(batch * SOURCE, device=self.device).reshape(batch, SOURCE)
        return Source(ids % self.source_vocab_size, torch.ones_like(ids, dtype=torch.bool))

    # What is known of it

    @property
    def padding_gap(self) -> float:
        """By how much padding of the source changes the logits of an uncached pass, over the
        largest: of a model that masks it, 1e-15. Infinity if it cannot run in float64."""
        if "gap" not in self._shared:
            try:
                self._shared["gap"] = self._padding_gap()
            except Exception as error:  # it cannot run in float64, or not with a batch
                pass_on_shortage(error)
                self._shared["gap"] = float("inf")
        return self._shared["gap"]

    @torch.inference_mode()
    def _padding_gap(self) -> float:
        double: Any = self.to(torch.float64)
        ids = torch.arange(2 * HISTORY, device=self.device).reshape(2, HISTORY) % self.vocab_size
        source = self._some_source(2)
        source.mask[0, SOURCE // 2 :] = False
        start = Start(2, HISTORY, None, source)
        with Promote(), quiet_transformers():
            found, expected = double.call_full(ids, start), double._each_alone(ids, start)
        return max(distances([found], [expected]))

    def remark(self) -> str:
        """What is to be known beside the verdicts."""
        if self.padding_gap <= ROUNDING_64:
            return ""
        return f"padding of the source changes uncached logits (by {self.padding_gap:.0e})"

    def vacuous(self) -> str | None:
        """Why equal logits would prove nothing about the cache, if so."""
        if self._vacuous is None:
            self._vacuous = (super().vacuous() or self._encoded_again(),)
        return self._vacuous[0]

    def _encoded_again(self) -> str | None:
        """Whether a step computes the source's keys and values again: then it reads its states."""
        ids = torch.arange(4, device=self.device)[None] % self.vocab_size
        _, state = self.step(ids[:, :-1], self.initial_state(Start(1, NEEDED)))
        other = copy.deepcopy(state)
        other.encoded.last_hidden_state.neg_()
        found, expected = (self.step(ids[:, -1:], s)[0] for s in (other, state))
        if torch.equal(found, expected):
            return None
        return "a step computes the source's keys and values again: they are not cached"


def unpadded(start: Start) -> Start:
    """One row whose source ends with its last real token."""
    assert start.source is not None
    ids, mask = start.source
    n = int(mask.sum())
    return replace(start, source=Source(ids[:, :n], mask[:, :n]))


def encoder_decoder(model: Any, kind: str) -> EncoderDecoder:
    """The way to call a model with a kind of cache. Raises CacheOpUnsupported if it takes none."""
    names = inspect.signature(model.forward).parameters
    if kind == "own":
        raise CacheOpUnsupported(kind, "be checked", "the model takes EncoderDecoderCache")
    require_static(model, kind)
    position = "decoder_position_ids" if "decoder_position_ids" in names else ""
    plan = Plan(
        cache="past_key_values",
        initial=f"a {kind} cache",
        flags=("use_cache",),
        position=position,
        form="rows",
    )
    word_ids, source_word_ids = (
        ordinary_ids(model.config, n).to(model.device) for n in vocabularies(model)
    )
    takes_padding = "decoder_attention_mask" in names
    found = EncoderDecoder(
        model,
        plan,
        changes(kind),
        takes_padding,
        kind=kind,
        word_ids=word_ids,
        source_word_ids=source_word_ids,
    )
    ids = torch.arange(SOURCE, device=model.device)[None]
    try:
        found.start(1, NEEDED, None, Source(ids % len(source_word_ids), torch.ones_like(ids) > 0))
    except Exception as error:  # what `generate` refuses to make
        pass_on_shortage(error)
        raise CacheOpUnsupported(kind, "be made", first_line(error)) from error
    return found


def vocabularies(model: Any) -> tuple[int, int]:
    """How many ids a model writes, and how many it reads as its source."""
    text = model.config.get_text_config(decoder=True)
    encoder = getattr(model.config, "encoder", None)
    read = getattr(model.config, "src_vocab_size", None) or getattr(encoder, "vocab_size", None)
    return text.vocab_size, read or text.vocab_size


def generated_cache(model: Any, kind: str, encoded: Any, batch: int, capacity: int) -> Any:
    """The cache that `generate` makes for a source (B,S). Raises what it raises."""
    from transformers.generation import GenerationMode

    settings = copy.deepcopy(model.generation_config)
    settings.update(
        use_cache=True,
        cache_implementation=None if kind == DYNAMIC else kind,
        num_beams=1,
        num_return_sequences=1,
    )
    # It makes room for the longest call before, too.
    vars(model).pop("_previous_max_cache_length", None)
    given = {"encoder_outputs": encoded}
    mode = GenerationMode.GREEDY_SEARCH
    model._prepare_cache_for_generation(settings, given, mode, batch, capacity)
    return given["past_key_values"]
