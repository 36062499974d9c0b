"""Bug or rounding: right caches are called right, and each way of being wrong gets its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.none import NoCache
from kvtool.core.kernels.default import DefaultKernels
from kvtool.core.kernels.exact import EXACT
from kvtool.core.verify.check import small
from kvtool.core.verify.judge import (
    BUG,
    ERROR,
    IDENTICAL,
    NO_CACHE,
    NOT_CAUSAL,
    PRECISION,
    ROUNDING,
    UNSUPPORTED,
    VACUOUS,
    Case,
    Judge,
)
from kvtool.core.verify.model_subject import ModelSession
from kvtool.core.verify.mutants.contents import NaNBelowFloat64, StoresLower, WrongBelowFloat64
from kvtool.core.verify.mutants.lookalikes import LowSoftmax
from kvtool.core.verify.mutants.mutant import moved
from kvtool.core.verify.mutants.selftest import one_thread
from kvtool.core.verify.mutants.slots import NaNBehind
from kvtool.core.verify.scenarios import PREFILL, SCENARIOS, STEPS
from kvtool.errors import CacheOpUnsupported, CheckFailed
from verify_subjects import MODELS, ROTARY, STORING, TELLING, judged, subject


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


N_STEPS = 1 + 2 * STEPS  # of the scenario `decode`

# Right caches


FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_right_cache_differs_by_rounding_at_most(name: str, dtype: torch.dtype) -> None:
    """A third of the kinds each time, so that every kind meets every model and every format."""
    first = (*MODELS,).index(name) + FORMATS.index(dtype)
    for kind in [*STORING, *STORING][first % len(STORING) :: len(STORING) // 2][:2]:
        found = judged(small(kind), dtype=dtype, thorough=True, **MODELS[name])
        assert found.right and found.verdict in (IDENTICAL, ROUNDING), found
        assert found.first_wrong is None and found.diagnosis.hint == ""
        assert found.working.steps == N_STEPS
        assert found.working.relative <= 16 * torch.finfo(dtype).eps
        assert found.float64.relative < 1e-14 and found.promoted.relative < 1e-14


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", MODELS)
def test_a_right_cache_is_right_in_every_scenario_that_it_can_play(
    name: str, scenario: str
) -> None:
    """Every kind in each, with one of the two models that tell most, if both can play it: a kind
    decides nothing by a source, nor by how positions are used."""
    telling = [n for n in TELLING if not SCENARIOS[scenario].lacking(subject(**MODELS[n]))]
    kinds = ["dynamic"]
    if name in telling:
        first = (*SCENARIOS,).index(scenario) + telling.index(name)
        kinds = STORING[first % len(telling) :: len(telling)]
    for kind in kinds:
        found = judged(small(kind), scenario, **MODELS[name])
        assert found.right or found.verdict == UNSUPPORTED, found


def test_a_scenario_that_a_subject_cannot_play_is_unsupported_and_says_what_it_needs() -> None:
    found = judged(scenario="two-sources")
    assert found.verdict == UNSUPPORTED and not found.right
    assert "source" in found.evidence


def test_a_context_too_short_for_a_scenario_is_unsupported_and_not_an_error() -> None:
    found = judged(scenario="growth", context=40)
    assert found.verdict == UNSUPPORTED
    assert "40" in found.evidence


def test_an_operation_that_a_cache_refuses_is_unsupported_and_not_an_error() -> None:
    class Refuses(DynamicCache):
        def crop(self, length: int) -> None:
            raise CacheOpUnsupported("refusing", "crop", "it was asked not to")

    found = judged(Refuses, "crop")
    assert found.verdict == UNSUPPORTED
    assert "refusing cache cannot crop" in found.evidence


def test_identical_means_that_every_step_is_equal_bit_for_bit() -> None:
    found = Judge(subject().with_kernels(EXACT)).judge(Case(SCENARIOS["decode"]))
    assert found.verdict == IDENTICAL and found.right
    assert (found.working.steps, found.working.identical) == (N_STEPS, N_STEPS)
    assert found.working.first is None
    assert found.working.ulps == found.working.relative == 0
    assert found.float64 is None, "nothing else has to be computed"


# What proves nothing


def test_no_cache_proves_nothing() -> None:
    found = judged(NoCache)
    assert found.verdict == NO_CACHE and not found.right
    assert "computes the whole sequence again" in found.evidence


def test_a_session_says_itself_why_it_proves_nothing() -> None:
    class NeverAsked(ModelSession):
        def vacuous(self) -> str | None:
            return "the cache was never asked"

    found = judged(session=NeverAsked)
    assert (found.verdict, found.evidence) == (VACUOUS, "the cache was never asked")


def test_a_wrong_cache_is_not_excused_by_being_unused() -> None:
    class Wrong(NoCache):
        def _make_step(self, start: int, n_new: int) -> Step:
            step = super()._make_step(start, n_new)
            return dataclasses.replace(step, q_pos=step.q_pos + 1)

    assert judged(Wrong).verdict == BUG


# Bugs


@pytest.mark.parametrize("late", [0, 1, 4, 2 * STEPS - 1])
def test_a_bug_is_dated_to_the_step_in_which_it_begins(late: int) -> None:
    held = PREFILL + late
    found = judged(moved(lambda pos, n: pos + int(n >= held)))
    assert (found.verdict, found.first_wrong) == (BUG, 1 + late)
    assert found.by_step["promoted"][late] < 1e-14


def test_a_bug_in_the_prompt_alone_is_dated_to_step_0() -> None:
    class WrongPrompt(DynamicCache):
        def _make_step(self, start: int, n_new: int) -> Step:
            step = super()._make_step(start, n_new)
            return step if start else dataclasses.replace(step, causal=False)

    found = judged(WrongPrompt)
    assert (found.verdict, found.first_wrong) == (BUG, 0)


def test_a_gap_that_is_not_a_number_counts_as_infinite() -> None:
    found = judged(NaNBehind, "growth")
    assert found.verdict == BUG
    assert found.working.relative == found.float64.relative == float("inf")


def test_an_exception_is_reported_with_its_step_and_first_line() -> None:
    class Fails(DynamicCache):
        def begin(self, n_new: int) -> Step:
            if self.length == PREFILL + 2:
                raise RuntimeError("no such layer\nand more")
            return super().begin(n_new)

    found = judged(Fails)
    assert (found.verdict, found.first_wrong) == (ERROR, 3)
    assert (
        "step 3 raised RuntimeError: no such layer" in found.evidence
        and "and more" not in found.evidence
    )


@pytest.mark.parametrize("mutant", [WrongBelowFloat64, NaNBelowFloat64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bug_in_the_working_format_alone_is_not_called_rounding(
    mutant: type[DynamicCache], dtype: torch.dtype
) -> None:
    found = judged(mutant, dtype=dtype)
    assert (found.verdict, found.first_wrong) == (BUG, 2)
    assert found.float64.relative < 1e-14
    assert "alone" in found.evidence


# Precision has two faces


def test_a_model_that_computes_lower_in_both_arms_is_right() -> None:
    one = subject().with_kernels(LowSoftmax())
    found = Judge(one).judge(Case(SCENARIOS["decode"]))
    assert found.verdict == PRECISION and found.right and not found.lossy
    assert found.float64.relative > 1e-10 and found.promoted.relative < 1e-14
    assert "the model itself" in found.evidence


def test_a_cache_that_stores_lower_loses_what_nobody_gave_away() -> None:
    found = judged(StoresLower)
    assert found.verdict == PRECISION and found.lossy and not found.right
    assert found.first_wrong == 1
    assert "the cache stores" in found.evidence


def test_a_loss_is_seen_under_a_model_that_computes_lower_too() -> None:
    one = subject(StoresLower).with_kernels(LowSoftmax())
    found = Judge(one).judge(Case(SCENARIOS["decode"]))
    assert found.verdict == PRECISION and found.lossy


# Models that nothing can be said of


class SeesAll(DefaultKernels):
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        return super().attention(q, k, v, None, False)


def test_a_model_that_is_not_causal_is_no_bug_of_its_cache() -> None:
    found = Judge(subject().with_kernels(SeesAll())).judge(Case(SCENARIOS["decode"]))
    assert found.verdict == NOT_CAUSAL and not found.right
    assert "changing token 3" in found.evidence


def test_a_subject_that_cannot_run_in_float64_is_judged_by_the_noise_of_its_format() -> None:
    class Only32(DefaultKernels):
        def attention(
            self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
        ) -> Tensor:
            if q.dtype == torch.float64:
                raise RuntimeError("not implemented for Double")
            return super().attention(q, k, v, mask, causal)

    found = Judge(subject().with_kernels(Only32())).judge(Case(SCENARIOS["decode"]))
    assert found.verdict == ROUNDING and found.right
    assert "float64" in found.evidence and "not implemented for Double" in found.evidence
    wrong = moved(lambda pos, n: pos + int(n > 0))
    found = Judge(subject(wrong).with_kernels(Only32())).judge(Case(SCENARIOS["decode"]))
    assert (found.verdict, found.first_wrong, found.right) == (BUG, 1, False)
    assert found.noise > 100


def test_logits_that_are_not_finite_fail_the_check_naming_a_step() -> None:
    one = subject(positions="learned", tied=False)
    with torch.no_grad():
        one.model.embed.positions.weight[0] = float("nan")
    with pytest.raises(CheckFailed, match="step 0: the logits are not finite"):
        Judge(one).judge(Case(SCENARIOS["decode"]))


def test_what_is_thorough_computes_all_precisions_and_what_is_not_stops_when_it_knows() -> None:
    assert judged(thorough=True, **ROTARY).promoted is not None
    quick = judged(**ROTARY)
    assert quick.float64 is not None and quick.promoted is None
