"""Steps that are recorded and played again have the bits of those that are not, in every command.

Without a GPU, PyTorch's operations are recorded in place of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import graph_cases
from cli_probe import Ran
from gpu import needs_cuda
from graph_cases import KINDS, PROMPT, SHAPES, Capturing, Case, N, both
from kvtool.core.bench import timing
from kvtool.core.cache import CacheSpec
from kvtool.core.cache.static import StaticCache
from kvtool.core.decoding import cuda_graphs as graphs
from kvtool.core.decoding.dispatch import decoding_form
from kvtool.core.decoding.engine import feed, first_input, generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.models import Model
from recorded_steps import Recorder, storage
from small_models import random_model

by_pytorch, capturing = graph_cases.by_pytorch, graph_cases.capturing

SHORT = [
    "--device", "cpu", "--kernels", "default", "--tokens", "40",
    "--scenarios", "decode", "fork", "permuted", "padded",
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_that_are_played_have_the_bits_of_those_that_are_not(
    capturing: Capturing, shape: str, kind: str, batch: int
) -> None:
    recorder = both(
        capturing, lambda c: c.steps(N), partial(Case, KINDS[kind], batch, **SHAPES[shape])
    )
    assert recorder.played == N - PROMPT
    assert recorder.recorded == 3  # one for each number of columns that are read: 8, 12 and 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_memory_that_a_recording_reaches_is_compared(
    capturing: Capturing, shape: str, kind: str
) -> None:
    recorder = Recorder()
    capturing(recorder)
    case = Case(KINDS[kind], **SHAPES[shape])
    case.steps(PROMPT + 1)
    form = case.decode._graphs
    (captured,) = form._captured.values()
    compared = {storage(x) for x in (*form._memory, *captured.inputs)}
    assert recorder.reached and recorder.reached <= compared


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_made_by_device_work_alone_is_the_one_that_begin_makes(
    kind: str, batch: int
) -> None:
    case = Case(KINDS[kind], batch)
    for end in range(PROMPT, N):
        case.steps(end)
        step, fixed = case.cache.begin(1), case.cache.graph_step()
        assert fixed is not None and fixed.start == end
        same = case.cache.step_at(torch.tensor([end]), fixed.tables, fixed.form)
        assert type(same) is type(step)
        for name, value in vars(step).items():
            other = getattr(same, name)
            assert value.equal(other) if isinstance(value, Tensor) else value is other, name


def test_on_a_cpu_nothing_is_recorded() -> None:
    form = decoding_form(random_model(0))
    assert form._graphs is None


# Commands


def test_generate_with_one_form_records_once(capturing: Capturing) -> None:
    recorder = Recorder()
    capturing(recorder)
    case = Case()
    found = []
    for _ in range(2):
        run = generate(case.decode, case.ids[:, :PROMPT], case.cache, 6, Sampler())
        found.append(torch.stack(list(run)))
        case.cache.reset(case.padding)
    assert found[0].equal(found[1])
    assert (recorder.recorded, recorder.played) == (2, 10)


@pytest.mark.parametrize("decode_only", [False, True])
@pytest.mark.parametrize("shape", ["sinusoidal", "pair"])
def test_bench_times_no_recording(
    capturing: Capturing, monkeypatch: pytest.MonkeyPatch, shape: str, decode_only: bool
) -> None:
    recorder, seen, real = Recorder(), [], timing.now
    capturing(recorder)
    monkeypatch.setattr(
        timing, "now", lambda d: seen.append((recorder.recorded, recorder.played)) or real(d)
    )
    model = random_model(0, **SHAPES[shape])
    work = timing.Workload(model, torch.ones(2, 3, dtype=torch.long), decode_only=decode_only)
    run = work.run("static", 20)
    assert run.nbytes == work.predicted("static", 20) and run.prefill_s > 0
    recorded, played = zip(*seen, strict=True)
    assert set(recorded) == {1} and played[-1] == 2 * played[0] >= 38


def test_bench_runs_a_dynamic_cache_once_as_ever(capturing: Capturing) -> None:
    capturing(Recorder())
    work = timing.Workload(random_model(0), torch.ones(2, 3, dtype=torch.long))
    with mock.patch.object(timing, "generate", wraps=timing.generate) as generated:
        assert work.run("dynamic", 4).seconds > 0
    assert generated.call_count == 1


def test_verify_cache_judges_steps_that_are_played(
    capturing: Capturing, kv: Callable[..., Ran]
) -> None:
    recorder = Recorder()
    capturing(recorder)
    ran = kv("--caches", "static", "paged", *SHORT, command="verify-cache")
    assert ran.code == 0 and "the planted bug was found" in ran.out
    assert recorder.played > 2 * recorder.recorded > 0


class Stale(Recorder):
    """Plays every step as the second one of its recording was: what it reads changes no more."""

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        play, first = super().__call__(step), []
        return lambda: first[0] if first else first.append(play().clone()) or first[0]


def test_verify_cache_finds_steps_that_are_played_wrongly(
    capturing: Capturing, kv: Callable[..., Ran]
) -> None:
    capturing(Stale())
    assert kv("--caches", "static", *SHORT, command="verify-cache").code == 1


# CUDA graphs


class Fakes:
    """The parts of torch.cuda that a capture calls, which note when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda x, n=name: self.within(f"{n} {x}"))
        stream = mock.MagicMock(__str__=lambda _: "aside")
        stream.wait_stream = lambda other: self.events.append(f"aside waits for {other}")
        current = mock.MagicMock(__str__=lambda _: "current")
        current.wait_stream = lambda other: self.events.append(f"current waits for {other}")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        graph = mock.Mock(replay=lambda: self.events.append("replay"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        spec = mock.create_autospec(torch.cuda.graph)  # whose arguments are checked
        spec.side_effect = lambda g, pool, s, **_: self.within(f"graph {pool} {s}")
        monkeypatch.setattr(torch.cuda, "graph", spec)

    def within(self, name: str) -> Any:
        context = mock.MagicMock()
        context.__enter__ = lambda _: self.events.append(name)
        context.__exit__ = lambda *_: self.events.append(f"end of {name}")
        return context


def test_a_capture_runs_a_step_aside_then_records_it_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes(monkeypatch)
    result = torch.ones(1)
    capture = graphs.capture_for(torch.device("cuda"))
    assert capture is not None
    play = capture(lambda: fakes.events.append("step") or result)
    assert play() is result
    assert fakes.events == [
        "device cuda",
        "aside waits for current", "stream aside", "step", "end of stream aside",
        "current waits for aside",
        "graph pool aside", "step", "end of graph pool aside",
        "end of device cuda",
        "replay",
    ]  # fmt: skip


def on_cuda(model: Model, make: Any, capture: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits of a prompt and of steps behind it, as a form with or without graphs gives them."""
    device = torch.device("cuda")
    ids = torch.arange(3 * N, device=device).view(3, N) % 23
    dtype = next(model.parameters()).dtype
    spec = CacheSpec.of(model.config, 3, N, dtype, device)
    _, source = first_input(model, ids[:, :4] % 9)
    cache = make(spec, torch.arange(3, device=device))
    with monkeypatch.context() as patch:
        if not capture:
            patch.setattr(graphs, "capture_for", lambda device: None)
        form = decoding_form(model)
    assert form.captures(cache) == capture
    found = [feed(form, cache, ids[:, :i], source, last=True) for i in range(PROMPT, N + 1)]
    assert form._graphs is None or not form._graphs._failed
    return torch.cat(found, dim=1)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_graphs_give_the_bits_of_eager_steps(
    monkeypatch: pytest.MonkeyPatch, shape: str, kind: str, dtype: torch.dtype
) -> None:
    model = random_model(0, dtype, **SHAPES[shape]).cuda()
    eager, played = (on_cuda(model, KINDS[kind], c, monkeypatch) for c in (False, True))
    assert played.equal(eager)


@needs_cuda
def test_autocast_on_a_gpu_is_not_missed(capturing: Capturing) -> None:
    capture = mock.Mock(side_effect=AssertionError("recorded"))
    capturing(capture)
    model = random_model(0, torch.bfloat16).cuda()
    spec = CacheSpec.of(model.config, 1, N, torch.bfloat16, torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        feed(decoding_form(model), StaticCache(spec), torch.ones(1, 1, dtype=torch.long).cuda())


@needs_cuda
def test_verify_cache_judges_cuda_graphs(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    played, real = [], graphs.CudaCapture.__call__

    def counted(capture: graphs.CudaCapture, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        play = real(capture, step)
        return lambda: played.append(1) or play()

    monkeypatch.setattr(graphs.CudaCapture, "__call__", counted)
    ran = kv("--caches", "static", "paged", "--device", "cuda", command="verify-cache")
    assert ran.code == 0 and len(played) > 100
    assert not caplog.records
