"""Decoders that are called in the ways of public ones: each is right, and found to be, as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import kvtool
from decoder_shapes import HEADS, LAYERS, VOCAB, WIDTH, Buffers, Core, Pairs, after, joined, judged
from foreign_shapes import (
    FOREIGN,
    AllAgain,
    CounterInside,
    FlagInside,
    StartPos,
)
from kvtool.core.verify.judge import BUG, ROUNDING
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.fitting import adapt
from kvtool.core.verify.target.module_copies import left_over
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.errors import UsageError

CPU = torch.device("cpu")
GUESSES = {
    "StartPos": "a copy for each session, forward(ids, start_pos=past) -> logits, the cache changed"
    " in place; it cannot go without a cache: the uncached pass is one step on a new one",
    "FlagInside": "a copy for each session, forward(ids, use_cache=True) -> logits, the cache "
    "changed in place",
    "CounterInside": "forward(ids, cache=KVCache() at first) -> logits, the cache changed in place;"
    " current_pos of the module would change what the next session answers: each runs on a copy",
    "MaskInside": "setup_caches, then forward(ids, input_pos=arange(past, past + n), mask=(B, n, "
    "room), True where a token may look) -> logits, the cache changed in place",
    "MustBeMasked": "forward(input_ids=ids, past_kv=None at first, mask=(n, T), True where a token "
    "may look) -> (logits, cache)",
    "AllAgain": "forward(ids, cache=None at first, return_intermediates=True) -> (logits, cache); "
    "ids are all so far; one token a step after a prompt",
    "RowStarts": "forward(ids, kv_cache=None at first, start_pos=past for each row) -> "
    "(logits, cache); without start_pos its cached logits are others",
    "Singly": "forward(ids, cache=None at first) -> (logits, cache); one token a step after a "
    "prompt",
    "AtMostEight": "forward(ids, cache=None at first) -> (logits, cache); 8 tokens a step at most",
}


@pytest.mark.parametrize("shape", FOREIGN)
def test_a_right_decoder_is_called_rightly_and_found_right(shape: str) -> None:
    subject = TargetSubject(FOREIGN[shape](), shape)
    assert subject.vocab_size == VOCAB and "batch" in subject.abilities
    assert subject.guess.startswith(f"called as {GUESSES[shape]}")
    assert judged(FOREIGN[shape]()).verdict == ROUNDING


def test_a_decoder_that_was_checked_keeps_nothing_of_it() -> None:
    for decoder in (StartPos(), FlagInside(), CounterInside()):
        before = copy.deepcopy(decoder)
        TargetSubject(decoder, "it")
        assert left_over(before, decoder) == []


class StaleKeys(FlagInside):
    """A bug: the first key of the last step is stored twice as large."""

    def forward(self, in_idx: Tensor, use_cache: bool = False) -> Tensor:
        logits = super().forward(in_idx, use_cache)
        if use_cache:
            self.pairs = [(k * 1.01, v) for k, v in self.pairs]
        return logits


def test_a_bug_of_a_cache_within_the_module_is_found() -> None:
    finding = judged(StaleKeys())
    assert (finding.verdict, finding.first_wrong) == (BUG, 1)


@pytest.mark.parametrize("shape", [StartPos, FlagInside, CounterInside])
def test_a_second_sequence_begins_on_the_same_module(shape: type[Core]) -> None:
    assert judged(shape(), "reset").verdict == ROUNDING


def test_a_reset_that_forgets_the_counter_is_found() -> None:
    class Counts(FlagInside):
        def reset_kv_cache(self) -> None:
            self.current_pos = getattr(self, "current_pos", 0)
            self.pairs = [None] * LAYERS

    assert judged(Counts(), "reset").verdict == BUG


# What its methods take


class Rewinding(Buffers):
    """rewind(n) takes n tokens back."""

    crop = None  # type: ignore[assignment]
    slip = 0

    def rewind(self, n: int) -> None:
        self.length -= n - self.slip


class RewindsLess(Rewinding):
    slip = 1


class Keeping(Rewinding):
    """trim(length) leaves that many."""

    rewind = None  # type: ignore[assignment]

    def trim(self, length: int) -> None:
        self.length = length


def with_cache(kind: type[Buffers]) -> Core:
    class Made(Core):
        def new_cache(self, batch: int, max_len: int) -> Buffers:
            return kind(batch, max_len, self.head.weight.dtype)

        def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
            if cache is None:
                return self.run(ids, torch.arange(ids.shape[1]), lambda layer, k, v: (k, v))
            end = cache.length + ids.shape[1]
            logits = self.run(ids, torch.arange(cache.length, end), cache.update)
            cache.length = end
            return logits

    return Made()


@pytest.mark.parametrize(
    ("kind", "verdict", "note"),
    [
        (Rewinding, ROUNDING, "rewind is given how many tokens go"),
        (RewindsLess, BUG, "rewind is given how many tokens go"),
        (Keeping, ROUNDING, ""),
    ],
)
def test_whether_a_method_takes_a_length_or_a_count_is_tried(
    kind: type[Buffers], verdict: str, note: str
) -> None:
    assert judged(with_cache(kind), "crop").verdict == verdict
    guess = TargetSubject(with_cache(kind), "it").guess
    assert note in guess and ("is given" in guess) == bool(note)


@pytest.mark.parametrize(("slip", "verdict"), [(False, ROUNDING), (True, BUG)])
def test_a_static_method_of_the_module_reorders(slip: bool, verdict: str) -> None:
    class Beams(Pairs):
        @staticmethod
        def _reorder_cache(past: Any, beam_idx: Tensor) -> Any:
            return [(k[beam_idx], v if slip else v[beam_idx]) for k, v in past]

    assert judged(Beams(), "permuted").verdict == verdict


def test_caches_in_a_list_are_each_changed() -> None:
    class Layer:
        def __init__(self) -> None:
            self.k = self.v = torch.zeros(1, HEADS, 0, WIDTH // HEADS)

        def trim(self, n: int) -> int:
            self.k, self.v = (t[:, :, : t.shape[2] - n] for t in (self.k, self.v))
            return n

    class PerLayer(Core):
        def make_cache(self) -> list[Layer]:
            return [Layer() for _ in range(LAYERS)]

        def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
            new: list[Any] = []
            used = bool(cache and cache[0].k.shape[2])
            past = [(layer.k, layer.v) for layer in cache] if used else None
            logits = self.run(ids, after(past, ids), joined(past, new))
            for layer, (k, v) in zip(cache or [], new, strict=False):
                layer.k, layer.v = k, v
            return logits

    assert judged(PerLayer(), "crop").verdict == ROUNDING


# torch.compile, and what cannot be called


def test_a_compiled_module_runs_as_it_is_written_and_the_report_says_so() -> None:
    subject = TargetSubject(torch.compile(Pairs(), backend="eager"), "it")
    assert subject.guess.endswith("taken out of torch.compile")
    assert isinstance(subject.decoder.module, Pairs)


class Spoken(Core):
    def forward(self, ids: Tensor, speaker: Tensor, cache: Any = None) -> Any:
        new: list[Any] = []
        places = after(cache, ids) + speaker.sum()
        return self.run(ids, places, joined(cache, new)), new


def test_an_argument_that_nobody_knows_is_named_with_the_code_that_would_help() -> None:
    with pytest.raises(UsageError) as caught:
        adapt(Spoken(), "it", CPU)
    message = caught.value.message
    assert message.startswith("it: forward(ids, speaker, cache) needs speaker, of which nothing is")
    assert len(message) < 300 and "\n" not in str(caught.value)
    example = caught.value.example  # type: ignore[attr-defined]
    assert "self.model(ids, speaker=..., cache=cache)" in example
    compile(example, "example", "exec")


@pytest.mark.parametrize("before", ["hidden", "maps", "loss"])
def test_a_cache_that_is_not_the_first_thing_behind_the_logits_is_found(before: str) -> None:
    class Wordy(Core):
        def forward(self, ids: Tensor, past: Any = None) -> Any:
            new: list[Any] = []
            logits = self.run(ids, after(past, ids), joined(past, new))
            more = {"hidden": logits * 2, "maps": [logits], "loss": logits.mean().view(1)}
            return logits, more[before], new

    assert kvtool.verify(Wordy(), scenarios=["decode", "chunks"], tokens=6).ok


def test_a_state_that_changes_in_place_is_not_taken_for_a_tensor_beside_the_logits() -> None:
    class Beside(Core):
        def forward(self, ids: Tensor, incremental_state: Any = None) -> Any:
            past = None if incremental_state is None else incremental_state.get("kv")
            new: list[Any] = []
            logits = self.run(ids, after(past, ids), joined(past, new))
            if incremental_state is not None:
                incremental_state["kv"] = new
            return logits, torch.zeros(len(ids), 3, 5)

    report = kvtool.verify(Beside(), scenarios=["decode", "chunks"], tokens=6)
    assert report.ok and "the cache changed in place" in report.guess


def test_a_decoder_that_answers_the_last_token_is_asked_for_no_prefix_before_the_step() -> None:
    class LastAlone(Core):
        def forward(self, ids: Tensor, cache: Any = None) -> Any:
            new: list[Any] = []
            asked.append(ids.shape[1])
            return self.run(ids, after(cache, ids), joined(cache, new))[:, -1:], new

    asked: list[int] = []
    session = TargetSubject(LastAlone(), "it").start(Start(1, 64))
    for size in (20, 4):
        asked.clear()
        session.feed(torch.arange(size)[None] % 5)
    assert sorted(asked) == [4, 21, 22, 23]


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("the meta device", lambda core: core.to("meta")),
        ("holds 6 tokens", lambda core: core),
        ("torch.bool", lambda core: core),
    ],
)
def test_what_cannot_be_checked_is_refused_in_words(words: str, change: Any) -> None:
    class Refused(Core):
        def forward(self, ids: Tensor, cache: Any = None) -> Any:
            new: list[Any] = []
            if "6" in words:
                torch.zeros(6)[after(cache, ids)]
            logits = self.run(ids, after(cache, ids), joined(cache, new))
            return (logits > 0 if words == "torch.bool" else logits), new

    decoder = change(Refused())
    if "6" in words:
        decoder.context = 6
    with pytest.raises(UsageError, match=words):
        TargetSubject(decoder, "it")


def test_a_module_that_is_given_all_ids_again_and_computes_the_new_ones_is_called_so() -> None:
    class Incremental(Core):
        """As fairseq's: the state is changed in place, and what is answered beside is no cache."""

        def forward(self, ids: Tensor, incremental_state: Any = None) -> Any:
            past = None if incremental_state is None else incremental_state.get("kv")
            new: list[Any] = []
            ids = ids[:, 0 if past is None else past[0][0].shape[2] :]
            logits = self.run(ids, after(past, ids), joined(past, new))
            if incremental_state is not None:
                incremental_state["kv"] = new
            return logits, {"attn": None}

    assert kvtool.verify(Incremental(), scenarios=["decode", "chunks"], tokens=6).ok


def test_a_wrong_cache_does_not_make_another_way_of_calling_look_better() -> None:
    class AllAgainWrong(AllAgain):
        """Right in the first step behind a prompt, and wrong from then on."""

        def forward(self, x: Tensor, cache: Any = None, return_intermediates: bool = False) -> Any:
            logits, new = super().forward(x, cache=cache, return_intermediates=True)
            if cache is not None:
                new = [(k * 1.5, v) for k, v in new]
            return (logits, new) if return_intermediates else logits

    assert "ids are all so far" in TargetSubject(AllAgainWrong(), "it").guess
