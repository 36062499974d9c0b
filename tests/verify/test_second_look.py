"""Before a cache is called wrong it gets a second look, and before it is called right one too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from doubtful_decoders import (
    Codes,
    CodesInBatches,
    CodesInBoth,
    ComplexTable,
    Decoder,
    Halves,
    LongBase,
    LongBases,
    Refuses,
    RoundedNumber,
    WrongLow,
)
from kvtool.core.verify.arms import Case
from kvtool.core.verify.copies import converted, moved
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.judge import Judge
from kvtool.core.verify.mutants.selftest import one_thread
from kvtool.core.verify.outcome import BUG, IDENTICAL, LOSSY, PRECISION, ROUNDING, UNDECIDED
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.target.check import decode_case, target_control
from kvtool.core.verify.target.subject import TargetSubject

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def judged(
    decoder: nn.Module, lossy: bool = False, thorough: bool = False, scenario: str = "decode"
) -> Finding:
    subject = TargetSubject(decoder, "it")
    subject.lossy |= lossy
    return Judge(subject).judge(Case(SCENARIOS[scenario]), thorough)


# Copies


def test_a_copy_in_float64_takes_complex_tables_and_whatever_else_is_held_along() -> None:
    class Held:
        def __init__(self) -> None:
            self.table, self.format = torch.ones(2), torch.float32

    one = ComplexTable()
    one.held, one.pair, one.format = Held(), (torch.ones(1), 3), torch.float32
    two = converted(one, torch.float64)
    assert two.tables["rotary"][0].dtype == torch.complex128
    assert torch.equal(two.tables["rotary"][0].imag.float(), one.tables["rotary"][0].imag)
    assert (two.held.table.dtype, two.held.format) == (torch.float64, torch.float64)
    assert (two.pair[0].dtype, two.pair[1], two.format) == (torch.float64, 3, torch.float64)
    assert two.head.weight.dtype == torch.float64
    assert one.held.table.dtype == one.pair[0].dtype == one.head.weight.dtype == torch.float32


def test_a_copy_in_a_low_format_is_what_its_user_would_get() -> None:
    two = converted(ComplexTable(), torch.bfloat16)
    assert two.tables["rotary"][0].dtype == torch.complex64
    assert two.head.weight.dtype == torch.bfloat16


def test_weights_that_are_held_twice_stay_one_in_a_copy() -> None:
    one = Decoder()
    one.other = nn.Linear(one.head.in_features, one.head.out_features)
    one.other.weight = one.head.weight
    two, three = converted(one, torch.float64), moved(one, 1e-3)
    assert two.other.weight is two.head.weight and three.other.weight is three.head.weight
    assert not torch.equal(three.head.weight, one.head.weight)


def test_moved_weights_move_by_what_was_asked_and_tables_only_if_asked() -> None:
    one = RoundedNumber()
    two, three = moved(one, 1e-3), moved(one, 1e-3, tables=True)
    assert (two.head.weight / one.head.weight - 1).std().item() == pytest.approx(1e-3, rel=0.2)
    assert torch.equal(two.number, one.number) and torch.equal(three.head.weight, one.head.weight)
    assert not torch.equal(three.number, one.number)


# The float64 run


def test_complex_tables_hide_no_bug() -> None:
    assert judged(ComplexTable()).verdict == ROUNDING
    assert judged(ComplexTable(conjugate=True)).verdict == BUG


def test_a_number_that_one_arm_rounded_to_float32_is_no_bug() -> None:
    found = judged(RoundedNumber())
    assert found.verdict == PRECISION and found.right
    assert found.float64.relative > 1e-10
    assert "hold rounded" in found.evidence


def test_a_float64_run_of_another_model_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(decoder: object, dtype: torch.dtype) -> object:
        other = converted(decoder, dtype)
        other.module.head.weight.data *= 0.5
        other.module.late = False
        return other

    monkeypatch.setattr("kvtool.core.verify.target.subject.converted", halved)
    found = judged(Decoder())
    assert found.verdict == ROUNDING and "another model" in found.evidence
    found = judged(Decoder(late=True))
    assert found.verdict == BUG and "another model" in found.evidence


# Noise


def test_a_decoder_that_refuses_float64_is_judged_by_its_own_noise() -> None:
    found = judged(Refuses())
    assert found.verdict == ROUNDING and found.right and "expected Float" in found.evidence
    found = judged(Refuses(late=True))
    assert (found.verdict, found.first_wrong) == (BUG, 1)
    assert found.noise > 1000


def test_a_slip_in_bfloat16_alone_is_a_bug_and_the_same_code_right_elsewhere() -> None:
    found = judged(WrongLow().bfloat16())
    assert found.verdict == BUG and "bfloat16 alone" in found.evidence
    assert judged(WrongLow()).verdict in (IDENTICAL, ROUNDING)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", [Decoder, CodesInBoth])
def test_a_right_decoder_is_right_in_low_formats(kind: type[Decoder], dtype: torch.dtype) -> None:
    assert judged(kind().to(dtype)).right
    assert judged(kind(late=True).to(dtype)).verdict == BUG


# Length


def test_a_pass_that_depends_on_its_length_is_compared_over_each_steps_own_prefix() -> None:
    found = judged(LongBase())
    assert found.right and "own prefix" in found.evidence
    assert judged(LongBase(late=True)).verdict == BUG


def test_what_no_pass_computes_is_not_called_a_bug() -> None:
    found = judged(LongBases())
    assert found.verdict == UNDECIDED and "depends on its length" in found.evidence
    assert judged(LongBases(late=True)).verdict == BUG


# Loss


def test_a_cache_that_rounds_is_lossy_and_no_bug_and_right_if_declared() -> None:
    found = judged(Codes())
    assert (found.verdict, found.right, found.first_wrong) == (LOSSY, False, 1)
    assert 1e-5 < found.loss < 1e-2 and "one wrong token" in found.evidence
    found = judged(Codes(), lossy=True)
    assert (found.verdict, found.right, found.first_wrong) == (LOSSY, True, None)


def test_an_attribute_declares_a_loss_too() -> None:
    one = Codes()
    one.lossy = True
    assert judged(one).right


@pytest.mark.parametrize("lossy", [False, True])
def test_a_bug_in_a_cache_that_rounds_stays_a_bug(lossy: bool) -> None:
    assert judged(Codes(late=True), lossy).verdict == BUG
    assert judged(CodesInBoth(late=True), lossy).verdict == BUG
    assert judged(Decoder(late=True), lossy).verdict == BUG


def test_what_rounds_in_a_batch_alone_is_a_bug_of_batches_and_no_loss() -> None:
    assert judged(Codes(), scenario="rows").verdict == LOSSY
    assert judged(CodesInBatches(), scenario="decode").verdict == ROUNDING
    found = judged(CodesInBatches(), scenario="rows")
    assert found.verdict == BUG and "stays in float64" in found.evidence


def test_a_cache_in_float16_under_a_float32_model_loses_precision_unless_declared() -> None:
    found = judged(Halves())
    assert (found.verdict, found.lossy, found.right) == (PRECISION, True, False)
    found = judged(Halves(), lossy=True)
    assert (found.verdict, found.right) == (LOSSY, True) and found.loss > 1e-6


def test_the_planted_bug_is_found_in_a_cache_that_declares_a_loss() -> None:
    subject = TargetSubject(Codes(), "it")
    subject.lossy = True
    assert target_control(subject, decode_case(subject.vocab_size, subject.context)).verdict == BUG


def test_one_short_history_of_many_is_enough_to_be_sure_of_a_bug(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[Case] = []
    innocent = Judge._innocent

    def watched(judge: Judge, case: Case, *rest: Any) -> Finding | None:
        tried.append(case)
        return innocent(judge, case, *rest)

    monkeypatch.setattr(Judge, "_innocent", watched)
    case = Case(SCENARIOS["prompts"])
    assert Judge(TargetSubject(Decoder(late=True), "it")).judge(case).verdict == BUG
    assert tried and case not in tried
