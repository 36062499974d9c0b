"""The flat form of a decoding step: the modules' bits, and the modules where it does not apply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import graph_cases
from kvtool import registry
from kvtool.core.cache import Cache, CacheSpec, cache_class, make_cache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.paged import PagedCache
from kvtool.core.cache.sliding import SlidingCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.cache_bytes import GRAIN
from kvtool.core.decoding.dispatch import ONE_CALL, decoding_form
from kvtool.core.decoding.engine import feed, first_input, generate
from kvtool.core.decoding.native_decoder import NativeDecoder
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.kernels.default import DEFAULT, make_kernels
from kvtool.core.models import Model
from kvtool.core.models.layers import Linear
from kvtool.core.native import arrays as native
from small_models import random_model

N, PROMPT = 12, 5
SHAPES = {
    **graph_cases.SHAPES,
    "norms of one stored head": {"positions": "rotary", "qk_norm": True, "n_kv_heads": 1},
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tokens(model: Model, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(model.config.vocab_size, (batch, N), generator=generator)


def decoded(model: Model, decode: Any, kernels: str, kind: str, batch: int) -> Tensor:
    """The logits of a prompt and of the tokens behind it, one by one."""
    ids = tokens(model, batch)
    dtype = next(model.parameters()).dtype
    spec = CacheSpec.of(model.config, batch, N, dtype, kernels=make_kernels(kernels))
    _, source = first_input(model, ids[:, :4] % 9, spec.kernels)
    padding = torch.arange(batch) if batch > 1 else None
    cache = cache_class(kind)(spec, padding, **cache_class(kind).small)
    ends = range(PROMPT, N + 1)
    return torch.cat([feed(decode, cache, ids[:, :end], source) for end in ends], dim=1)


MANY = native.MAX_STEP_TOKENS + 1  # rows, more than tokens of a row that native code takes
# Rows that PyTorch serves in bfloat16, but native code with a cache of codes.
MORE = native.most_rows(torch.bfloat16) + 1
HALVES = torch.bfloat16, torch.float16  # read and rounded by functions that all shapes share


RUNS = [
    *((torch.float32, "default", batch) for batch in (1, 3, MANY)),
    *((half, "default", 3) for half in HALVES),
    (torch.bfloat16, "default", MORE),
    *((dtype, "exact", MANY) for dtype in (torch.float32, *HALVES)),
]


@pytest.mark.parametrize(("dtype", "kernels", "batch"), RUNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_its_logits_are_those_of_the_modules(
    shape: str, dtype: torch.dtype, kernels: str, batch: int
) -> None:
    """Every other kind of cache in turn, so that each meets every shape and every run."""
    model = random_model(0, **SHAPES[shape]).to(dtype)
    decode = decoding_form(model)
    assert not decode._foreign and native.decoder_code(dtype)
    first = (*SHAPES,).index(shape) + RUNS.index((dtype, kernels, batch))
    for kind in [*registry.CACHES][first % 2 :: 2]:
        by_modules = decoded(model, model, kernels, kind, batch)
        assert decoded(model, decode, kernels, kind, batch).equal(by_modules)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_logits_alone_are_those_among_all(shape: str, batch: int) -> None:
    """What other tokens need in the last layer is left out, their keys and values are not."""
    model = random_model(0, **SHAPES[shape])
    ids, decode = tokens(model, batch), decoding_form(model)
    for kind in registry.CACHES:
        logits = []
        for last in (False, True):
            spec = CacheSpec.of(model.config, batch, N, kernels=make_kernels("exact"))
            _, source = first_input(model, ids[:, :4] % 9, spec.kernels)
            cache = cache_class(kind)(spec, torch.arange(batch), **cache_class(kind).small)
            ends = PROMPT, PROMPT + 1, PROMPT + 4, N
            found = [feed(decode, cache, ids[:, :end], source, last=last)[:, -1] for end in ends]
            logits.append(torch.stack(found))
        assert logits[0].equal(logits[1])


@pytest.mark.parametrize(("batch", "by_the_decoder"), [(1, []), (2, [PROMPT])])
def test_few_tokens_do_not_call_the_decoder_and_more_do(
    batch: int, by_the_decoder: list[int]
) -> None:
    model = random_model(0)
    decode = decoding_form(model)
    called = []
    model.register_forward_pre_hook(lambda _, args: called.append(args[0].shape[1]))
    decoded(model, decode, "default", "dynamic", batch)
    assert called == by_the_decoder


def test_few_tokens_take_one_call_of_native_code_and_other_caches_one_a_layer_or_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, called, code = random_model(0), [], native.decoder_code(torch.float32)
    assert code is not None
    for name in ("decode", "before_attention"):
        real = getattr(code, name)
        monkeypatch.setattr(code, name, lambda *a, n=name, r=real: called.append(n) or r(*a))
    for kind, expected in (
        ("static", ["decode"]),
        ("paged", ["decode"]),
        ("sliding", ["decode"]),
        ("int8", ["decode"]),
        ("fp8", ["decode"]),
        ("none", ["before_attention"] * 2),
    ):
        called.clear()
        cache = make_cache(kind, CacheSpec.of(model.config, 1, N))
        feed(decoding_form(model), cache, tokens(model, 1)[:, :1])
        assert called == expected


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 2), (9, 4), (20, 3), (21, 11), (60, 2)])
def test_a_window_and_sinks_are_read_in_place_through_evictions_and_crops(
    monkeypatch: pytest.MonkeyPatch, window: int, sinks: int, slack: int, batch: int
) -> None:
    """Sinks among the others, beside them or apart; rows that begin behind padding; steps that
    leave fewer than eight in each part."""
    model, called = random_model(0, positions="rotary"), []
    code = native.decoder_code(torch.float32)
    real = code.decode
    monkeypatch.setattr(code, "decode", lambda *a: called.append(len(a[2])) or real(*a))
    ids = torch.randint(model.config.vocab_size, (batch, 70))
    padding = torch.tensor([0, 2, 13])[:batch]
    spec = CacheSpec.of(model.config, batch, 70, kernels=make_kernels("exact"))
    own, other = (SlidingCache(spec, padding, window, sinks, slack) for _ in range(2))
    decode, end = decoding_form(model), 0
    for n in (1, 7, 1, 1, 6, 1, 1, 1, -3, 1, 1, 1, 1, 1, 1, 1, 20, 1, 1, 1, -2, 1, 1, 1, 1, 2, 1):
        end += n if n > 0 else max(n, -slack)
        if n < 0:
            own.crop(end)
            other.crop(end)
        else:
            by_form = feed(decode, own, ids[:, :end])
            assert by_form.equal(feed(model, other, ids[:, :end])), end
    assert called.count(batch) > 8


GROUPINGS = ["", ":group=16:residual=7", ":group=6", ":residual=0"]
COMPUTED = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize(
    ("kind", "settings", "dtype"),
    [  # in turns: both kinds meet every grouping and every format
        (("int8", "int4")[(i + j) % 2], settings, dtype)
        for i, settings in enumerate(GROUPINGS)
        for j, dtype in enumerate(COMPUTED)
    ]
    + [("fp8", "", dtype) for dtype in (*COMPUTED, torch.float16)],
    ids=str,
)
def test_codes_are_read_in_place_and_made_there_too(
    kind: str, settings: str, dtype: torch.dtype
) -> None:
    """By vectors where a head of 32 and its groups fill them; heads shared by queries, padding."""
    model = random_model(0, d_model=64, n_heads=4, head_size=32, n_kv_heads=2, context=150)
    model, decode = model.to(dtype), decoding_form(model.to(dtype))
    n, padding = 150, torch.tensor([0, 9])
    ids = torch.randint(model.config.vocab_size, (2, n))
    spec = CacheSpec.of(model.config, 2, n, dtype, kernels=make_kernels("exact"))
    own, other = (make_cache(kind + settings, spec, padding) for _ in range(2))
    for end in (64, *range(65, 110), 113, 114, *range(115, n + 1)):
        by_form = feed(decode, own, ids[:, :end])
        assert by_form.equal(feed(model, other, ids[:, :end])), end
    steps = 46 + 36  # of one token a row, those that fill a group among them
    assert decode.taken[ONE_CALL] >= steps


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache, partial(PagedCache, page=4, rows=2)])
def test_a_fork_reads_and_writes_its_own_memory(kind: Callable[[CacheSpec], Cache]) -> None:
    model, ids = random_model(0), tokens(random_model(0), 1)
    other = torch.cat([ids[:, :PROMPT], (ids[:, PROMPT:] + 1) % model.config.vocab_size], dim=1)
    cache, decode = kind(CacheSpec.of(model.config, 1, N)), decoding_form(model)
    feed(decode, cache, ids[:, :PROMPT])
    fork = cache.fork()
    for end in range(PROMPT + 1, N + 1):
        for each, history in ((cache, ids), (fork, other)):
            logits = feed(decode, each, history[:, :end])[:, -1]
            torch.testing.assert_close(logits, model(history[:, :end])[:, -1])


def test_layers_of_which_some_have_grown_when_memory_ran_out_are_read_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(0, context=GRAIN + 9)
    decode, ids = decoding_form(model), torch.arange(GRAIN + 1)[None] % model.config.vocab_size
    cache = make_cache("dynamic", CacheSpec.of(model.config, 1, GRAIN + 9))
    feed(decode, cache, ids[:, :GRAIN])
    made, real = [], Tensor.new_zeros

    def new_zeros(old: Tensor, *args: Any) -> Tensor:
        made.append(1)
        if len(made) > 2:
            raise MemoryError
        return real(old, *args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Tensor, "new_zeros", new_zeros)
        feed(decode, cache, ids)
    cache.crop(GRAIN - 3)
    logits = feed(decode, cache, ids[:, : GRAIN - 2])
    torch.testing.assert_close(logits[:, -1], model(ids[:, : GRAIN - 2])[:, -1])


def test_generate_takes_the_flat_form_though_weights_may_have_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called, real = [], NativeDecoder.one_call_step
    monkeypatch.setattr(NativeDecoder, "one_call_step", lambda *a: called.append(1) or real(*a))
    with torch.inference_mode(False), torch.enable_grad():
        model = random_model(0)
        assert all(parameter.requires_grad for parameter in model.parameters())
        cache = make_cache("dynamic", CacheSpec.of(model.config, 1, N))
        assert len(list(generate(model, tokens(model, 1)[:, :PROMPT], cache, 4, Sampler()))) == 4
    assert len(called) == 4


def test_who_asks_for_gradients_or_watches_later_gets_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.inference_mode(False), torch.no_grad():
        model = random_model(0)
        decode = decoding_form(model)
        for name in ("one_call_step", "layerwise_step"):
            monkeypatch.setattr(NativeDecoder, name, lambda *_: pytest.fail("native code"))
        for mode in (torch.enable_grad(), FlopCounterMode(display=False)):
            cache = make_cache("dynamic", CacheSpec.of(model.config, 1, N))
            with mode:
                feed(decode, cache, tokens(model, 1)[:, :1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"n_kv_heads": 2}, "same slice shapes"), ({"dtype": torch.float64}, "same dtype")],
)
def test_a_cache_of_other_sizes_or_numbers_is_refused_as_by_the_modules(
    changes: dict[str, Any], said: str
) -> None:
    model = random_model(0)
    spec = dataclasses.replace(CacheSpec.of(model.config, 1, N), **changes)
    for decode in (model, decoding_form(model)):
        with pytest.raises(RuntimeError, match=said):
            feed(decode, make_cache("dynamic", spec), tokens(model, 1)[:, :1])


class Doubled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def watched(model: Model) -> None:
    model.get_submodule("layers.1.attn").register_forward_hook(lambda *_: None)


def replaced(model: Model) -> None:
    model.get_submodule("layers.0.mlp").down = Doubled(24, 16)


def overridden(model: Model) -> None:
    model.get_submodule("norm").forward = lambda x: x


def watched_backwards(model: Model) -> None:
    model.get_submodule("norm").register_full_backward_hook(lambda *_: None)


def another_activation(model: Model) -> None:
    model.get_submodule("layers.0.mlp").activate = lambda x: x


def training(model: Model) -> None:
    model.train()


def compiled(model: Model) -> None:
    model.get_submodule("layers.0").compile(backend="eager")


CHANGES = [
    watched, watched_backwards, replaced, another_activation, overridden, training, compiled,
]  # fmt: skip


def narrower(model: Model) -> None:
    model.get_submodule("layers.0.mlp").down = Linear(20, 16)


def without_a_position(model: Model) -> None:
    positions = model.get_submodule("embed").positions
    positions.weight = torch.nn.Parameter(positions.weight[:2])


def with_more_heads(model: Model) -> None:
    model.get_submodule("layers.1.attn").qkv = Linear(16, 96)


MISFITS = [
    (narrower, RuntimeError, "shapes cannot be multiplied"),
    (without_a_position, IndexError, "index out of range"),
    (with_more_heads, RuntimeError, "split_with_sizes expects"),
]


@pytest.mark.parametrize(("change", "error", "said"), MISFITS)
def test_layers_that_do_not_fit_together_are_refused_as_by_the_modules(
    change: Any, error: type[Exception], said: str
) -> None:
    model = random_model(0, **SHAPES["learned"])
    change(model.requires_grad_(False))
    for decode in (model, decoding_form(model)):
        cache = make_cache("dynamic", CacheSpec.of(model.config, 1, N))
        with pytest.raises(error, match=said):
            feed(decode, cache, tokens(model, 1)[:, :3])


@pytest.mark.parametrize("kind", ["dynamic", "paged"])
@pytest.mark.parametrize("shape", ["learned", "sinusoidal", "grouped"])
def test_more_positions_than_there_are_and_unknown_tokens_are_refused(
    shape: str, kind: str
) -> None:
    model = random_model(0, **SHAPES[shape])
    context = model.config.context
    n = model.config.vocab_size
    for ids, said in (
        ([[0] * (context + 1)], "tokens beyond"),
        ([[n]], f"token {n}"),
        ([[-1]], "token -1"),
    ):
        cache = make_cache(kind, CacheSpec.of(model.config, 1, context + 1))
        decode = decoding_form(model)
        given = torch.tensor(ids)
        if given.shape[1] > 1:
            feed(model, cache, given[:, :-1])
        with pytest.raises(IndexError, match=said):
            feed(decode, cache, given)


@pytest.mark.parametrize("change", CHANGES)
def test_a_decoder_that_is_watched_or_changed_stays_as_it_is(change: Any) -> None:
    model = random_model(0)
    change(model)
    assert decoding_form(model)._foreign


def test_hooks_on_every_module_of_the_process_see_the_modules() -> None:
    seen: list[str] = []
    watch = torch.nn.modules.module.register_module_forward_hook
    handle = watch(lambda module, *_: seen.append(type(module).__name__))
    try:
        model = random_model(0)
        decoded(model, decoding_form(model), "default", "dynamic", 1)
    finally:
        handle.remove()
    assert seen.count("Decoder") == N - PROMPT + 1


def test_a_decoder_that_reads_a_source_asks_for_it() -> None:
    model = random_model(0, **SHAPES["pair"])
    cache = make_cache("dynamic", CacheSpec.of(model.config, 1, N, kernels=DEFAULT))
    with pytest.raises(ValueError, match="needs the encoded source"):
        feed(decoding_form(model), cache, tokens(model, 1)[:, :1])
