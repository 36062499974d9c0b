"""The check of a user's own decoder: what is found in it, and where."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kvtool
from decoder_shapes import (
    Buffers,
    Core,
    Pairs,
    Stepper,
    after,
    joined,
    judged,
    length,
)
from kvtool.core.verify.judge import BUG, ERROR, PRECISION, ROUNDING
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.ending import End, Ended
from kvtool.errors import UsageError


class Shifted(Pairs):
    shift = 1

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        new: list[Any] = []
        positions = after(cache, ids) + (self.shift if cache else 0)
        return self.run(ids, positions, joined(cache, new)), new


class ShiftedBack(Shifted):
    shift = -1


class Restarted(Pairs):
    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        new: list[Any] = []
        return self.run(ids, torch.arange(ids.shape[1]), joined(cache, new)), new


class Forgetful(Pairs):
    """Right positions, and keys of the step alone."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        past = 0 if cache is None else cache
        positions = torch.arange(past, past + ids.shape[1])
        return self.run(ids, positions, lambda layer, k, v: (k, v)), past + ids.shape[1]


class StalePast(Pairs):
    """The second layer reads past values of the first head twice."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        new: list[Any] = []
        right = joined(cache, new)

        def update(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = right(layer, k, v)
            if layer == 1 and cache:
                values = torch.cat([values[:, :1], values[:, :1]], dim=1)
            return keys, values

        return self.run(ids, after(cache, ids), update), new


MODULE_BUGS = {
    Shifted: (None, "pos_embedding was asked for 12, not 11", "one too high (pos_embedding"),
    ShiftedBack: (None, "pos_embedding was asked for 10, not 11", "one too low (pos_embedding"),
    Restarted: (None, "pos_embedding was asked for 0, not 11", "start at 0 again in each step"),
    Forgetful: (0, "layer 0, blocks.0.attention.out: its input is wrong, and the output of "
                "blocks.0.attention.qkv before it is right", "the past is not read"),
    StalePast: (1, "blocks.1.attention.out: its input is wrong, and the output of "
                "blocks.1.attention.qkv before it is right, head 1",
                "the values that are read of tokens 0-11 are another's: head 1 reads those of "
                "head 0"),
}  # fmt: skip


@pytest.mark.parametrize("model", MODULE_BUGS)
def test_a_bug_is_found_located_and_explained(model: type[Core]) -> None:
    finding = judged(model())
    layer, place, hint = MODULE_BUGS[model]
    assert (finding.verdict, finding.first_wrong) == (BUG, 1)
    assert finding.diagnosis.layer == layer
    assert place in finding.diagnosis.place
    assert hint in finding.diagnosis.hint


class KeepsAll(Stepper):
    def crop(self, state: Buffers, length: int) -> Any:
        return state


class KeepsOne(Stepper):
    def crop(self, state: Buffers, length: int) -> Any:
        state.crop(length + 1)


class TakesOne(Stepper):
    def crop(self, state: Buffers, length: int) -> Any:
        state.crop(length - 1)


class GoesOn(Stepper):
    def reset(self, state: Buffers) -> Any:
        return state


class Unmoved(Stepper):
    def select(self, state: Buffers, rows: Tensor) -> Any:
        return state


class Inverted(Stepper):
    def select(self, state: Buffers, rows: Tensor) -> Any:
        state.select(rows.argsort())


OPERATION_BUGS = {
    KeepsAll: ("crop", "crop does nothing"),
    KeepsOne: ("crop", "crop leaves one token too many"),
    TakesOne: ("crop", "crop takes one token too many"),
    GoesOn: ("reset", "reset does nothing"),
    Unmoved: ("permuted", "select does nothing"),
    Inverted: ("permuted", "select applies the inverse order"),
}


@pytest.mark.parametrize("decoder", OPERATION_BUGS)
def test_a_bug_of_an_operation_is_found_and_explained(decoder: type[Stepper]) -> None:
    scenario, hint = OPERATION_BUGS[decoder]
    finding = judged(decoder(), scenario)
    assert finding.verdict == BUG
    assert hint in finding.diagnosis.hint
    assert judged(decoder()).verdict == ROUNDING  # elsewhere it is right


def test_what_an_operation_cannot_do_is_unsupported_and_no_bug() -> None:
    class Refuses(Stepper):
        def crop(self, state: Buffers, length: int) -> Any:
            raise NotImplementedError("a ring cannot go back")

    finding = judged(Refuses(), "crop")
    assert finding.verdict == "unsupported" and "a ring cannot go back" in finding.evidence


def test_a_step_that_raises_is_an_error_at_that_step() -> None:
    class Short(Pairs):
        def forward(self, ids: Tensor, cache: Any = None) -> Any:
            if length(cache) == 13:
                raise IndexError("no slot 13")
            return super().forward(ids, cache)

    finding = judged(Short())
    assert (finding.verdict, finding.first_wrong) == (ERROR, 3)
    assert "IndexError: no slot 13" in finding.evidence


class RaisesLate(Stepper):
    """It holds 20 tokens, although it promises more."""

    def step(self, ids: Tensor, state: Buffers) -> tuple[Tensor, Buffers]:
        if state.length > 20:
            raise ValueError("boom")
        return super().step(ids, state)


@pytest.mark.parametrize(
    ("scenario", "step", "said"),
    [
        ("decode", 11, "step 11 raised ValueError: boom"),
        ("one-then-chunks", None, "finding out whether the cache is used raised ValueError: boom"),
    ],
)
def test_a_cache_that_raises_late_is_an_error_wherever_it_does(
    scenario: str, step: int | None, said: str
) -> None:
    finding = judged(RaisesLate(), scenario)
    assert (finding.verdict, finding.first_wrong, finding.evidence) == (ERROR, step, said)
    report = kvtool.verify(RaisesLate(), scenarios=[scenario])
    assert (report.ok, report.exit_code) == (False, 1)


@pytest.mark.parametrize("error", [MemoryError, Ended])
def test_what_says_nothing_of_the_cache_is_no_verdict(error: type[BaseException]) -> None:
    class Late(RaisesLate):
        def step(self, ids: Tensor, state: Buffers) -> tuple[Tensor, Buffers]:
            if state.length > 20:
                raise Ended(End.INTERRUPTED) if error is Ended else error()
            return super().step(ids, state)

    with pytest.raises(error):
        judged(Late(), "one-then-chunks")


def test_a_cache_that_stores_bfloat16_is_a_loss_and_no_bug() -> None:
    class Halved(Pairs):
        def forward(self, ids: Tensor, cache: Any = None) -> Any:
            logits, new = super().forward(ids, cache)
            half = torch.bfloat16
            return logits, [(k.to(half).to(k.dtype), v.to(half).to(v.dtype)) for k, v in new]

    finding = judged(Halved())
    assert (finding.verdict, finding.lossy, finding.right) == (PRECISION, True, False)


def test_a_state_changed_in_place_does_not_reach_another_session() -> None:
    subject = TargetSubject(Stepper(), "it")
    start = Start(1, 20)
    one, two = subject.start(start), subject.start(start)
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        one.feed(ids)
        assert torch.equal(two.feed(ids), subject.start(start).feed(ids))
        three = two.fork()
        two.feed(ids[:, :2])
        assert torch.equal(three.feed(ids[:, 2:4]), one.feed(ids[:, 2:4]))


def test_state_hidden_in_the_module_is_found_by_two_sessions_at_once() -> None:
    class Hidden(Pairs):
        n_seen = 0

        def forward(self, ids: Tensor, cache: Any = None) -> Any:
            self.n_seen = self.n_seen if cache else 0
            new: list[Any] = []
            places = torch.arange(self.n_seen, self.n_seen + ids.shape[1])
            self.n_seen += ids.shape[1]
            return self.run(ids, places, joined(cache, new)), new

    assert judged(Hidden()).verdict == ROUNDING
    finding = judged(Hidden(), "fork")
    assert finding.verdict == BUG
    assert "pos_embedding was asked for" in finding.diagnosis.place


# Objects of the protocol


def test_a_decoder_without_to_is_converted_through_its_attributes() -> None:
    class Plain:
        """No module: a table of logits by the last two ids."""

        def __init__(self) -> None:
            self.weights = {"table": torch.randn(7, 7, 7)}

        def full(self, ids: Tensor) -> Tensor:
            before = torch.cat([ids[:, :1], ids[:, :-1]], dim=1)
            return self.weights["table"][before, ids] / 3

        def step(self, ids: Tensor, state: Any) -> Any:
            first = ids[:, :1] if state is None else state
            before = torch.cat([first, ids[:, :-1]], dim=1)
            return self.weights["table"][before, ids] / 3, ids[:, -1:]

    subject = TargetSubject(Plain(), "it")
    assert (subject.vocab_size, subject.dtype) == (7, torch.float32)
    double = subject.to(torch.float64)
    assert double.call_full(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.float64
    assert subject.call_full(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.float32


def test_what_cannot_be_converted_is_no_verdict_unless_all_is_identical() -> None:
    class Numbers:
        def __init__(self, slip: float = 0.0) -> None:
            self.slip = slip

        def full(self, ids: Tensor) -> Tensor:
            return nn.functional.one_hot(ids.cumsum(1) % 5, 5).float()

        def step(self, ids: Tensor, state: Any) -> Any:
            total = ids.cumsum(1) + (0 if state is None else state)
            slip = 0.0 if state is None else self.slip
            return nn.functional.one_hot(total % 5, 5).float() + slip, total[:, -1:]

    assert judged(Numbers()).verdict == "identical"
    finding = judged(Numbers(1e-6))
    assert finding.verdict == "undecided"
    assert "cannot run in float64" in finding.evidence


def test_logits_that_are_finite_in_one_format_only_are_judged_by_the_noise_of_that() -> None:
    class Overflowing(Pairs):
        def run(self, ids: Tensor, *args: Any) -> Tensor:
            logits = super().run(ids, *args)
            return logits + (math.inf if logits.dtype == torch.float64 else 0.0)

    finding = judged(Overflowing())
    assert finding.verdict == "rounding" and "not finite" in finding.evidence


def test_a_decoder_of_numpy_is_checked_too() -> None:
    class Sums:
        vocab_size, context = 7, 64
        slip = 0

        def full(self, ids: Any) -> Any:
            return np.cos(np.asarray(ids).cumsum(1)[..., None] * np.arange(1.0, 8))

        def step(self, ids: Any, state: Any) -> Any:
            total = np.asarray(ids).cumsum(1) + (0 if state is None else state + self.slip)
            return np.cos(total[..., None] * np.arange(1.0, 8)), total[:, -1:]

    assert TargetSubject(Sums(), "it").dtype == torch.float64
    assert judged(Sums()).verdict == "identical"
    Sums.slip = 1
    finding = judged(Sums())
    assert (finding.verdict, finding.first_wrong) == (BUG, 1)
    assert finding.diagnosis.place == "the logits, after every module"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda ids: torch.zeros(1, 9, 9, 5), r"step answered ids \(1, 3\) with \(1, 9, 9, 5\)"),
        (lambda ids: torch.zeros(*ids.shape, 4), "step answers 4 logits and full 5"),
    ],
)
def test_answers_of_a_wrong_shape_are_refused(answer: Any, words: str) -> None:
    class Odd:
        def full(self, ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, 5)

        def step(self, ids: Tensor, state: Any) -> Any:
            return answer(ids), 0

    with pytest.raises(UsageError, match=words):
        TargetSubject(Odd(), "it")
