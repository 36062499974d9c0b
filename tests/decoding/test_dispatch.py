"""How a step is decoded: each question is asked once, each way not taken has a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import graph_cases
from graph_cases import Capturing, Case
from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.cache.cross import CrossCache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.decoding import dispatch
from kvtool.core.decoding.dispatch import DecodingForm, Route, decoding_form
from kvtool.core.decoding.engine import advance, generate
from kvtool.core.decoding.native_decoder import NativeDecoder
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.kernels.default import DefaultKernels, make_kernels
from kvtool.core.models import Model, build_model
from kvtool.core.models.general import GeneralConfig
from kvtool.core.models.layers import Linear
from kvtool.core.native import arrays as native
from recorded_steps import Recorder
from small_models import random_model

capturing = graph_cases.capturing
N = 20
PAIR = {"n_encoder_layers": 1, "source_vocab_size": 9}
MANY = native.most_rows(torch.float32) + 1  # rows, which PyTorch serves
ROW, WIDE = torch.tensor([[5]]), torch.full((MANY, 1), 5)
LONG = torch.full((1, native.MAX_STEP_TOKENS + 1), 5)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def way_of(form: DecodingForm, new: Tensor = ROW, kind: str = "dynamic", **spec: Any) -> Route:
    """How one step is decoded."""
    cache = make_cache(kind, CacheSpec.of(form.config, len(new), N, **spec))
    for _ in range(2):  # the first of a sequence, which sees itself alone, is not captured
        form.taken.clear()
        advance(form, cache, new)
    (way,) = form.taken
    return way


def reasons() -> Iterator[tuple[str, str, Callable[[], Route]]]:
    """Which way a step takes, what its reason holds, and a step."""

    def changed(change: Callable[[Model], object], **config: Any) -> Route:
        model = random_model(0, **config)
        change(model)
        return way_of(decoding_form(model))

    def form(**config: Any) -> DecodingForm:
        return decoding_form(random_model(0, **config))

    def in_flop_counter() -> Route:
        with FlopCounterMode(display=False):
            return way_of(made)

    def unasked(n_tokens: int) -> Route:
        with native.native_if_worthwhile(n_tokens):
            return way_of(form())

    def graded() -> Route:
        with torch.inference_mode(False), torch.enable_grad():
            return way_of(decoding_form(random_model(0)))

    made = form()
    modules, flat = dispatch.MODULES, dispatch.FLAT
    yield dispatch.ONE_CALL.name, "", lambda: way_of(form())
    yield dispatch.ONE_CALL.name, "", lambda: unasked(native.MIN_DECODED)
    yield dispatch.LAYERWISE, "none cache", lambda: way_of(form(), kind="none")
    yield dispatch.LAYERWISE, "a window each", partial(way_of, form(window=4), kind="sliding")
    yield flat, "fewer than 500 tokens", lambda: unasked(native.MIN_DECODED - 1)
    yield flat, f"more than {MANY - 1} tokens", lambda: way_of(form(), WIDE)
    wide = native.fills_registers()  # else for codes as for numbers
    rows = torch.full((native.most_rows(torch.bfloat16) + 1, 1), 5)
    half = decoding_form(random_model(0).to(torch.bfloat16))
    way = partial(way_of, half, rows, dtype=torch.bfloat16)
    yield flat, f"more than {len(rows) - 1} tokens", way
    for kind in ("int8", "int4", "fp8"):
        yield dispatch.ONE_CALL.name if wide else flat, "", partial(way, kind)
    yield flat, "something watches", in_flop_counter
    yield modules, "more than 8 tokens", lambda: way_of(form(), LONG)
    yield modules, "gradients", graded
    yield modules, "training", lambda: changed(nn.Module.train)
    yield (
        modules,
        "hooks watch a Linear",
        lambda: changed(lambda m: m.get_submodule("head").register_forward_hook(lambda *_: None)),
    )
    yield (
        modules,
        "a method of a LayerNorm",
        lambda: changed(lambda m: setattr(m.get_submodule("norm"), "extra_repr", str)),
    )
    yield (
        modules,
        "Wider is no module",
        lambda: changed(lambda m: setattr(m, "head", Wider(16, 23, bias=False))),
    )
    yield modules, "the shape (23, 16) (configured: (40, 16))", lambda: changed(
        lambda m: setattr(m.get_submodule("embed"), "positions", nn.Embedding(23, 16).eval()),
        positions="learned", context=40,
    )  # fmt: skip


class Wider(Linear):
    pass


@pytest.mark.parametrize(("name", "why", "decode"), [*reasons()], ids=lambda x: str(x)[:24])
def test_every_way_has_its_steps_and_every_way_not_taken_a_reason(
    name: str, why: str, decode: Callable[[], Route]
) -> None:
    way = decode()
    assert way.name == name and why in way.why and bool(way.why) == bool(why)


@pytest.mark.parametrize(("kind", "rows", "watched", "way"), [
    ("dynamic", 1, False, dispatch.ONE_CALL.name), ("none", 1, False, dispatch.LAYERWISE),
    ("dynamic", MANY, False, dispatch.FLAT), ("dynamic", 1, True, dispatch.MODULES),
])  # fmt: skip
def test_ids_as_an_array_ask_for_no_gradients_whichever_way_they_are_decoded(
    kind: str, rows: int, watched: bool, way: str
) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        model = random_model(0)
        if watched:
            model.get_submodule("head").register_forward_hook(lambda *_: None)
        form, cache = decoding_form(model), make_cache(kind, CacheSpec.of(model.config, rows, N))
        for length in (1,) if cache.recompute else (1, 2):
            logits = torch.as_tensor(form.step(np.full((rows, 1), 5), cache, None, last=True))
            assert not logits.requires_grad and cache.length == length
    assert {taken.name for taken in form.taken} == {way}


QUESTIONS = [
    (native, "why_away"), (native, "why_unreadable"), (dispatch, "_are_usual"),
    (dispatch, "_why_modules"), (dispatch, "_why_not_captured"), (DecodingForm, "_why_pytorch"),
    (NativeDecoder, "stores_in"), (DynamicCache, "step_addresses"), (CrossCache, "step_addresses"),
]  # fmt: skip


@pytest.mark.parametrize("n_tokens", [0, native.MIN_DECODED])
@pytest.mark.parametrize("config", [{}, PAIR], ids=["decoder", "pair"])
@pytest.mark.parametrize("new", [ROW, WIDE, LONG], ids=["row", "rows", "tokens"])
def test_a_step_asks_each_question_once_at_most(
    monkeypatch: pytest.MonkeyPatch, new: Tensor, config: dict[str, Any], n_tokens: int
) -> None:
    model = random_model(0, **config)
    form, batch = decoding_form(model), len(new)
    sources = torch.ones(batch, 3, dtype=torch.long)
    source = model.encode(sources, sources > 0) if config else None
    cache = DynamicCache(CacheSpec.of(model.config, batch, N))
    asked: list[str] = []
    with native.native_if_worthwhile(n_tokens):
        form.step(new, cache, source, last=True)  # which reads the weights
    for owner, name in QUESTIONS:
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, n=f"{owner.__name__}.{name}", r=real: asked.append(n) or r(*a)
        )
    # What modules ask for each of their layers is not the step's choice.
    monkeypatch.setattr(dispatch, "by_modules", lambda *_: asked.append("modules"))
    form._flat = lambda *_: asked.append("flat")  # type: ignore[assignment]
    with native.native_if_worthwhile(n_tokens):
        form.step(new, cache, source, last=True)
    assert len(asked) > 2 and len(asked) == len(set(asked)), asked


def test_a_greedy_step_that_is_refused_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], DecodingForm.step
    monkeypatch.setattr(DecodingForm, "step", lambda *a, **k: asked.append(1) or real(*a, **k))
    model = random_model(0)
    cache = make_cache("none", CacheSpec.of(model.config, 1, N))
    assert len(list(generate(model, ROW, cache, 5, Sampler()))) == len(asked) == 5


def test_a_token_has_the_same_bits_whichever_way_it_takes(capturing: Capturing) -> None:
    """With exact kernels, which fix the order of all sums, and without native code otherwise."""
    by_kind = {
        kind: decoded(decoding_form(random_model(0)), kind, "exact")
        for kind in ("dynamic", "none")  # one compiled call, layer by layer
    }
    by_modules = decoded(random_model(0), "dynamic", "exact")
    assert all(logits.equal(by_modules) for logits in by_kind.values())
    with native.native_if_worthwhile(0):
        ways = {}
        for capture in (None, Recorder()):
            capturing(capture)
            case = Case(batch=1)
            logits = case.steps(12)
            ways[case.decode.taken.most_common()[0][0].name] = logits
        case.decode, case.cache = case.model, case.new_cache()
        ways["modules"] = case.steps(12)
    assert {*ways} == {dispatch.FLAT, dispatch.GRAPH.name, dispatch.MODULES}
    assert all(logits.equal(ways["modules"]) for logits in ways.values())


def decoded(decode: Any, kind: str, kernels: str) -> Tensor:
    spec = CacheSpec.of(decode.config, 1, N, kernels=make_kernels(kernels))
    cache, ids = make_cache(kind, spec), torch.arange(N)[None] % decode.config.vocab_size
    ends = range(1, 13)
    news = [ids[:, :end] if cache.recompute else ids[:, end - 1 : end] for end in ends]
    return torch.cat([advance(decode, cache, new, last=True) for new in news], dim=1)


def test_graphs_that_are_not_captured_say_why(capturing: Capturing) -> None:
    capturing(Recorder())
    with native.native_if_worthwhile(0):
        form = decoding_form(random_model(0))
        found = [
            way_of(form, kind="static"),
            way_of(form, kind="dynamic"),
            way_of(form, kind="static", kernels=make_kernels("exact")),
            way_of(form, LONG, kind="static"),
        ]
    assert [way.name for way in found] == [
        dispatch.GRAPH.name, dispatch.FLAT, dispatch.FLAT, dispatch.MODULES,
    ]  # fmt: skip
    assert "dynamic cache moves" in found[1].why and "default kernels" in found[2].why


def test_changed_kernels_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    real = DefaultKernels.attention
    monkeypatch.setattr(DefaultKernels, "attention", lambda *a: real(*a) * 2)
    way = way_of(decoding_form(random_model(0)))
    assert way == (dispatch.MODULES, dispatch.CHANGED_KERNELS)


def test_the_ways_are_told_in_a_line() -> None:
    form = decoding_form(random_model(0))
    cache = make_cache("dynamic", CacheSpec.of(form.config, 1, 20))
    assert form.summary() == ""
    for new in (torch.ones(1, 9, dtype=torch.long), ROW, ROW):
        assert isinstance(form.step(new, cache, None, True), np.ndarray | Tensor)
    assert form.summary() == (
        "2 steps by one compiled call; "
        "1 step by modules (PyTorch is as fast for more than 8 tokens at once)"
    )


def test_a_family_with_more_settings_says_why_its_modules_decode() -> None:
    config = GeneralConfig(9, n_layers=1, d_model=16, n_heads=2, context=20, logits_cap=2.0)
    form = decoding_form(build_model(config).eval())
    cache = make_cache("dynamic", CacheSpec.of(config, 1, 20))
    form.step(ROW, cache, None, True)
    why = "the settings of the family general are known to modules alone"
    assert form.summary() == f"1 step by modules ({why})"
