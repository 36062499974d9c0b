"""Layers that see one token: what native code gives for a few, and who may watch them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numba
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from kvtool.config import ACTIVATIONS, ModelConfig
from kvtool.core.kernels.default import DEFAULT, reference_attention
from kvtool.core.models.layers import ACTIVATION, MLP, LayerNorm, Linear, RMSNorm
from kvtool.core.native import arrays as native
from small_models import SIZES, random_model

# What may be wrong after a sum of some tens; half formats are rounded once, at the end.
FLOATS = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-11}
WIDTH = 37  # no multiple of a vector


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, for layers of any size."""
    monkeypatch.setattr(native, "MIN_SHARED", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def linear(bias: bool = True) -> Linear:
    layer = Linear(WIDTH, 53, bias=bias).requires_grad_(False)
    if bias:
        layer.bias.normal_()
    return layer


def norm(kind: type[LayerNorm | RMSNorm]) -> nn.Module:
    layer = kind(WIDTH, eps=1e-5).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_()
    return layer


def mlp(activation: str) -> MLP:
    return MLP(ModelConfig(**SIZES, vocab_size=9, activation=activation))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "linear without bias": lambda: linear(bias=False),
    "layer norm": lambda: norm(LayerNorm),
    "layer norm without bias": lambda: LayerNorm(WIDTH, bias=False),
    "rms norm": lambda: norm(RMSNorm),
}


def by_pytorch(layer: nn.Module, x: Tensor) -> Tensor:
    """In float64, by PyTorch's own function."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    if isinstance(layer, Linear):
        return F.linear(x, layer.weight, layer.bias)
    if isinstance(layer, LayerNorm):
        return F.layer_norm(x, (WIDTH,), layer.weight, layer.bias, layer.eps)
    assert isinstance(layer, RMSNorm)
    return F.rms_norm(x, (WIDTH,), layer.weight, layer.eps)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of native code that have been called."""
    called: list[str] = []
    kernels = native.loaded()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(kernels, name)

    monkeypatch.setattr(native, "loaded", Watched)
    return called


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1, 1), (4, 1), (2, 2), (9, 1), (1, 9), (257, 1)])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_of_few_tokens_and_of_more_is_right(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, served: list[str]
) -> None:
    layer, x = LAYERS[name]().to(dtype), torch.randn(*shape, WIDTH, dtype=dtype)
    y = layer(x)
    rows = shape[0] if shape[1:] == (1,) else 1000  # of one token
    few = torch.Size(shape).numel() <= native.MAX_STEP_TOKENS or rows <= native.most_rows(dtype)
    assert bool(served) == (few or name == "rms norm")
    assert y.shape[:-1] == shape
    assert y.dtype is dtype
    exact = FLOATS[dtype]
    torch.testing.assert_close(y.double(), by_pytorch(layer, x), rtol=exact, atol=min(exact, 2e-6))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ACTIVATIONS)
