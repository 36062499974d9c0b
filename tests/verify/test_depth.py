"""Of a large model few scenarios go through all layers: here of tiny ones that are taken for
large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import CacheSpec, Step, make_cache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.decoding.engine import advance
from kvtool.core.verify import check, depth, widened
from kvtool.core.verify.check import check_model, main_case
from kvtool.core.verify.depth import DEEP_SCENARIOS, first_layers, layers_for
from kvtool.core.verify.expected import cases_of, planned, work_of
from kvtool.core.verify.left_out import Judged, layers_left_out
from kvtool.core.verify.model_subject import Formats
from kvtool.core.verify.outcome import BUG
from kvtool.core.verify.scenarios import SCENARIOS
from small_models import random_model
from verify_subjects import ROTARY

FOUR: dict[str, Any] = {**ROTARY, "n_layers": 4}
NAMES = ["decode", "crop", "padded", "reset"]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "LARGE_BYTES", -1)


def main_of(model: Any) -> Any:
    return main_case(model, torch.tensor([[1, 5, 2]]), 6)


@torch.inference_mode()
def test_the_first_layers_of_a_model_are_a_model_of_the_same_weights() -> None:
    model, ids = random_model(**FOUR), torch.tensor([[1, 5, 2, 7]])
    before = model(ids)
    part = first_layers(model, 2)
    alone = type(model)(model.config.first_layers(2))
    alone.load_state_dict(part.state_dict())
    assert torch.equal(part(ids), alone.eval()(ids))
    assert {p.data_ptr() for p in part.parameters()} < {p.data_ptr() for p in model.parameters()}
    assert torch.equal(model(ids), before) and len(model.layers) == model.config.n_layers == 4


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_the_first_layers_have_the_first_tokens_alone_with_the_logits_that_all_would_give(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth, "MIN_TOKENS", 1)
    model, ids = random_model(**FOUR, vocab_size=100, d_model=16, tied=tied), torch.tensor([[1, 5]])
    model(ids)  # what a module keeps of its weights is kept
    whole = type(model)(model.config.first_layers(2)).eval()
    whole.load_state_dict(model.state_dict(), strict=False)
    part = first_layers(model, 2)
    assert (part.config.vocab_size, whole(ids).shape[-1], model(ids).shape[-1]) == (32, 100, 100)
    assert torch.equal(part(ids), whole(ids)[..., :32])
    spec = CacheSpec.of(part.config, 1, 4, torch.float32, ids.device)
    caches = [make_cache("static", spec) for _ in range(2)]
    one, other = (advance(m, c, ids) for m, c in zip((part, whole), caches, strict=True))
    assert torch.equal(one, other[..., :32])
    token = torch.tensor([[7]])
    one, other = (advance(m, c, token) for m, c in zip((part, whole), caches, strict=True))
    assert torch.equal(one, other[..., :32])
    assert (part.head.weight is part.embed.tokens.weight) == tied  # type: ignore[union-attr]
    with pytest.raises(IndexError):
        part(torch.tensor([[32]]))


def test_ids_beyond_the_tokens_of_a_part_become_some_of_its_own(
    large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth, "MIN_TOKENS", 1)
    model = random_model(**FOUR, vocab_size=100, d_model=16)
    main = main_case(model, torch.tensor([[99, 50, 98]]), 6)
    given = (Formats(model), ["dynamic", "static"], ["default", "exact"], ["decode", "crop"], main)
    found = list(check_model(*given))
    assert all(checked.right for checked in found) and {c.layers for c in found} == {0, 2}


@pytest.mark.parametrize("thorough", [False, True])
def test_all_layers_are_for_few_scenarios_or_for_a_thorough_check(
    thorough: bool, large: None
) -> None:
    model = random_model(**FOUR)
    given = (Formats(model), ["dynamic"], ["default", "exact"], NAMES, main_of(model))
    found = {(c.finding.scenario, c.layers) for c in check_model(*given, thorough=thorough)}
    assert found == {(n, 0 if thorough or n in DEEP_SCENARIOS else 2) for n in NAMES}


@pytest.mark.parametrize(
    ("kinds", "kernels", "whole"),
    [
        (["none", "static", "int8"], ["default", "exact"], {("static", "exact")}),
        (["int8", "static"], ["exact", "default"], {("int8", "exact")}),
        (["static", "int8"], ["exact"], {("static", "exact"), ("int8", "exact")}),
    ],
)
def test_exact_kernels_take_one_kind_through_all_layers_where_default_ones_take_each(
    kinds: list[str], kernels: list[str], whole: set[tuple[str, str]], large: None
) -> None:
    model = random_model(**FOUR)
    given = (Formats(model), kinds, kernels, ["decode"], main_of(model))
    found = {(c.cache, c.kernels) for c in check_model(*given) if not c.layers}
    assert found == whole | {(kind, "default") for kind in kinds if "default" in kernels}


def test_a_small_model_is_judged_whole() -> None:
    model = random_model(**FOUR)
    given = (Formats(model), ["dynamic"], ["exact"], NAMES, main_of(model))
    assert not any(checked.layers for checked in check_model(*given))


@pytest.mark.parametrize("window, first, expected", [(0, 0, 2), (6, 0, 2), (6, 1, 2), (6, 2, 3)])
def test_the_layers_hold_one_of_each_kind(window: int, first: int, expected: int) -> None:
    model = random_model(**FOUR, window=window, first_window_layer=first)
    assert layers_for(model.config, "crop") == expected
    assert {layers_for(model.config, name) for name in DEEP_SCENARIOS} == {4}


def test_the_deep_scenarios_can_be_played() -> None:
    assert set(DEEP_SCENARIOS) <= SCENARIOS.keys()


class LostInLayer3(DynamicCache):
    """A cache that is wrong in a layer that the first ones are not."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        return (keys.roll(1, dims=2) if layer == 3 else keys), values


