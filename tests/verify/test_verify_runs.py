"""What the two arms of the check are fed, and what they touch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import base
from kvtool.core.models import Model
from kvtool.core.verify import model_subject as subjects
from kvtool.core.verify.check import check_model, control
from kvtool.core.verify.judge import BUG, Case, Judge, play
from kvtool.core.verify.model_subject import Formats, ModelSession
from kvtool.core.verify.mutants.selftest import one_thread
from kvtool.core.verify.scenario_run import ScenarioRun
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.check import decode_case
from small_models import random_model
from verify_subjects import MODELS, judged, subject


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_an_ability_that_no_subject_can_have_is_refused() -> None:
    decode = SCENARIOS["decode"]
    with pytest.raises(
        ValueError, match=r"^rows: needs \['rows'\] \(expected some of batch, .+\)$"
    ):
        dataclasses.replace(decode, name="rows", needs=("crop", "rows"))


BEYOND = ("window", "two-sources", "right-padded", "saved")  # the subject has no such ability
PLAYABLE = [name for name in SCENARIOS if name not in BEYOND]


def histories(one: subjects.ModelSubject, case: Case) -> list[Tensor]:
    run = case.run(one)
    with torch.inference_mode():
        case.scenario.play(run)
    return [segment.history for segment in run.segments]


@pytest.mark.parametrize("scenario", PLAYABLE)
def test_every_run_of_a_scenario_feeds_the_same_ids(scenario: str) -> None:
    case, one = Case(SCENARIOS[scenario]), subject()
    first, again, double = (histories(s, case) for s in (one, one, one.to(torch.float64)))
    assert len(first) == len(again) == len(double)
    for a, b, c in zip(first, again, double, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_both_arms_are_fed_the_same_ids() -> None:
    fed: dict[bool, list[list[int]]] = {True: [], False: []}
    one = subject()

    def record(_: Model, args: tuple[Any, ...]) -> None:
        tokens, _, cache = (*args, None)[:3]
        fed[cache is not None].append(tokens[0].tolist())

    one.model.register_forward_pre_hook(record)
    given = torch.tensor([[5, 9, 2, 6, 5, 3, 5]])
    play(one, Case(SCENARIOS["decode"], given, 4))
    assert fed[True] == [[5, 9, 2, 6], [5], [3], [5]]
    assert fed[False] == [given[0].tolist()]


def test_ids_that_are_given_are_fed_and_the_rest_is_drawn() -> None:
    given = torch.tensor([[1, 1, 1]])
    case = Case(SCENARIOS["decode"], given, 2)
    assert torch.equal(histories(subject(), case)[0], given)
    drawn = Case(SCENARIOS["crop"], given)
    assert histories(subject(), drawn)[0].shape[1] > 3


@pytest.mark.parametrize("name", ["sinusoidal", "rotary, two heads share", "seq2seq"])
def test_the_uncached_arm_touches_no_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a cache was touched")

    one = subject(**MODELS[name])
    run = ScenarioRun(one)
    start, ids = run.start(), run.next_ids(1, 9)
    with torch.inference_mode():
        expected = one.full(ids, start)
        for method in ("__init__", "begin", "write", "attend", "commit"):
            monkeypatch.setattr(base.Cache, method, refuse)
        monkeypatch.setattr(subjects, "feed", refuse)
        assert torch.equal(one.full(ids, start), expected)


def test_a_run_stops_behind_the_step_that_is_wanted() -> None:
    case = Case(SCENARIOS["decode"])
    run = case.run(subject(), last=3)
    with torch.inference_mode(), pytest.raises(Exception, match="3"):
        case.scenario.play(run)
    assert run.n_steps == 4 == len(run.segments[0].answers)


def test_what_padding_answers_is_not_compared() -> None:
    played = play(subject(), Case(SCENARIOS["padded"]))
    found, expected = played.found[0], played.expected[0]
    assert (found[1, :4] == 0).all() and (expected[1, :4] == 0).all()
    assert (found[1, 4:] != 0).any() and (found[0, 0] != 0).any()


# What a scenario is for


def test_a_token_too_many_must_be_refused() -> None:
    class Accepts(ModelSession):
        def feed(self, ids: Tensor) -> Tensor:
            if self.ids.shape[1] == self.cache.spec.capacity:
                return torch.zeros(1, 1, self.subject.vocab_size)
            return super().feed(ids)

    found = judged(scenario="overflow", session=Accepts)
    assert (found.verdict, found.first_wrong) == (BUG, 3)
    assert "beyond the capacity" in found.evidence


def test_any_refusal_of_a_token_too_many_will_do() -> None:
    class Refuses(ModelSession):
        def feed(self, ids: Tensor) -> Tensor:
            if self.ids.shape[1] == self.cache.spec.capacity:
                raise AssertionError("full")
            return super().feed(ids)

    assert judged(scenario="overflow", session=Refuses).right


def test_a_second_source_is_another_and_rows_of_a_batch_have_sources_of_their_own() -> None:
    run = ScenarioRun(subject(**MODELS["seq2seq"]))
    first, second = (run.start(batch=2, source=number).source for number in (0, 1))
    assert first.mask.sum(1).tolist() == [5, 7]
    assert second.mask.sum(1).tolist() == [8, 10]
    assert not torch.equal(first.ids[0, :5], second.ids[0, :5])


def test_a_subject_that_was_judged_is_as_it_was() -> None:
    one = subject()
    before = {name: weight.clone() for name, weight in one.model.state_dict().items()}
    for scenario in PLAYABLE:
        Judge(one).judge(Case(SCENARIOS[scenario]))
    after = one.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_all_kinds_and_the_planted_bug_share_one_float64_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    formats = Formats(random_model(context=64))
    converted: list[Any] = []

    def noted(model: Model, dtype: torch.dtype) -> Any:
        converted.append(dtype)
        return torch.nn.Module.to(model, dtype)

    monkeypatch.setattr(Model, "to", noted)
    case = decode_case(formats.model.config.vocab_size, 64, tokens=3)
    found = list(check_model(formats, ["dynamic", "int8"], ["default", "exact"], ["decode"], case))
    assert [c.finding.float64 is not None for c in found] == [True, False, True, False]
    assert control(formats, case).verdict == BUG
    assert converted == [torch.float64]


def test_a_session_that_is_reset_reads_the_new_source() -> None:
    one = subject(**MODELS["seq2seq"])
    run = ScenarioRun(one)
    session = one.start(run.start(batch=2))
    start: Start = run.start(batch=2, source=1)
    session.reset(start)
    ids = run.next_ids(2, 3)
    with torch.inference_mode():
        assert torch.allclose(session.feed(ids), one.full(ids, start), atol=1e-5)