@torch.no_grad()
def test_an_activation_of_a_few_tokens_is_right(name: str, dtype: torch.dtype) -> None:
    # PyTorch's 1 + tanh cancels at -4: times a large value behind a gate, that would be seen.
    most = 1.0 if name == "geglu" else min(1e18, torch.finfo(dtype).max ** 0.5)
    ranges = torch.linspace(-100, 100, 999), torch.linspace(-4, 4, 999), torch.tensor([-most, most])
    x = torch.cat(ranges).to(dtype)
    assert native.can_compute(x)
    exact = FLOATS[dtype]
    torch.testing.assert_close(
        mlp(name).activate(x).double(), ACTIVATION[name](x.double()), rtol=exact, atol=exact
    )


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_row_has_the_same_bits_alone_and_among_others(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(native.MAX_STEP_TOKENS, WIDTH)
    together = layer(x)
    for i, row in enumerate(x):
        assert layer(row).equal(together[i])
        strided = torch.randn(2, WIDTH, 3)
        strided[1, :, 1] = row
        assert layer(strided[1, :, 1]).equal(together[i])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("two_threads")
@torch.no_grad()
def test_threads_share_a_layer_and_change_no_bit(bias: bool, served: list[str]) -> None:
    layer, x = linear(bias), torch.randn(3, 1, WIDTH)
    by_two = layer(x)
    assert "MAX_THREADS" in served  # two were asked for
    torch.set_num_threads(1)
    served.clear()
    assert layer(x).equal(by_two)
    assert served == ["product"]


@pytest.mark.parametrize("name", [*LAYERS, *ACTIVATIONS])
@torch.no_grad()
def test_nan_and_infinity_come_through(name: str) -> None:
    is_layer = name in LAYERS
    layer = LAYERS[name]() if is_layer else mlp(name).activate
    for bad in (float("nan"), float("inf")):
        x = torch.randn(1, WIDTH if is_layer else 32)
        x[0, 3] = bad
        assert not layer(x).isfinite().all()


@pytest.mark.parametrize("n_groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", ["none", "a run", "some", "first"])
@torch.no_grad()
def test_one_query_of_few_rows_attends_rightly(
    mask: str, dtype: torch.dtype, n_groups: int, served: list[str]
) -> None:
    q = torch.randn(2, 6, 1, 5, dtype=dtype)
    k, v = (torch.randn(2, n_groups, 40, 5, dtype=dtype)[:, :, 3:32] for _ in range(2))
    seen = {
        "none": None,
        "a run": (torch.arange(29) > 4) & (torch.arange(29) < 11),
        "some": torch.arange(29) % 3 == 0,
        "first": torch.arange(29) < 1,
    }[mask]
    seen = seen if seen is None else seen.expand(2, 1, 1, 29)
    y = DEFAULT.attention(q, k, v, seen, False)
    assert ("attend_columns" if mask == "some" else "attend") in served
    expected = reference_attention(q, k, v, seen, False)
    exact = FLOATS[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=exact, atol=min(exact, 1e-6))


@torch.no_grad()
def test_a_query_that_sees_nothing_is_nan() -> None:
    q, kv = torch.randn(1, 2, 1, 5), torch.randn(1, 2, 7, 5)
    nobody = torch.zeros(1, 1, 1, 7, dtype=torch.bool)
    assert DEFAULT.attention(q, kv, kv, nobody, False).isnan().all()


@torch.no_grad()
def test_a_key_far_below_the_others_has_no_weight() -> None:
    q = torch.ones(1, 1, 1, 4)
    k = torch.tensor([0.0, -500.0, 500.0]).view(1, 1, 3, 1).expand(1, 1, 3, 4)
    v = torch.tensor([5.0, 7.0, 9.0]).view(1, 1, 3, 1).expand(1, 1, 3, 4)
    assert DEFAULT.attention(q, k, v, None, False).unique().tolist() == [9.0]


def frozen() -> Linear:
    return linear()


def trained() -> Linear:
    return linear().requires_grad_(True)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (trained, torch.zeros(1, WIDTH)),
        (frozen, torch.zeros(1, WIDTH, requires_grad=True)),
        (lambda: frozen().to("meta"), torch.zeros(1, WIDTH, device="meta")),
    ],
    ids=["weights with gradients", "an input with gradients", "meta device"],
)
def test_what_native_code_cannot_do_is_left_to_pytorch(
    layer: Callable[[], Linear], x: Tensor, served: list[str]
) -> None:
    y = layer()(x)
    assert not served
    assert (y.dtype, y.device) == (x.dtype, x.device)


def test_gradients_of_one_token_are_those_of_pytorch() -> None:
    layer, x = trained(), torch.randn(1, WIDTH, requires_grad=True)
    layer(x).square().sum().backward()
    expected = (2 * by_pytorch(layer, x) @ layer.weight.double()).float()
    torch.testing.assert_close(x.grad, expected)


@torch.no_grad()
def test_who_watches_what_pytorch_does_misses_nothing(served: list[str]) -> None:
    with FlopCounterMode(display=False) as counter:
        frozen()(torch.zeros(1, WIDTH))
    assert counter.get_total_flops() == 2 * WIDTH * 53
    assert not served


@torch.no_grad()
def test_without_numba_everything_is_done_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = linear(), torch.randn(1, WIDTH)
    with_numba = layer(x)
    monkeypatch.setitem(sys.modules, "kvtool.core.native.compiled.attention", None)
    monkeypatch.setattr(native, "layer_code", native.layer_code.__wrapped__)
    assert not native.can_compute(x)
    torch.testing.assert_close(layer(x), with_numba)


