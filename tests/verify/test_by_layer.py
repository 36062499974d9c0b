"""The float64 evidence of a large model, which all kinds share: here of tiny ones that are taken
for large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.verify import by_layer, check, widened
from kvtool.core.verify.arms import Case
from kvtool.core.verify.by_layer import ByLayer, can_go_by_layer
from kvtool.core.verify.check import LostKey, check_model, main_case
from kvtool.core.verify.compare import ROUNDING_64
from kvtool.core.verify.float64 import Float64
from kvtool.core.verify.judge import BUG, Judge
from kvtool.core.verify.measured import Measured
from kvtool.core.verify.model_subject import Formats, ModelSubject
from kvtool.core.verify.scenarios import SCENARIOS
from small_models import random_model
from verify_subjects import ROTARY

KINDS = ["dynamic", "static", "sliding", "int8", "int4", "paged"]
NAMES = ["decode", "rows", "padded-rows", "crop", "overflow"]
CHANGES: dict[str, dict[str, Any]] = {
    "learned": {"positions": "learned"},
    "rotary": ROTARY,
    "windows": {**ROTARY, "window": 6, "first_window_layer": 1},
}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is judged as a large one is."""
    monkeypatch.setattr(widened, "LARGE_BYTES", -1)


def found(formats: Formats, kinds: list[str], names: list[str]) -> dict[Any, Any]:
    main = main_case(formats.model, torch.tensor([[1, 5, 2, 7, 3]]), 6)
    checks = check_model(formats, kinds, ["default"], names, main)
    return {(c.cache, c.finding.scenario): c.finding for c in checks}


@pytest.mark.parametrize("name", CHANGES)
def test_verdicts_are_those_of_runs_step_by_step(name: str, large: None) -> None:
    model = random_model(**{"context": 160, **CHANGES[name]})
    shared = found(Formats(model, widens=True), KINDS, NAMES)
    widened.LARGE_BYTES = 2**40
    alone = found(Formats(model), KINDS, NAMES)
    assert shared.keys() == alone.keys()
    for key, finding in shared.items():
        other = alone[key]
        assert (finding.verdict, finding.working) == (other.verdict, other.working), key
        assert (finding.float64 is None) == (other.float64 is None), key
        if finding.float64 is not None:
            assert finding.float64.relative <= ROUNDING_64 and finding.promoted is None
            assert len(finding.float64.by_step) == len(other.float64.by_step)


def test_a_copy_and_weights_that_are_widened_give_the_same_bits(large: None) -> None:
    model = random_model(dtype=torch.bfloat16, **{"context": 160, **ROTARY})
    results = [found(Formats(model, widens), KINDS, NAMES) for widens in (False, True)]
    assert results[0] == results[1]


