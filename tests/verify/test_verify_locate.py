"""Where a bug is and what it does: the place is named, and so is the bug, if it is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.kernels.default import DefaultKernels
from kvtool.core.verify.arms import Arms
from kvtool.core.verify.compare import ROUNDING_64, distances
from kvtool.core.verify.diagnosis.doctor import examine
from kvtool.core.verify.diagnosis.hypotheses import (
    HYPOTHESES,
    REPRODUCED,
    STEPS_AFTER,
    UNKNOWN,
    explain,
    reproduces,
)
from kvtool.core.verify.diagnosis.hypotheses.positions import OneTooFar
from kvtool.core.verify.diagnosis.hypothesis import Hypothesis
from kvtool.core.verify.diagnosis.locate import AttentionRecorder, Location, Record, locate, ranges
from kvtool.core.verify.judge import Case, Diagnosis, play
from kvtool.core.verify.model_subject import ModelSession
from kvtool.core.verify.mutants.mutant import moved
from kvtool.core.verify.mutants.selftest import one_thread
from kvtool.core.verify.mutants.windows import windowed
from kvtool.core.verify.scenarios import SCENARIOS
from verify_subjects import MODELS, ROTARY, TELLING, judged, subject


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


Change = Callable[[Tensor, Tensor], None]  # of the keys and values (B,Hkv,S,D) that a step reads


def reading(layer: int, change: Change) -> type[DynamicCache]:
    """A cache whose steps behind the first read something else in one layer."""

    class Reading(DynamicCache):
        def write(self, at: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            keys, values = (t.clone() for t in super().write(at, k, v, step))
            if at == layer and self.length:
                change(keys, values)
            return keys, values

    return Reading


def lose_key(keys: Tensor, values: Tensor) -> None:
    keys[:, 1, 3] = 0.0


def lose_values(keys: Tensor, values: Tensor) -> None:
    values[:, :, 2:5] = 0.0


def diagnosis(make: type[DynamicCache], scenario: str = "decode") -> Diagnosis:
    return judged(make, scenario, **ROTARY).diagnosis


# The place


@pytest.mark.parametrize("layer", [0, 1])
def test_a_lost_key_is_located_by_layer_head_and_token(layer: int) -> None:
    found = diagnosis(reading(layer, lose_key))
    assert found[:3] == (layer, "stored K", (1,))
    assert found.place == f"layer {layer}, stored K, head 1 (of token 3)"


@pytest.mark.parametrize("layer", [0, 1])
def test_lost_values_of_all_heads_are_located_by_layer_and_tokens(layer: int) -> None:
    found = diagnosis(reading(layer, lose_values))
    assert found[:3] == (layer, "stored V", ())
    assert found.place == f"layer {layer}, stored V (of tokens 2-4)"


def test_wrong_positions_show_in_rotated_queries_or_in_the_input_that_they_add_to() -> None:
    far = moved(lambda pos, held: pos + int(held > 0))
    assert diagnosis(far)[:3] == (0, "queries", (0, 1, 2, 3))
    added = judged(far, **MODELS["sinusoidal"]).diagnosis
    assert added[:2] == (0, "attention input")
    assert "positions" in added.place


def test_a_key_too_few_is_told_with_the_token_and_both_numbers() -> None:
    class SeesLess(DynamicCache):
        def _make_step(self, start: int, n_new: int) -> Step:
            step = super()._make_step(start, n_new)
            mask = (step.k_pos > 0)[:, None, None].expand(-1, 1, n_new, -1)
            return dataclasses.replace(step, mask=mask, causal=False) if start else step

    found = diagnosis(SeesLess)
    assert found[:2] == (0, "visible keys")
    assert "token 11 of row 0 sees 11, not 12" in found.place


def test_an_attention_of_its_own_is_located_by_what_it_answers() -> None:
    class Own(DynamicCache):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
            keys, values = self.write(layer, k, v, step)
            out = torch.nn.functional.scaled_dot_product_attention(
                q, keys, values, step.mask, is_causal=step.causal, enable_gqa=True
            )
            return out * 2 if layer == 1 and self.length else out

    assert diagnosis(Own)[:2] == (1, "attention output")


def test_a_bug_behind_the_last_layer_is_located_there() -> None:
    class Doubles(ModelSession):
        def feed(self, ids: Tensor) -> Tensor:
            return super().feed(ids) * (2 if self.ids.shape[1] else 1)

    found = judged(session=Doubles).diagnosis
    assert (found.layer, found.part) == (None, "logits")
    assert found.place.startswith("after the last layer")


@pytest.mark.parametrize("name", TELLING)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_right_cache_has_no_wrong_place(name: str, scenario: str) -> None:
    """In the first step and, in turns, in the middle one or the last."""
    one, case = subject(dtype=torch.float64, **MODELS[name]), Case(SCENARIOS[scenario])
    if lacking := case.scenario.lacking(one):
        pytest.skip(lacking)
    arms = play(one, case)
    assert arms.raised is None
    last = len(arms.found) - 1
    turn = (*SCENARIOS,).index(scenario) + TELLING.index(name)
    for step in {0, (last // 2, last)[turn % 2]}:  # each plays all that comes before it again
        assert locate(one, case, step) is None


def test_kernels_are_asked_as_they_were_when_attention_is_recorded() -> None:
    asked: list[object] = []

    class Asked(DefaultKernels):
        def attention(self, q: Tensor, *rest: Any) -> Tensor:
            asked.extend(rest[2:])  # PyTorch's attention on a GPU refuses both of them
            return q

    recorder, qkv = AttentionRecorder(Asked()), torch.ones(3, 1, 2, 4, 8)
    recorder.current = Record()
    recorder.attention(*qkv, None, True)
    assert asked == [None, True]
    assert recorder.current.mask.equal(torch.ones(1, 1, 4, 4, dtype=torch.bool).tril())


def test_places_and_ranges_read_well() -> None:
    assert ranges([3, 4, 5, 9]) == "3-5, 9"
    assert str(Location(None, "logits")) == "after the last layer, logits"
    assert str(Location(2, "stored K", (0, 1), "of token 3")) == (
        "layer 2, stored K, heads 0-1 (of token 3)"
    )


# The hypotheses


ENDLESS = [name for name in SCENARIOS if name != "overflow"]  # a hypothesis has no end


@pytest.mark.parametrize("scenario", ENDLESS)
@pytest.mark.parametrize("name", MODELS)
def test_a_hypothesis_that_changes_no_rule_equals_a_full_pass(name: str, scenario: str) -> None:
    """Within a window in turns: every scenario and every model meets both."""
    window = 6 * ((ENDLESS.index(scenario) + (*MODELS,).index(name)) % 2)
    make = windowed(lambda cache, step, held: step.mask) if window else DynamicCache
    one = subject(make, torch.float64, session=Hypothesis, **MODELS[name])
    case = Case(SCENARIOS[scenario])
    if lacking := case.scenario.lacking(one):
        pytest.skip(lacking)
    arms = play(one, case)
    assert arms.raised is None
    assert max(distances(arms.found, arms.expected)) <= ROUNDING_64


def test_a_hypothesis_uses_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a cache was touched")

    one = subject(dtype=torch.float64, session=Hypothesis)
    monkeypatch.setattr(DynamicCache, "__init__", refuse)
    monkeypatch.setattr(DynamicCache, "write", refuse)
    assert play(one, Case(SCENARIOS["decode"])).raised is None


@pytest.mark.parametrize("hypothesis", HYPOTHESES, ids=lambda hypothesis: hypothesis.__name__)
def test_no_hypothesis_finds_a_bug_in_a_right_cache_that_it_does_not_change(
    hypothesis: type[Hypothesis],
) -> None:
    """It either gives the truth, or something else: then it must be refuted by the truth."""
    one, case = subject(dtype=torch.float64, **ROTARY), Case(SCENARIOS["chunks"])
    arms, tried = play(one, case), play(one.with_session(hypothesis), case)
    gaps = [1.0] if tried.raised else distances(tried.found, arms.expected)
    with torch.inference_mode():
        assert reproduces(hypothesis, one, case, arms.expected) == (max(gaps) <= REPRODUCED)


def test_a_bug_is_named_only_if_it_gives_the_same_logits() -> None:
    case = Case(SCENARIOS["chunks"])
    one = subject(moved(lambda pos, held: pos + int(held > 0)), torch.float64)
    arms = play(one, case)
    assert explain(one, case, arms.found, arms.expected) == (OneTooFar.hint,)
    changed = [*arms.found[:-1], arms.found[-1] + 1e-6]
    assert explain(one, case, changed, arms.expected) == ()


def test_a_model_that_no_hypothesis_knows_gets_no_hint() -> None:
    case = Case(SCENARIOS["chunks"])
    one = subject(moved(lambda pos, held: pos + int(held > 0)), torch.float64)
    arms = play(one, case)
    other = [logits * 1.001 for logits in arms.expected]
    assert explain(one, case, arms.found, other) == ()
    found = examine(one, case, 1, Arms(arms.found, other))
    assert (found.bugs, found.hint) == ((), UNKNOWN)


def test_only_the_steps_around_the_first_wrong_one_have_to_be_explained() -> None:
    """A second bug, far behind the first, does not keep the first from being named."""
    case = Case(SCENARIOS["decode"])
    both = moved(lambda pos, held: pos + int(held > 0) + 3 * int(held > 11 + STEPS_AFTER))
    one = subject(both, torch.float64, **ROTARY)
    found = examine(one, case, 1, play(one, case))
    assert OneTooFar.hint in found.bugs
