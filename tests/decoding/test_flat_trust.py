"""What compiled code would take on trust: the decoding form answers, or refuses, as modules do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec, make_cache
from kvtool.core.cache.cross import CrossCache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.decoding.dispatch import decoding_form
from kvtool.core.decoding.engine import feed, generate
from kvtool.core.decoding.native_decoder import MAX_CALL_TOKENS
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.kernels.default import DEFAULT, DefaultKernels, make_kernels
from kvtool.core.models import Model
from kvtool.core.models.layers import Linear
from kvtool.core.models.seq2seq import Seq2Seq
from kvtool.core.native import arrays as native
from kvtool.errors import CapacityError
from small_models import random_model

PAIR = {"n_encoder_layers": 1, "source_vocab_size": 9}
BATCH, CAPACITY = 2, 12


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Case:
    """A model, a cache and a source, before something is wrong with them."""

    def __init__(self, **config: Any) -> None:
        self.model = random_model(0, **config)
        self.spec = CacheSpec.of(self.model.config, BATCH, CAPACITY)
        self.make: Callable[[CacheSpec], Cache] = DynamicCache
        self.source: CrossCache | None = None
        if self.model.config.n_encoder_layers:
            sources = torch.tensor([[3, 4, 5, 6], [5, 6, 7, 8]])
            mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
            self.source = self.model.encode(sources, mask)
        self.ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        self.between: Callable[[Model], object] = lambda model: None

    def answers(self, by_modules: bool) -> Tensor | str:
        """The logits of two tokens and of one more; or that it was refused."""
        model = self.model
        decode = model if by_modules else decoding_form(model)
        self.between(model)
        try:
            cache = self.make(self.spec)
            first = feed(decode, cache, self.ids[:, :2], self.source)
            return torch.cat([first, feed(decode, cache, self.ids, self.source)], dim=1)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return "refused"


def agree(make: Callable[[], Case]) -> None:
    """Two cases alike, one for each: what is wrong may be done to a model."""
    expected, found = make().answers(by_modules=True), make().answers(by_modules=False)
    if isinstance(expected, str) or isinstance(found, str):
        assert expected is found
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def of_source(change: Callable[[CrossCache], CrossCache]) -> Callable[[], Case]:
    def make() -> Case:
        case = Case(**PAIR)
        assert case.source is not None
        case.source = change(case.source)
        return case

    return make


def on_layers(change: Callable[[Tensor], Tensor]) -> Callable[[CrossCache], CrossCache]:
    return lambda s: CrossCache([(change(k), change(v)) for k, v in s.layers], s.mask)


class Halved(CrossCache):
    def attend(self, *args: Any) -> Tensor:
        return super().attend(*args) / 2


def patched(source: CrossCache) -> CrossCache:
    attend = source.attend
    source.attend = lambda *args: attend(*args) / 2  # type: ignore[method-assign]
    return source


SOURCES: dict[str, Callable[[CrossCache], CrossCache]] = {
    "of one row": lambda s: s.select(torch.tensor([0])),
    "of more rows": lambda s: s.select(torch.tensor([0, 1, 1, 0])),
    "of fewer layers": lambda s: CrossCache(s.layers[:1], s.mask),
    "with a wider mask": lambda s: CrossCache(s.layers, s.mask.repeat(1, 3)),
    "with a mask of numbers": lambda s: CrossCache(s.layers, s.mask.long() * 5),
    "in float64": on_layers(Tensor.double),
    "in half": on_layers(Tensor.half),
    "with fewer heads": on_layers(lambda x: x[:, :1]),
    "with wider heads": on_layers(lambda x: x.repeat(1, 1, 1, 2)),
    "with gaps": lambda s: CrossCache(s.layers, torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]]).bool()),
    "of which a row sees nothing": lambda s: CrossCache(s.layers, s.mask & ~s.mask[1:, :1]),
    "by columns": on_layers(lambda x: x.mT.contiguous().mT),
    "of a subclass": lambda s: Halved(s.layers, s.mask),
    "with another attend": patched,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source(kind: str) -> None:
    agree(of_source(SOURCES[kind]))


def without_cross(model: Model) -> None:
    model.get_submodule("decoder.layers.0").cross = None


def without_one_head_norm(model: Model) -> None:
    model.get_submodule("layers.1.attn").k_norm = None


def reversed_layers(model: Model) -> None:
    model.layers = torch.nn.ModuleList(list(model.get_submodule("layers"))[::-1])


def one_layer_twice(model: Model) -> None:
    layers = model.get_submodule("layers")
    layers[1] = layers[0]


def plain_transposed(model: Model) -> None:
    layer = model.get_submodule("layers.0.attn.out")
    weight = layer.weight.mT.contiguous().mT
    del layer.weight
    layer.weight = weight


def plain_short_bias(model: Model) -> None:
    layer = model.get_submodule("layers.0.attn.out")
    del layer.bias
    layer.bias = torch.zeros(1)


def strided_angles(model: Model) -> None:
    table = model.get_submodule("rotary").table
    table.table = table.table.mT.contiguous().mT


def single_angles(model: Model) -> None:
    table = model.get_submodule("rotary").table
    table.table = table.table.float()


MODELS: list[tuple[Callable[[Model], None], dict[str, Any]]] = [
    (without_cross, PAIR),
    (without_one_head_norm, {"qk_norm": True}),
    (reversed_layers, {}),
    (one_layer_twice, {}),
    (plain_transposed, {}),
    (plain_short_bias, {}),
    (strided_angles, {"positions": "rotary"}),
    (single_angles, {"positions": "rotary"}),
]


@pytest.mark.parametrize(("change", "config"), MODELS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_model(change: Callable[[Model], None], config: dict[str, Any]) -> None:
    def make() -> Case:
        case = Case(**config)
        change(case.model)
        return case

    agree(make)


@pytest.mark.parametrize("kind", ["dynamic", "paged", "int8"])
def test_numbers_that_changed_before_the_first_token(kind: str) -> None:
    def make() -> Case:
        case = Case()
        case.make, case.between = lambda spec: make_cache(kind, spec), Model.double
        return case

    agree(make)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int32])
def test_ids_of_another_type(dtype: torch.dtype) -> None:
    def make() -> Case:
        case = Case()
        case.ids = (case.ids / 2).to(dtype)
        return case

    agree(make)


def test_a_cache_on_another_device() -> None:
    def make() -> Case:
        case = Case()
        case.spec = dataclasses.replace(case.spec, device=torch.device("meta"))
        return case

    agree(make)


class InDouble(DynamicCache):
    def attend(self, *args: Any) -> Tensor:
        return super().attend(*args).double()


class Narrow(DynamicCache):
    def attend(self, *args: Any) -> Tensor:
        return super().attend(*args)[..., :1]


@pytest.mark.parametrize("kind", [InDouble, Narrow])
def test_attention_of_another_form(kind: type[DynamicCache]) -> None:
    def make() -> Case:
        case = Case()
        case.make = kind
        return case

    agree(make)


@pytest.mark.parametrize(
    "owner", [DEFAULT, DefaultKernels, Linear], ids=["used", "class", "linear"]
)
def test_who_is_replaced_is_not_passed_over(owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "forward" if owner is Linear else "attention"
    real, called = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *args: called.append(1) or real(*args) * 2)
    agree(Case)
    assert called


def test_rows_that_memory_ran_out_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for by_modules in (True, False):
        case = Case()
        decode = case.model if by_modules else decoding_form(case.model)
        cache = DynamicCache(case.spec)
        feed(decode, cache, case.ids)
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(torch, "index_select", lambda *_: exec("raise MemoryError"))
            cache.select(torch.zeros(6, dtype=torch.long))
        with pytest.raises(RuntimeError, match="must have same slice shapes"):
            feed(decode, cache, torch.zeros(6, 4, dtype=torch.long))


def test_a_token_that_the_caller_writes_to_changes_none_after_it() -> None:
    case = Case()
    runs = []
    for spoilt in (False, True):
        cache, tokens = DynamicCache(case.spec), []
        for token in generate(case.model, case.ids, cache, 6, Sampler()):
            tokens.append(token.clone())
            if spoilt:
                token.numpy()[:] = 0
        runs.append(torch.stack(tokens))
    assert runs[0].equal(runs[1])


def test_a_long_exact_prompt_goes_in_several_calls_to_the_same_bits() -> None:
    model = random_model(0, context=2 * MAX_CALL_TOKENS)
    spec = CacheSpec.of(model.config, 1, 2 * MAX_CALL_TOKENS, kernels=make_kernels("exact"))
    ids = torch.arange(MAX_CALL_TOKENS + 9)[None] % model.config.vocab_size
    whole = feed(decoding_form(model), DynamicCache(spec), ids)
    assert whole.equal(feed(model, DynamicCache(spec), ids))
    last = feed(decoding_form(model), DynamicCache(spec), ids, last=True)
    assert last.equal(whole[:, -1:])


def on_buffers(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def apply(cache: Any) -> None:
        cache._keys = [change(x) for x in cache._keys]
        cache._values = [change(x) for x in cache._values]

    return apply


def setting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda cache: setattr(cache, name, value)


def respecified(**changes: Any) -> Callable[[Any], None]:
    return lambda cache: setattr(cache, "spec", dataclasses.replace(cache.spec, **changes))


def released(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


CHANGED: dict[str, Callable[[Any], None]] = {
    "in half": on_buffers(Tensor.half),
    "read as whole numbers": on_buffers(lambda x: x.view(torch.int32)),
    "of fewer columns": on_buffers(lambda x: x[:, :, :9].clone()),
    "of the first layer alone": on_buffers(lambda x: x[:, :1].clone()),
    "by columns": on_buffers(lambda x: x.mT.contiguous().mT),
    "without memory": on_buffers(released),
    "said to be larger": respecified(capacity=60),
    "said to be of other numbers": respecified(dtype=torch.float64),
    "with less than no padding": setting("left_padding", torch.tensor([-5])),
    "with another window": setting("window", 2),
    "with fewer sinks": setting("sinks", 1),
    "with less than no sinks": setting("sinks", -1),
}


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding:window=5:sinks=3", "int8:group=4"])
@pytest.mark.parametrize("change", CHANGED)
def test_a_cache_that_was_changed_between_steps(change: str, kind: str) -> None:
    model, outcomes = random_model(0), []
    ids = torch.randint(model.config.vocab_size, (1, 40))
    for decode in (model, decoding_form(model)):
        cache = make_cache(kind, CacheSpec.of(model.config, 1, 20))
        for end in (10, 11, 12):
            feed(decode, cache, ids[:, :end])
        CHANGED[change](cache)
        try:
            found = [feed(decode, cache, ids[:, :end])[:, -1] for end in (13, 14, 34, 35)]
            outcomes.append(torch.cat(found))
        except (RuntimeError, ValueError, IndexError, TypeError, CapacityError):
            outcomes.append("refused")
    expected, found = outcomes
    if isinstance(expected, str) or isinstance(found, str):
        assert expected == found
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_weights_of_a_format_that_the_processor_cannot_convert_are_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LLVM would call functions that are not there, and end the process."""
    half = torch.ones(1, 4, dtype=torch.float16)
    for name in ("layer_code", "decoder_code"):
        unknown = getattr(native, name).__wrapped__
        monkeypatch.setattr(unknown(torch.float32), "CONVERTS_FLOAT16", False)
        monkeypatch.setattr(native, name, unknown)
        assert unknown(half.dtype) is None
    assert not native.can_read(half)
    assert native.can_read(half.bfloat16()) and native.can_read(half.float())


class HalvedAround(Seq2Seq):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) / 2


def watched_around(model: Model) -> Model:
    model.register_forward_hook(lambda *_: None)
    return model


def overridden_around(model: Model) -> Model:
    model.forward = lambda *_: None  # type: ignore[assignment, return-value]
    return model


def subclassed(model: Model) -> Model:
    return HalvedAround(model.config).eval()


def compiled_around(model: Model) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("change", [watched_around, overridden_around, subclassed, compiled_around])
def test_what_is_around_a_decoder_is_not_passed_over(change: Any) -> None:
    model = change(random_model(0, **PAIR))
    assert decoding_form(model)._foreign