def test_a_bug_in_a_deep_layer_alone_is_found_by_the_scenarios_that_go_there(
    large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(**FOUR)
    monkeypatch.setattr(check, "small", lambda kind: LostInLayer3)
    given = (Formats(model), ["dynamic"], ["default"], NAMES, main_of(model))
    found = {c.finding.scenario for c in check_model(*given) if c.finding.verdict == BUG}
    assert found == {"decode", "padded"}


def test_the_time_of_few_layers_is_measured_on_them(
    large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(**FOUR)
    formats, main = Formats(model), main_of(model)
    asked = (["dynamic"], ["default"])
    timed = []

    def seconds(part: Formats, work: Any) -> float:
        timed.append((part.model.config.n_layers, work))
        return 1.0

    monkeypatch.setattr("kvtool.core.verify.expected.seconds_for", seconds)
    total, found = planned(formats, *asked, cases_of(NAMES, main, False))
    deep = work_of(formats, *asked, cases_of(["decode", "padded"], main, False))
    rest = work_of(formats, *asked, cases_of(["crop", "reset"], main, False))
    assert timed == [(4, deep), (2, rest)] and found == 2.0
    assert total["default"] == deep["default"] + rest["default"]


@pytest.mark.parametrize(
    ("judged", "said"),
    [
        ([("decode", "default", 0), ("crop", "default", 3)], "beyond the first 3 in crop"),
        ([("decode", "default", 0)], ""),
        (
            [("decode", "default", 0), ("decode", "exact", 2), ("crop", "exact", 2)],
            "beyond the first 2 in decode with exact kernels of all kinds but one, "
            "beyond the first 2 in crop",
        ),
    ],
)
def test_what_was_left_out_is_said(judged: list[tuple[str, str, int]], said: str) -> None:
    found = layers_left_out([Judged(*each) for each in judged])
    assert found == (f"not judged: layers {said}" if said else "")