@torch.no_grad()
def test_sizes_that_do_not_fit_are_refused() -> None:
    for layer in (linear(), norm(LayerNorm), norm(RMSNorm)):
        with pytest.raises(RuntimeError, match=r"cannot be multiplied|normalized_shape"):
            layer(torch.randn(1, WIDTH + 1))
    short = linear()
    short.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="53 outputs have a bias of shape"):
        short(torch.randn(1, WIDTH))
    with pytest.raises(ValueError, match="37 inputs was given"):
        linear().on_arrays()(torch.randn(1, 8).numpy())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func.jvp itself
@torch.no_grad()
def test_functions_of_torch_that_follow_what_is_computed_are_not_passed_over() -> None:
    layer, x, t = linear(), torch.randn(1, WIDTH), torch.randn(1, WIDTH)
    expected = t @ layer.weight.mT
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (t,))[1], expected)
    with torch.enable_grad(), forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, t))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16


@torch.no_grad()
def test_no_tokens_and_no_keys_are_no_fault() -> None:
    assert linear()(torch.empty(0, 1, WIDTH)).shape == (0, 1, 53)
    q, none = torch.randn(1, 2, 1, 5), torch.empty(1, 2, 0, 5)
    assert DEFAULT.attention(q, none, none, None, False).shape == q.shape


@torch.no_grad()
def test_numba_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(native.loaded().product, "load", fails)
    monkeypatch.setattr(native, "layer_code", native.layer_code.__wrapped__)
    assert not native.can_compute(torch.randn(1, WIDTH))


@torch.no_grad()
def test_a_command_that_decodes_little_does_not_load_it() -> None:
    x = torch.randn(1, WIDTH)
    with native.native_if_worthwhile(native.MIN_DECODED - 1):
        assert not native.can_compute(x)
    with native.native_if_worthwhile(native.MIN_DECODED):
        assert native.can_compute(x)
    assert native.can_compute(x)


def test_a_layer_that_was_compiled_is_called_as_compiled() -> None:
    layer = Linear(4, 4)
    layer.compile(backend=lambda graph, _: lambda *given: (graph(*given)[0] + 1,))
    x = torch.rand(2, 4)
    assert layer(x).equal(layer.forward(x) + 1)


def test_hooks_on_a_layer_are_called() -> None:
    model, called = random_model(0), []
    head = model.get_submodule("head")
    handles = [
        head.register_forward_pre_hook(lambda *_: called.append("before")),
        head.register_forward_hook(lambda *_: called.append("after")),
        model.get_submodule("norm").register_full_backward_pre_hook(
            lambda *_: called.append("backward before")
        ),
        model.get_submodule("layers.0.mlp").register_full_backward_hook(
            lambda *_: called.append("backward after")
        ),
    ]
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert called == ["before", "after", "backward before", "backward after"]
    for handle in handles:
        handle.remove()
    model(torch.tensor([[1, 2, 3]])).sum().backward()


def test_the_exponential_is_exact_to_rounding_and_ends_in_0_and_infinity() -> None:
    x = torch.cat([torch.linspace(-87, 88, 100_001), torch.linspace(-1, 1, 10_001)])
    y, exponential = x.numpy().copy(), native.loaded().exponential
    compiled = numba.njit(lambda numbers: exponential(numbers))
    compiled(y)
    # An argument of 88 is rounded to 4e-6.
    torch.testing.assert_close(torch.from_numpy(y).double(), x.double().exp(), rtol=8e-6, atol=0)
    ends = torch.tensor([-torch.inf, -1e30, -90.0, 90.0, 1e30, torch.inf, torch.nan]).numpy()
    compiled(ends)
    assert str(ends.tolist()) == "[0.0, 0.0, 0.0, inf, inf, inf, nan]"


def test_loading_and_sharing_leave_pytorch_its_number_of_threads() -> None:
    code = (
        "import torch; torch.set_num_threads(1); from kvtool.core.native import arrays as native\n"
        "native.layer_code(torch.float32); native.MIN_SHARED = 1\n"
        "seen = [torch.get_num_threads()]\n"
        "layer = native.linear(native.Weights.of(torch.ones(8, 8), None))\n"
        "for n in (2, 1, 2): torch.set_num_threads(n); layer(torch.ones(1, 8).numpy());"
        " seen.append(torch.get_num_threads())\n"
        "print(*seen)"
    )
    env = {**os.environ, "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.stdout.split() == ["1", "2", "1", "2"], ran.stderr
