"""How long a check will take: what is counted is what is fed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvtool.core.verify import check, expected
from kvtool.core.verify.expected import Work, cases_of, in_words, seconds_for, work_of
from kvtool.core.verify.model_subject import Formats, ModelSession, ModelSubject
from kvtool.core.verify.subject import Start
from small_models import random_model

NAMES = ["decode", "padded", "crop", "overflow", "window"]


def test_the_tokens_that_are_counted_are_those_that_are_fed(monkeypatch: pytest.MonkeyPatch):
    model = random_model(positions="rotary")
    main = check.main_case(model, torch.tensor([[1, 5, 2]]), 6)
    kinds = ["dynamic", "static", "sliding"]
    work = work_of(Formats(model), kinds, ["exact"], cases_of(NAMES, main, False))["exact"]
    cached, uncached = list[int](), list[int]()
    feed, full = ModelSession.feed, ModelSubject.full

    def fed(self: ModelSession, ids: Tensor) -> Tensor:
        logits = feed(self, ids)  # a token that is refused is not counted
        cached.append(ids.numel())
        return logits

    def passed(self: ModelSubject, ids: Tensor, start: Start) -> Tensor:
        uncached.append(ids.numel())
        return full(self, ids, start)

    monkeypatch.setattr(ModelSession, "feed", fed)
    monkeypatch.setattr(ModelSubject, "full", passed)
    list(check.check_model(Formats(model), kinds, ["exact"], NAMES, main))
    assert work.steps == cached.count(1)
    assert work.tokens == sum(n for n in cached if n > 1) + sum(uncached)


def test_what_is_skipped_takes_no_time():
    model = random_model()
    main = check.main_case(model, torch.tensor([[1, 5, 2]]), 6)
    cases = cases_of(["decode"], main, False)
    skip = {("dynamic", "default", "decode")}
    assert work_of(Formats(model), ["dynamic"], ["default"], cases, skip) == {"default": Work()}


def test_the_time_is_that_of_all_steps_and_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expected, "_timed", lambda work: work() * 0 + 0.5)
    work = {"default": Work(steps=10, tokens=144, passes=2, tokens_in_float64=50)}
    # Steps, tokens at 72 a pass, and passes in float64 whose tokens cost nothing more.
    found = seconds_for(Formats(random_model(context=80)), work)
    assert found == pytest.approx(10 * 0.5 + 144 / 72 * 0.5 + 2 * 0.5)


def test_the_words_say_minutes():
    assert in_words({"exact": Work(1000, 20, 0, 0)}, 61).startswith("about 1 minute: 1,000 steps")
