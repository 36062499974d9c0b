"""The self-test: every planted bug is reported as what it is, nothing right is, and a broken check
is found out."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

from kvtool.core.verify import float64, judge, measured
from kvtool.core.verify.diagnosis import hypotheses, locate
from kvtool.core.verify.diagnosis.hypotheses import HYPOTHESES, UNKNOWN
from kvtool.core.verify.mutants import (
    BUG_CLASSES,
    LOOKALIKES,
    MUTANTS,
    Lookalike,
    Mutant,
    Planted,
    selftest,
)
from kvtool.core.verify.scenarios import GENERATED, SCENARIOS
from self_tested import caught, passed


def named(planted: Planted) -> str:
    return planted.name


@pytest.mark.parametrize("mutant", MUTANTS, ids=named)
def test_a_planted_bug_is_caught_at_its_step_in_its_place_and_with_its_hint(
    mutant: Mutant,
) -> None:
    outcome = selftest.try_mutant(mutant)
    assert outcome.ok and dataclasses.replace(outcome, detail="") == caught(mutant), outcome
    assert " or: " not in outcome.detail, "other bugs look like this one in its scenario"


@pytest.mark.parametrize("lookalike", LOOKALIKES, ids=named)
def test_what_is_right_is_not_reported(lookalike: Lookalike) -> None:
    outcome, expected = selftest.try_lookalike(lookalike), passed(lookalike)
    assert outcome.ok, outcome
    alike = {"scenario": expected.scenario, "found": expected.found}
    assert dataclasses.replace(outcome, **alike) == expected, outcome
    assert {*outcome.found.split(", "), "rounding"} <= {*expected.found.split(", "), "identical"}


# What is planted


def test_every_class_of_real_bugs_is_planted_at_least_twice() -> None:
    count = collections.Counter(mutant.bug_class for mutant in MUTANTS)
    assert all(count[number] >= 2 for number in BUG_CLASSES), count
    assert count.keys() <= {0, *BUG_CLASSES}
    assert len(MUTANTS) >= 40 and len(LOOKALIKES) >= 8


def test_names_are_unique_and_scenarios_are_those_that_a_user_runs() -> None:
    names = [planted.name for planted in (*MUTANTS, *LOOKALIKES)]
    assert len(set(names)) == len(names) and names == selftest.names()
    assert {mutant.scenario for mutant in MUTANTS} == set(SCENARIOS)
    tried = {name for lookalike in LOOKALIKES for name in lookalike.scenarios or SCENARIOS}
    assert tried == set(SCENARIOS)


def test_what_caches_of_ours_do_not_show_is_planted_in_a_decoder_and_has_a_right_one() -> None:
    theirs = GENERATED | {"rows", "leaving", "padded-rows", "right-padded", "saved", "ids"}
    planted = {mutant.scenario for mutant in MUTANTS if mutant.decoder}
    right = {name for one in LOOKALIKES if one.decoder for name in one.scenarios}
    assert planted == theirs | {"second-request"}
    assert right == planted


def test_what_nothing_has_to_be_said_of_is_not_looked_into() -> None:
    quiet = mutant("a row leaves, its values stay")
    assert quiet.due_doctor is None and mutant("a value is lost").due_doctor is not None


def test_every_hypothesis_explains_a_planted_bug_and_few_bugs_have_none() -> None:
    hints = [mutant.hint for mutant in MUTANTS]
    assert {hypothesis.hint for hypothesis in HYPOTHESES} <= set(hints)
    assert 1 <= hints.count("") <= 4


def test_a_small_model_is_the_same_each_time_and_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, two = (MUTANTS[0].subject().model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_progress_names_all_that_is_tried_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "MUTANTS", MUTANTS[:2])
    monkeypatch.setattr(selftest, "LOOKALIKES", LOOKALIKES[:1])
    told: list[str] = []
    outcomes = list(selftest.run(told.append))
    assert told == [outcome.name for outcome in outcomes]
    assert told == [MUTANTS[0].name, MUTANTS[1].name, LOOKALIKES[0].name]
    assert [outcome.quiet for outcome in outcomes] == [None, None, True]


# A check that is broken must fail


def mutant(name: str) -> Mutant:
    return next(planted for planted in MUTANTS if planted.name == name)


OFF_BY_ONE = mutant("position one too high")


def test_a_check_that_takes_all_for_rounding_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float64, "ROUNDING_64", 1e9)
    monkeypatch.setattr(judge, "NOISE", 1e9)
    monkeypatch.setattr(measured, "LIMIT", 1e9)
    outcome = selftest.try_mutant(OFF_BY_ONE)
    assert not outcome.ok
    assert (outcome.caught, outcome.found) == (False, "rounding")
    assert "no scenario catches it" in outcome.detail


def test_a_check_that_takes_rounding_for_a_bug_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(float64, "ROUNDING_64", 0.0)
    lookalike = dataclasses.replace(LOOKALIKES[0], scenarios=("decode",))
    outcome = selftest.try_lookalike(lookalike)
    assert not outcome.ok
    assert outcome.quiet is False and outcome.found.startswith("bug")


def test_a_check_without_the_hypothesis_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tuple(h for h in HYPOTHESES if h.hint != OFF_BY_ONE.hint)
    monkeypatch.setattr(hypotheses, "HYPOTHESES", kept)
    outcome = selftest.try_mutant(OFF_BY_ONE)
    assert (outcome.caught, outcome.step_right, outcome.layer_right) == (True, True, True)
    assert outcome.hint_right is False and not outcome.ok
    assert UNKNOWN in outcome.detail


def test_a_check_that_heals_everything_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypotheses, "REPRODUCED", float("inf"))
    assert selftest.try_mutant(mutant("a value is lost")).hint_right is False


def test_a_check_that_dates_a_bug_too_late_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = mutant("keys rotated in place")  # its gap grows from step to step
    found = judge.Judge(keys.subject()).judge(judge.Case(SCENARIOS[keys.scenario]))
    monkeypatch.setattr(float64, "ROUNDING_64", 0.9 * max(found.by_step["promoted"]))
    outcome = selftest.try_mutant(keys)
    assert outcome.caught and outcome.step_right is False


def test_a_check_that_locates_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "TOLERANCE", 1e9)
    outcome = selftest.try_mutant(OFF_BY_ONE)
    assert outcome.caught and outcome.layer_right is False


def test_a_scenario_that_is_blind_is_told_from_a_bug_that_nothing_sees() -> None:
    blind = dataclasses.replace(mutant("padding mask dropped"), scenario="decode")
    outcome = selftest.try_mutant(blind)
    assert outcome.caught is False
    assert outcome.detail.endswith("(caught in padded, padded-rows)")
