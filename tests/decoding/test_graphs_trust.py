"""What a recording cannot know is not missed: it is recorded anew, or done as it is written."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import graph_cases
from graph_cases import KINDS, PROMPT, SHAPES, Capturing, Case, N, Story, both
from kvtool.core.decoding import cuda_graphs as graphs
from recorded_steps import Recorder

by_pytorch, capturing = graph_cases.by_pytorch, graph_cases.capturing

# What happens between two steps


def cropped(case: Case) -> Tensor:
    first = case.steps(12)
    case.cache.crop(7)
    case.ids = case.ids.roll(1, 0)
    return torch.cat([first, case.steps(N)], dim=1)


def reset(case: Case) -> Tensor:
    first = case.steps(9)
    case.cache.reset(torch.tensor([2, 0]))
    return torch.cat([first, case.steps(N)], dim=1)


def reordered(case: Case) -> Tensor:
    first = case.steps(9)
    case.cache.select(torch.tensor([1, 0]))
    return torch.cat([first, case.steps(N)], dim=1)


def fewer_rows(case: Case) -> Tensor:
    first = case.steps(9)
    case.cache.select(torch.tensor([1]))
    case.ids = case.ids[1:]
    return torch.cat([first[1:], case.steps(N)], dim=1)


def fork_in_turns(case: Case) -> Tensor:
    first = case.steps(9)
    fork, found, kept = case.cache.fork(), [first], case.ids
    for end in range(10, N + 1):
        case.ids = kept
        found.append(case.steps(end))
        case.ids = (kept + 1) % 23
        found.append(case.steps(end, fork))
    return torch.cat(found, dim=1)


def another_cache(case: Case) -> Tensor:
    first = case.steps(9)
    case.cache = case.new_cache(capacity=N + 3)
    return torch.cat([first, case.steps(N)], dim=1)


def weights_written(case: Case) -> Tensor:
    first = case.steps(9)
    for parameter in case.model.parameters():
        parameter.data.mul_(1.25)
    return torch.cat([first, case.steps(N)], dim=1)


def weights_elsewhere(case: Case) -> Tensor:
    first = case.steps(9)
    case.kept = [parameter.data for parameter in case.model.parameters()]  # not freed till the end
    for parameter in case.model.parameters():
        parameter.data = parameter.data * 1.25
    return torch.cat([first, case.steps(N)], dim=1)


def other_angles(case: Case) -> Tensor:
    first = case.steps(9)
    table = case.model.rotary.table
    case.kept = [table.table]
    table.table = table.table.flip(0)
    return torch.cat([first, case.steps(N)], dim=1)


STORIES = [
    cropped, reset, reordered, fewer_rows, fork_in_turns, another_cache, weights_written,
    weights_elsewhere, other_angles,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("story", STORIES)
def test_what_happens_between_two_steps_is_not_missed(
    capturing: Capturing, story: Story, kind: str
) -> None:
    make = partial(Case, KINDS[kind], positions="rotary")
    recorder = both(capturing, story, make)
    assert recorder.played > recorder.recorded


def test_pages_that_no_longer_follow_one_another_are_gathered(capturing: Capturing) -> None:
    recorder = both(capturing, fork_in_turns, partial(Case, KINDS["paged"], 1))
    assert recorder.played == 5 + 2 * (N - 9) - 1


def test_a_cache_that_is_reset_plays_what_was_recorded_of_it(capturing: Capturing) -> None:
    recorder = Recorder()
    capturing(recorder)
    case = Case()
    first, recorded = case.steps(N), recorder.recorded
    case.cache.reset(case.padding)
    assert case.steps(N).equal(first)
    assert (recorder.recorded, recorder.played) == (recorded, 2 * (N - PROMPT))


def test_memory_that_the_cache_has_left_is_not_written_to(capturing: Capturing) -> None:
    left = []

    def story(case: Case) -> Tensor:
        first = case.steps(9)
        old = case.cache._keys[1]
        case.cache._keys[1], before = old.clone(), old.clone()
        found = torch.cat([first, case.steps(N)], dim=1)
        left.append(old.equal(before))
        return found

    both(capturing, story)
    assert left == [True, True]


def test_the_same_address_in_another_form_is_other_memory(capturing: Capturing) -> None:
    def story(case: Case) -> Tensor:
        first, large = case.steps(9), case.cache
        case.cache = case.new_cache(capacity=12)  # fewer columns, so heads begin elsewhere
        for name in ("_keys", "_values"):
            for i, old in enumerate(getattr(large, name)):
                smaller = old.flatten()[: getattr(case.cache, name)[i].numel()]
                getattr(case.cache, name)[i] = smaller.view_as(getattr(case.cache, name)[i])
        return torch.cat([first, case.steps(12)], dim=1)

    both(capturing, story)


def test_another_source_is_read(capturing: Capturing) -> None:
    def story(case: Case) -> Tensor:
        first = case.steps(9)
        assert case.source is not None
        kept, case.source = case.source, case.source.select(torch.tensor([1, 0]))
        again = case.steps(12)
        case.source = kept
        for k, _ in kept.layers:
            k.mul_(0.5)  # in place, where it is read
        return torch.cat([first, again, case.steps(N)], dim=1)

    recorder = both(capturing, story, partial(Case, **SHAPES["pair"]))
    assert recorder.played == N - PROMPT


def test_ids_of_another_type_are_read_as_such(capturing: Capturing) -> None:
    def story(case: Case) -> Tensor:
        first = case.steps(9)
        case.ids = case.ids.int()
        return torch.cat([first, case.steps(N)], dim=1)

    assert both(capturing, story).played == N - PROMPT


def test_logits_are_not_overwritten_by_the_next_step(capturing: Capturing) -> None:
    capturing(Recorder())
    case = Case()
    case.steps(PROMPT)
    kept = case.steps(6)
    before = kept.clone()
    case.steps(7)
    assert kept.equal(before)


@pytest.mark.parametrize("recording_mode", [torch.no_grad, torch.inference_mode])
def test_what_is_recorded_in_one_mode_is_played_in_another(
    capturing: Capturing, recording_mode: Any
) -> None:
    recorder = Recorder()
    capturing(recorder)
    with torch.inference_mode(False):
        with torch.no_grad():
            case = Case()
            case.steps(PROMPT)
        with recording_mode():
            case.steps(6)
        with torch.no_grad():
            assert not case.steps(7).is_inference()
        with torch.inference_mode():
            case.steps(8)
    assert (recorder.recorded, recorder.played) == (1, 3)


def test_only_so_many_sets_of_memory_are_kept(capturing: Capturing) -> None:
    capturing(Recorder())
    case = Case()
    caches = [case.new_cache() for _ in range(graphs.MAX_LAYOUTS + 2)]
    found = [case.steps(7, cache) for cache in caches]
    assert all(logits.equal(found[0]) for logits in found)
    assert len(case.decode._graphs._kept) == graphs.MAX_LAYOUTS


def test_a_recording_does_not_keep_a_cache_object_alive(capturing: Capturing) -> None:
    capturing(Recorder())
    case = Case()
    cache = case.new_cache()
    case.steps(7, cache)
    alive = weakref.ref(cache)
    del cache
    assert alive() is None


def math_alone() -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def lower_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", [math_alone, lower_precision, deterministic])
def test_another_way_to_compute_is_recorded_anew(
    capturing: Capturing, setting: Callable[[], AbstractContextManager[None]]
) -> None:
    def story(case: Case) -> Tensor:
        first = case.steps(6)
        with setting():
            second = case.steps(7)
        return torch.cat([first, second, case.steps(8)], dim=1)

    recorder = both(capturing, story)
    assert (recorder.recorded, recorder.played) == (2, 3)
