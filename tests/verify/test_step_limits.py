"""How many tokens a step of a decoder takes: honest limits, and crashes that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvtool
from decoder_shapes import Core, after, joined, judged
from foreign_shapes import (
    AllAgain,
    AtMostEight,
    CrashesAtThree,
    CrashesBehindPrompts,
    RefusesThree,
    Singly,
)
from kvtool.core.verify.judge import BUG, ERROR, ROUNDING, UNSUPPORTED
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.subject import TargetSubject


@pytest.mark.parametrize(
    ("shape", "single", "step"), [(Singly, True, 0), (AllAgain, True, 0), (AtMostEight, False, 8)]
)
def test_an_honest_limit_is_found_and_beyond_it_nothing_is_judged(
    shape: type[Core], single: bool, step: int
) -> None:
    subject = TargetSubject(shape(), "it")
    assert (subject.single_steps_only, subject.largest_step) == (single, step)
    scenario = "chunks" if single else "growth"
    assert judged(shape(), scenario).verdict == UNSUPPORTED
    assert kvtool.verify(shape(), scenarios=["decode"], tokens=6).ok


@pytest.mark.parametrize("shape", [CrashesAtThree, RefusesThree])
def test_a_step_size_that_fails_between_others_is_no_limit(shape: type[Core]) -> None:
    class ByThree(shape):  # type: ignore[misc, valid-type]
        pass

    subject = TargetSubject(ByThree(), "it")
    assert (subject.single_steps_only, subject.largest_step) == (False, 0)
    session = subject.start(Start(1, 32))
    session.feed(torch.arange(4)[None])
    with pytest.raises((RuntimeError, ValueError)):
        session.feed(torch.arange(3)[None])


def test_a_crash_of_all_steps_of_more_than_some_tokens_is_an_error() -> None:
    decoder = CrashesBeyond()
    decoder.most = 5
    assert not TargetSubject(decoder, "it").single_steps_only
    assert judged(decoder, "growth").verdict == ERROR


class CrashesBeyond(Core):
    """Shapes fit a few tokens behind a prompt, and no more: nobody wrote that down."""

    most = 1

    wrapped = False

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        new: list[Any] = []
        try:
            if cache is not None and ids.shape[1] > self.most:
                torch.zeros(ids.shape[1]) + torch.zeros(700)
        except RuntimeError as error:
            if self.wrapped:
                raise ValueError("something went wrong") from error
            raise
        return self.run(ids, after(cache, ids), joined(cache, new)), new


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_crash_of_all_steps_but_those_of_one_token_is_a_limit(wrapped: bool) -> None:
    decoder = CrashesBeyond()
    decoder.wrapped = wrapped
    assert TargetSubject(decoder, "it").single_steps_only
    assert judged(decoder, "chunks").verdict == UNSUPPORTED
    assert judged(decoder).verdict == ROUNDING


def test_a_step_that_sees_itself_alone_is_not_hidden_by_giving_it_all_ids_again() -> None:
    class SelfOnly(Core):
        """Steps of several tokens do not see the past, which would be right for a whole text."""

        def forward(self, ids: Tensor, cache: Any = None) -> Any:
            new: list[Any] = []
            past = None if ids.shape[1] > 1 else cache
            logits = self.run(ids, self.places(ids, cache), joined(past, new))
            return logits, new

        def places(self, ids: Tensor, cache: Any) -> Tensor:
            return torch.arange(ids.shape[1]) if ids.shape[1] > 1 else after(cache, ids)

    finding = judged(SelfOnly(), "chunks")
    assert (finding.verdict, finding.first_wrong) == (BUG, 1)


def test_a_decoder_that_breaks_down_behind_every_prompt_is_judged_and_not_refused() -> None:
    finding = judged(CrashesBehindPrompts())
    assert finding.verdict == ERROR and "must match the size" in finding.evidence


def test_a_report_names_what_was_not_run_and_why() -> None:
    report = kvtool.verify(Singly(), scenarios=["decode", "chunks", "crop", "permuted"], tokens=6)
    said = "not run: chunks (one token a step after a prompt), permuted (no select), crop"
    assert report.ok and report.conclusion.endswith(said)
