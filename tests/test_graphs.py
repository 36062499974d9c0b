"""Steps that are recorded and played again: the bits of those that are not, whatever happens between
them. Without a GPU PyTorch's operations are recorded in place of kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cli_probe import Ran
from kvtool.core import native, timing
from kvtool.core.cache import Cache, CacheSpec, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.paged import PagedCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.engine import begin, feed, generate
from kvtool.core.kernels import make_kernels
from kvtool.core.models import Model, graphs
from kvtool.core.models.flat import DecodingForm, decoding_form
from kvtool.core.sampling import Sampler
from recorded_steps import Recorder, storage
from small_models import random_model

N, PROMPT, BLOCK = 16, 5, 4
SHAPES: dict[str, dict[str, Any]] = {
    "sinusoidal": {},
    "learned": {"positions": "learned", "activation": "gelu_tanh", "bias": False, "tied": False},
    "grouped": {"positions": "rotary", "n_kv_heads": 2, "norm": "rmsnorm", "activation": "swiglu"},
    "with norms of heads": {"positions": "rotary", "qk_norm": True},
    "windows": {"positions": "rotary", "window": 4, "first_window_layer": 1},
    "pair": {"n_encoder_layers": 1, "source_vocab_size": 9},
}
KINDS: dict[str, Callable[..., Cache]] = {
    "static": partial(StaticCache, block=BLOCK),
    "paged": partial(PagedCache, page=BLOCK, rows=4),
}
Capturing = Callable[["graphs.Capture | None"], None]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def by_pytorch() -> Iterator[None]:
    """Without native code, which no recording sees, and without gradients."""
    with native.where_it_pays(0), torch.inference_mode():
        yield


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Capturing:
    """Says how decoding forms that are made from now on record steps."""
    return lambda capture: monkeypatch.setattr(graphs, "capture_for", lambda device: capture)


class Case:
    """A model, tokens, and a cache for them that a decoding form serves step by step."""

    def __init__(self, make: Any = KINDS["static"], batch: int = 2, **config: Any) -> None:
        self.model = random_model(0, **config)
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(23, (batch, N), generator=generator)
        self.make = make
        self.padding = torch.arange(batch) if batch > 1 else None
        self.cache = self.new_cache()
        _, self.source = begin(self.model, self.ids[:, :4] % 9)
        self.decode = decoding_form(self.model)
        self.kept: list[Tensor] = []

    def new_cache(self, capacity: int = N, **changes: Any) -> Cache:
        spec = CacheSpec.of(self.model.config, len(self.ids), capacity, **changes)
        return self.make(spec, self.padding)

    def steps(self, end: int, cache: Cache | None = None) -> Tensor:
        """The logits of the tokens up to `end` that the cache does not hold, one by one."""
        cache = cache or self.cache
        ends = range(max(cache.length + 1, PROMPT), end + 1)
        found = [feed(self.decode, cache, self.ids[:, :i], self.source, last=True) for i in ends]
        return torch.cat(found, dim=1)


Story = Callable[[Case], Tensor]


def both(capturing: Capturing, story: Story, make: Callable[[], Case] = Case) -> Recorder:
    """Require the same logits of a story, and the same keys and values at its end, with and without
    recordings -> the recorder."""
    ends = []
    recorder = Recorder()
    for capture in (None, recorder):
        capturing(capture)
        case = make()
        ends.append([story(case), *case.cache.snapshot(0), *case.cache.snapshot(1)])
    assert all(a.equal(b) for a, b in zip(*ends, strict=True))
    return recorder


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
    (recording,) = form._recordings.values()
    compared = {storage(x) for x in (*form._memory, *recording.inputs)}
    assert recorder.reached and recorder.reached <= compared


def test_on_a_cpu_nothing_is_recorded() -> None:
    form = decoding_form(random_model(0))
    assert isinstance(form, DecodingForm) and not form.records


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


def test_another_kind_of_step_is_asked_for_itself(capturing: Capturing) -> None:
    class Near(Step):
        def within(self, window: int) -> Step:
            return super().within(window and 1)

    def story(case: Case) -> Tensor:
        first, step = case.steps(6), case.cache.begin(1)
        near = Near(*vars(step).values())
        found = [case.decode(case.ids[:, 6:7], s, case.cache, None, False) for s in (step, near)]
        case.cache.commit(1)
        assert not found[0].equal(found[1])
        return torch.cat([first, *found], dim=1)

    assert both(capturing, story, partial(Case, **SHAPES["windows"])).recorded == 2


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
    caches = [case.new_cache() for _ in range(graphs.MOST + 2)]
    found = [case.steps(7, cache) for cache in caches]
    assert all(logits.equal(found[0]) for logits in found)
    assert len(case.decode._graphs._kept) == graphs.MOST


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


# Steps that are not recorded


def never_played(capturing: Capturing, story: Story, make: Callable[[], Case] = Case) -> None:
    with mock.patch.object(native.LOG, "warning") as failed:
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
    step = case.cache.begin(1)
    with pytest.raises((RuntimeError, IndexError)):
        case.decode(case.ids[:, :1].float(), step, case.cache, None, False)
    case.steps(N)
    assert recorder.played == N - PROMPT


# Commands

SHORT = "--kernels default --tokens 40 --scenarios decode fork permuted padded".split()


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
    _, source = begin(model, ids[:, :4] % 9)
    cache = make(spec, torch.arange(3, device=device))
    with monkeypatch.context() as patch:
        if not capture:
            patch.setattr(graphs, "capture_for", lambda device: None)
        form = decoding_form(model)
    assert isinstance(form, DecodingForm) and form.records == capture
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