def test_a_pass_is_shared_by_all_kinds_and_each_weight_is_widened_once_in_it(
    large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtool.core.verify.widened.KEPT_NUMBERS", 30)
    model = random_model(**ROTARY)
    formats = Formats(model, widens=True)
    assert formats.to(torch.float64) is formats.to(torch.float64)
    main = main_case(model, torch.tensor([[1, 5, 2]]), 4)
    every = [ModelSubject(model, check.small(kind), kind, formats=formats) for kind in KINDS]
    evidence = ByLayer(formats, every)
    for subject in every:
        assert evidence.arms(subject, main) is not None
    n_large = sum(weight.numel() > 30 for weight in model.parameters())
    assert evidence.n_passes == 1 and formats.room is not None
    assert formats.room.n_widened == n_large + 1  # the embedding is the head too


@pytest.mark.parametrize("most", [0, 2**40])
def test_how_many_layers_are_held_at_once_changes_nothing(
    most: int, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(**{"n_layers": 3, **ROTARY})
    usual = found(Formats(model), ["dynamic", "int4"], ["padded-rows", "crop"])
    monkeypatch.setattr(by_layer, "HELD", most)
    monkeypatch.setattr(by_layer, "MAX_ROWS", most)
    assert found(Formats(model), ["dynamic", "int4"], ["padded-rows", "crop"]) == usual


class Shifted(DynamicCache):
    """A cache that counts one position too many behind a prompt."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        moved = step.q_pos + 1 if start else step.q_pos
        return Step(moved, step.k_pos, step.slots, step.mask, step.causal, step.kernels)


class KeepsCropped(DynamicCache):
    """A cache whose first layer sees what was taken back."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        if layer == 0 and getattr(self, "cropped", False):
            v = v * (1 + 1e-9)
        return super().write(layer, k, v, step)

    def crop(self, length: int) -> None:
        super().crop(length)
        self.cropped = True


class Refuses(DynamicCache):
    """A cache that raises in float64 alone."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        if k.dtype == torch.float64 and self.length:
            raise ValueError("no float64")
        return super().write(layer, k, v, step)


@pytest.mark.parametrize(
    "make, scenario", [(LostKey, "decode"), (Shifted, "decode"), (KeepsCropped, "crop")]
)
def test_a_wrong_cache_is_found_and_then_judged_step_by_step(make, scenario, large):
    model = random_model(**ROTARY)
    subject = ModelSubject(model, make, "under test", formats=Formats(model, widens=True))
    case = Case(SCENARIOS[scenario])
    usual = Judge(subject).judge(case)
    assert usual.verdict == BUG
    subject.evidence = evidence = ByLayer(subject.formats, [subject])
    arms = evidence.arms(subject, case)
    assert arms is not None and arms.gap.relative > ROUNDING_64
    assert Judge(subject).judge(case) == usual


def test_a_cache_that_raises_decides_nothing_here(large):
    model = random_model(**ROTARY)
    subject = ModelSubject(model, Refuses, "under test")
    case = Case(SCENARIOS["chunks"])
    usual = Judge(subject).judge(case)
    subject.evidence = ByLayer(subject.formats, [subject])
    assert subject.evidence.arms(subject, case).gap.relative == float("inf")
    assert Judge(subject).judge(case) == usual


def test_the_planted_bug_is_found_in_a_large_model(large: None) -> None:
    model = random_model(**ROTARY)
    case = main_case(model, torch.tensor([[1, 5, 2]]), 40)
    assert check.control(Formats(model, widens=True), case).verdict == BUG


@pytest.mark.parametrize("kinds, kernels", [(["none"], "default"), (["none", "dynamic"], "exact")])
def test_what_proves_nothing_and_what_is_identical_is_not_run_in_float64(
    kinds: list[str], kernels: str, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(**ROTARY)
    main = main_case(model, torch.tensor([[1, 5, 2]]), 6)
    formats = Formats(model)
    monkeypatch.setattr(formats, "to", None)
    for checked in check_model(formats, kinds, [kernels], ["decode", "crop"], main):
        assert checked.finding.verdict == ("no cache" if checked.cache == "none" else "identical")
        assert checked.finding.float64 is None


def test_a_model_with_attention_of_another_kind_goes_step_by_step():
    model = random_model(**ROTARY)
    assert can_go_by_layer(model)
    model.layers[1].attn.__class__ = type("Other", (type(model.layers[1].attn),), {})
    assert not can_go_by_layer(model)
    assert not can_go_by_layer(random_model(n_encoder_layers=1, source_vocab_size=23))


def test_the_copy_is_made_where_memory_holds_several(monkeypatch, large):
    model = random_model()
    needed = 8 * sum(weight.numel() for weight in model.parameters())
    for available, widens in ((4 * needed, False), (4 * needed - 1, True)):
        monkeypatch.setattr(widened, "available_bytes", lambda device, n=available: n)
        assert Formats(model).widens is widens


def test_what_is_skipped_is_not_judged_and_the_rest_is_as_it_would_be(large: None) -> None:
    model = random_model(**ROTARY)
    main = main_case(model, torch.tensor([[1, 5, 2]]), 4)
    asked = (Formats(model), ["dynamic", "int8"], ["default", "exact"], ["decode", "crop"], main)
    everything = {(c.cache, c.kernels, c.finding.scenario): c for c in check_model(*asked)}
    assert list(everything)[:3] == [
        ("dynamic", "default", "decode"),
        ("int8", "default", "decode"),
        ("dynamic", "exact", "decode"),
    ]
    skip = list(everything)[:5]
    rest = {(c.cache, c.kernels, c.finding.scenario): c for c in check_model(*asked, skip=skip)}
    assert rest == {turn: c for turn, c in everything.items() if turn not in skip}


@pytest.mark.parametrize("explained", [True, False])
def test_noise_is_not_measured_of_a_gap_that_codes_explain_at_no_cost(
    explained: bool, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To measure it takes many runs of a large model."""
    model = random_model(**ROTARY)
    formats = Formats(model, widens=True)
    subject = ModelSubject(model, check.small("fp8"), "fp8", formats=formats)
    subject.evidence = ByLayer(formats, [subject])
    asked = list[object]()
    monkeypatch.setattr(Measured, "beyond", lambda self, exact=None: asked.append(exact))
    monkeypatch.setattr(Float64, "within_codes", lambda *given: explained)
    case = main_case(model, torch.tensor([[1, 5, 2]]), 6)
    assert Judge(subject).judge(case, thorough=True).right
    assert bool(asked) is not explained
