"""Steps that are not recorded are done as they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import graph_cases
from graph_cases import KINDS, PROMPT, SHAPES, Capturing, Case, N, Story, both
from kvtool.core.cache import Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.kernels.default import make_kernels
from kvtool.core.native import compiling
from kvtool.errors import UsageError
from recorded_steps import Recorder

by_pytorch, capturing = graph_cases.by_pytorch, graph_cases.capturing


def never_played(capturing: Capturing, story: Story, make: Callable[[], Case] = Case) -> None:
    with mock.patch.object(compiling.LOG, "warning") as failed:
        recorder = both(capturing, story, make)
    assert (recorder.recorded, recorder.played, failed.call_count) == (0, 0, 0)


def replaced_attend(case: Case) -> Tensor:
    real = case.cache.attend
    case.cache.attend = lambda *args: real(*args) * 2  # type: ignore[method-assign]
    return case.steps(N)


def exact_kernels(case: Case) -> Tensor:
    case.cache = case.new_cache(kernels=make_kernels("exact"))
    return case.steps(N)


def watched(case: Case) -> Tensor:
    with FlopCounterMode(display=False) as mode:
        found = case.steps(N)
    assert mode.get_total_flops()
    return found


def in_autocast(case: Case) -> Tensor:
    case.cache = case.new_cache(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        return case.steps(N)


def with_gradients(case: Case) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        other = Case()
        case.cache = other.cache
        return other.steps(N).detach()


def seeing_itself_alone(real: Any) -> Callable[..., Step]:
    def changed(*args: Any, **kwargs: Any) -> Step:
        step = real(*args, **kwargs)
        return replace(step, mask=step.k_pos[:, None, None] == step.q_pos[:, None, :, None])

    return changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["object", "class"])
def test_how_a_step_is_placed_may_be_changed_at_any_time(
    capturing: Capturing, monkeypatch: pytest.MonkeyPatch, kind: str, level: str
) -> None:
    def story(case: Case) -> Tensor:
        first, before = case.steps(9), case.steps(10)
        with monkeypatch.context() as patch:
            place: Any = case.cache if level == "object" else type(case.cache)
            patch.setattr(place, "_device_step", seeing_itself_alone(place._device_step))
            changed = case.steps(12)
        return torch.cat([first, before, changed, case.steps(N)], dim=1)

    both(capturing, story, partial(Case, KINDS[kind]))


@pytest.mark.parametrize("method", ["_slots", "_gather"])
def test_where_pages_are_found_may_be_changed_at_any_time(
    capturing: Capturing, method: str
) -> None:
    def story(case: Case) -> Tensor:
        first = case.steps(9)
        real = getattr(case.cache, method)
        setattr(case.cache, method, lambda pages, *rest: real(pages.flip(0), *rest))
        return torch.cat([first, case.steps(N)], dim=1)

    both(capturing, story, partial(Case, KINDS["paged"]))


def test_a_step_that_could_not_be_placed_cannot_be_committed(
    capturing: Capturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing(Recorder())
    case = Case(KINDS["paged"])
    case.steps(9)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", mock.Mock(side_effect=torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError):
            case.steps(10)
    with pytest.raises(UsageError, match="given 0 tokens"):
        case.cache.commit(1)
    assert case.steps(N).isfinite().all()


def test_a_setting_of_pytorchs_new_names_is_no_obstacle(capturing: Capturing) -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision

    def story(case: Case) -> Tensor:
        first = case.steps(9)
        products.fp32_precision = "tf32"
        try:
            return torch.cat([first, case.steps(N)], dim=1)
        finally:
            products.fp32_precision = before

    assert both(capturing, story).recorded > 3


@pytest.mark.parametrize(
    "story", [replaced_attend, exact_kernels, watched, in_autocast, with_gradients]
)
def test_a_step_that_something_else_takes_part_in_is_done_as_written(
    capturing: Capturing, story: Story
) -> None:
    never_played(capturing, story)


class Doubled(StaticCache):
    def attend(self, *args: Any) -> Tensor:
        return super().attend(*args) * 2


@pytest.mark.parametrize("make", [DynamicCache, Doubled])
def test_a_kind_that_moves_or_that_is_not_known_is_not_recorded(
    capturing: Capturing, make: Any
) -> None:
    never_played(capturing, lambda c: c.steps(N), partial(Case, make))


def test_a_source_that_attends_otherwise_is_not_recorded(capturing: Capturing) -> None:
    class Halved(CrossCache):
        def attend(self, *args: Any) -> Tensor:
            return super().attend(*args) / 2

    def story(case: Case) -> Tensor:
        assert case.source is not None
        case.source = Halved(case.source.layers, case.source.mask)
        return case.steps(N)

    never_played(capturing, story, partial(Case, **SHAPES["pair"]))


def test_where_recording_fails_it_is_said_once_and_steps_are_done_as_written(
    capturing: Capturing, caplog: pytest.LogCaptureFixture
) -> None:
    capturing(None)
    expected = Case().steps(N)
    failing = mock.Mock(side_effect=RuntimeError("not permitted when stream is capturing\nat"))
    capturing(failing)
    assert Case().steps(N).equal(expected)
    assert failing.call_count == 1
    assert [r.getMessage() for r in caplog.records] == [
        "decoding without CUDA graphs, which failed: not permitted when stream is capturing"
    ]


def test_tokens_on_another_device_are_not_copied(capturing: Capturing) -> None:
    recorder = Recorder()
    capturing(recorder)
    case = Case()
    case.steps(PROMPT + 1)
    case.ids = case.ids.to("meta")
    case.steps(PROMPT + 2)  # what PyTorch makes of it
    assert recorder.played == 1


def test_a_step_that_is_wrong_is_refused_and_the_next_one_recorded(capturing: Capturing) -> None:
    recorder = Recorder()
    capturing(recorder)
    case = Case()
    case.steps(PROMPT + 1)
    with pytest.raises(RuntimeError, match="to have one of the following scalar types"):
        case.decode.step(case.ids[:, :1].float(), case.cache, None, False)
    case.steps(N)
    assert recorder.played == N - PROMPT
