"""Decoders that are wrong at one size or one length: each is fed what shows it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import kvtool
from kvtool.commands.verify.cache import command
from kvtool.core.verify.arms import Case, play
from kvtool.core.verify.judge import BUG, Judge
from kvtool.core.verify.scenarios import GENERATED, SCENARIOS
from kvtool.core.verify.target import cost
from kvtool.core.verify.target.check import check_target, decode_case
from kvtool.core.verify.target.doctor import examine
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.errors import UsageError
from summing import Sums, When, judged, wrong_in


def test_a_right_decoder_is_right_in_every_scenario() -> None:
    assert wrong_in(Sums()) == set()


RARE: dict[str, tuple[When, str]] = {
    "three": (lambda n, past: n == 3, "steps"),
    "seven": (lambda n, past: n == 7, "steps"),
    "sixteen": (lambda n, past: n == 16, "steps"),
    "sixty-five": (lambda n, past: n == 65, "steps"),
    "several after 128": (lambda n, past: n > 1 and past >= 128, "steps"),
    "one after 300": (lambda n, past: n == 1 and past > 300, "long"),
    "one after 1,000": (lambda n, past: n == 1 and past > 1000, "long"),
    "several after 1,000": (lambda n, past: n > 1 and past > 1000, "long"),
    "the last token": (lambda n, past: past + n == 1200, "long"),
    "ends on 64": (lambda n, past: past + n == 64 and n > 1, "boundaries"),
    "begins on 96": (lambda n, past: past == 96, "boundaries"),
    "a step beyond 64": (lambda n, past: n > 64, "steps"),
}


@pytest.mark.parametrize("name", RARE)
def test_a_bug_at_one_size_or_length_is_found(name: str) -> None:
    when, scenario = RARE[name]
    assert judged(Sums(when), scenario).verdict == BUG


def test_a_prompt_beyond_512_that_is_read_wrongly_is_found() -> None:
    class LongPrompt(Sums):
        def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
            logits, (total, past) = super().step(ids, state)
            return logits, (total * (0.5 if ids.shape[1] > 512 else 1.0), past)

    assert judged(LongPrompt(), "long").verdict == BUG


@pytest.mark.parametrize("name", ["sliding_window", "chunk_size", "attention_window"])
def test_steps_are_put_around_a_size_that_the_configuration_names(name: str) -> None:
    decoder = Sums(lambda n, past: past + n == 2 * 77)
    assert judged(decoder, "boundaries").right
    decoder.config = SimpleNamespace(**{name: 77})
    assert judged(decoder, "boundaries").verdict == BUG


def test_a_block_size_that_is_the_context_is_no_window() -> None:
    decoder = Sums(context=64)
    decoder.config = {"block_size": 64, "window": 8}
    assert TargetSubject(decoder, "it").sizes == (8,)


def test_all_histories_of_a_scenario_are_judged_by_one_pass() -> None:
    subject = TargetSubject(Sums(), "it")
    lengths: list[int] = []
    right = subject.decoder.full
    subject.decoder.full = lambda ids: lengths.append(ids.shape[1]) or right(ids)
    arms = play(subject, Case(SCENARIOS["steps"]))
    # Two short ones find out whether the cache is used.
    assert len(arms.found) > 50 and [n for n in lengths if n > 24] == [max(lengths)]


def test_what_would_take_too_long_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_step_seconds", lambda *_: (0.0, 0.001))
    monkeypatch.setattr(cost, "_pass_seconds", lambda *_: lambda n: 4e-6 * n**2)
    subject = TargetSubject(Sums(), "it")
    main = decode_case(subject.vocab_size, subject.context, tokens=8)
    (found,) = check_target(subject, ["long"], main)
    assert found.finding.right and 160 <= subject.reach < 600
    assert found.finding.not_fed == f"beyond {subject.reach} tokens"
    before = subject.reach
    list(check_target(subject, ["long"], main, thorough=True))
    assert subject.reach > before
    told = str(kvtool.verify(Sums(), scenarios=["long", "decode"], tokens=8))
    assert "; not fed: beyond " in told.splitlines()[-1]


def test_a_slow_decoder_is_fed_little_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_step_seconds", lambda subject: (0.0, 2.0))
    monkeypatch.setattr(cost, "_pass_seconds", lambda subject: lambda n: 2.0)
    subject = TargetSubject(Sums(), "it")
    main = decode_case(subject.vocab_size, subject.context, tokens=8)
    found = {c.finding.scenario: c.finding for c in check_target(subject, GENERATED, main)}
    assert found["long"].not_fed == "most sizes of steps and beyond 64 tokens"
    assert sum(f.working.steps for f in found.values() if f.working) < 70


def test_a_vocabulary_whose_logits_fill_the_memory_shortens_the_histories(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "_step_seconds", lambda subject: (0.0, 0.0))
    monkeypatch.setattr(cost, "_pass_seconds", lambda subject: lambda n: 0.0)
    subject = TargetSubject(Sums(n_ids=31), "it")
    subject.vocab_size = 10**5
    subject.find_reach()
    assert subject.reach <= 600


def test_python_and_the_command_have_the_same_defaults() -> None:
    python = inspect.signature(kvtool.verify).parameters
    line = inspect.signature(command).parameters
    for name in ("tokens", "prompt_length", "thorough"):
        assert python[name].default == line[name].default


def test_a_prompt_is_as_long_as_was_asked_for() -> None:
    found = kvtool.verify(Sums(), scenarios=["decode"], prompt_length=700, tokens=4)
    (finding,) = found.findings
    assert finding.working is not None and finding.working.steps == 5
    assert decode_case(31, 1200, tokens=4, prompt_length=700).n_prompt == 700
    with pytest.raises(UsageError, match=r"^a prompt of 1,200 tokens is too long \(the decoder"):
        kvtool.verify(Sums(), prompt_length=1200)


# What is diagnosed


def test_a_bug_far_behind_is_diagnosed_on_one_short_history() -> None:
    seen: list[tuple[str, int, int]] = []

    def doctor(subject: Any, case: Case, step: int, arms: Any) -> Any:
        seen.append((case.scenario.name, step, len(arms.found)))
        return examine(subject, case, step, arms)

    subject = TargetSubject(Sums(lambda n, past: past > 1000), "it")
    found = Judge(subject, doctor).judge(Case(SCENARIOS["long"]))
    subject.reach = 1200
    found = Judge(subject, doctor).judge(Case(SCENARIOS["long"]))
    assert found.verdict == BUG and found.first_wrong is not None and found.first_wrong > 1
    assert seen == [("long", 1, 5)]  # a past, the step, and three of one token behind it


def test_generated_scenarios_are_the_ones_with_schedules() -> None:
    assert {"prompts", "steps", "boundaries", "long"} == GENERATED
