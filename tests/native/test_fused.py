"""What training does in compiled code, against PyTorch's way and against formulas in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import training_cases
from kvtool.core.kernels.default import DEFAULT, reference_attention
from kvtool.core.models.attention import merge_heads
from kvtool.core.models.layers import Dropout
from kvtool.core.native import context, fused
from training_cases import check_that_shares_drop_as_the_whole, outcome, stop_and_resume, train

EPS = {torch.float32: 5e-6, torch.bfloat16: 2**-7}  # of the largest; bfloat16 rounds to 2**-9
DTYPES = list(EPS)


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused, "MIN_NUMBERS", 0)
    with context.within(training=True):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of compiled code that were asked for."""
    found: list[str] = []
    for name in ("dropout", "attention"):
        function = getattr(fused, name)

        def call(*args: Any, name: str = name, function: Any = function) -> Any:
            found.append(name)
            return function(*args)

        monkeypatch.setattr(fused, name, call)
    return found


def close(found: Tensor, expected: Tensor, computed: torch.dtype) -> bool:
    bound = EPS[computed] * float(expected.detach().abs().max())
    return bool((found.double() - expected).abs().max() <= bound)


# Attention


def masks(batch: int, n: int, n_keys: int) -> dict[str, tuple[Tensor | None, bool]]:
    """As Kernels.attention takes them; each query sees a key."""
    padding = torch.arange(n_keys) < torch.randint(1, n_keys + 1, (batch, 1))
    some = torch.rand(batch, 1, n, n_keys) < 0.5
    some[..., 0] = True
    rows = {"all": (None, False), "padding": (padding[:, None, None], False), "some": (some, False)}
    return {**rows, "one for all": (some[:1], False), "causal": (None, True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", masks(1, 2, 2))
@pytest.mark.parametrize(
    ("n_heads", "n_groups", "n", "n_keys", "width"),
    [(8, 8, 8, 8, 32), (4, 2, 7, 7, 16), (6, 1, 3, 24, 48), (1, 1, 13, 1, 16)],
)
def test_attention_and_its_gradients_are_those_of_the_formula(
    dtype: torch.dtype, kind: str, n_heads: int, n_groups: int, n: int, n_keys: int, width: int,
    calls: list[str],
) -> None:  # fmt: skip
    torch.manual_seed(0)
    n = n_keys if kind == "causal" else n
    mask, causal = masks(5, n, n_keys)[kind]
    sizes = (n_heads, n), (n_groups, n_keys), (n_groups, n_keys)
    qkv = [torch.randn(5, *size, width).to(dtype).requires_grad_() for size in sizes]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    y, expected = DEFAULT.attention(*qkv, mask, causal), reference_attention(*exact, mask, causal)
    assert calls == ["attention"] and y.dtype is dtype and close(y, expected, dtype)
    dy = torch.randn(y.shape).to(dtype)
    found = torch.autograd.grad(y, qkv, dy)
    for grad, gradient in zip(found, torch.autograd.grad(expected, exact, dy), strict=True):
        assert grad.dtype is dtype and close(grad, gradient, dtype)


@pytest.mark.parametrize("widths", [[64, 64, 64], [64, 32, 32]], ids=["each", "groups"])
@pytest.mark.parametrize("spoiled", ["", "column", "row", "transposed"])
def test_parts_of_one_projection_get_their_gradients_in_it(widths: list[int], spoiled: str) -> None:
    """Joined where the parts are all there is of it, and right where they are not."""
    torch.manual_seed(0)
    x = 0.3 * torch.randn(3, 9, 16)
    weight = torch.randn(sum(widths) + (spoiled == "column"), 16, requires_grad=True)

    def loss() -> Tensor:
        y = nn.functional.linear(x, weight)
        if spoiled == "row":
            y = y[:2]
        if spoiled == "transposed":
            y = y.mT.contiguous().mT
        parts = y[..., : sum(widths)].split(widths, -1)
        heads = [part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in parts]
        return merge_heads(DEFAULT.attention(*heads, None, True)).square().mean()

    (found,) = torch.autograd.grad(loss(), weight)
    with context.within(training=False):
        (expected,) = torch.autograd.grad(loss(), weight)
    assert close(found, expected, torch.float32)


def test_keys_that_are_values_too_get_both_gradients() -> None:
    q, k = (torch.randn(2, 2, 4, 16, requires_grad=True) for _ in range(2))
    found = torch.autograd.grad(DEFAULT.attention(q, k, k, None, False).square().sum(), k)
    with context.within(training=False):
        expected = torch.autograd.grad(DEFAULT.attention(q, k, k, None, False).square().sum(), k)
    torch.testing.assert_close(found, expected)


def test_bfloat16_rounds_as_pytorch_does_and_keeps_nan_and_infinity() -> None:
    torch.manual_seed(0)
    x = torch.cat(
        [torch.randn(1000), torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3.4e38])]
    )
    halves = (torch.arange(1000, dtype=torch.int32) * 2**16 + 2**15).view(torch.float32)  # ties
    x = torch.cat([x, halves])[None].requires_grad_()
    y = fused.dropout(
        x.detach().bfloat16().requires_grad_(), None, fused.DropoutMask(0, -(2**31), 1.0)
    )
    assert y.isnan().equal(x.isnan()) and y[~y.isnan()].equal(x.bfloat16()[~y.isnan()])
    leaf = torch.zeros(1, x.shape[1], dtype=torch.bfloat16, requires_grad=True)
    onto = torch.zeros(1, x.shape[1])
    out = fused.dropout(leaf, onto, fused.DropoutMask(0, -(2**31), 1.0))
    (found,) = torch.autograd.grad(out, leaf, x.detach())  # float32 to bfloat16
    expected = x.detach().bfloat16()
    assert found.isnan().equal(expected.isnan())
    assert found[~found.isnan()].equal(expected[~expected.isnan()])


# Dropout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adds", [False, True])
def test_dropout_is_that_of_pytorchs_way(dtype: torch.dtype, adds: bool, calls: list[str]) -> None:
    torch.manual_seed(0)
    drop = Dropout(0.3).train()
    x = torch.randn(6, 5, 33).to(dtype).requires_grad_()
    onto = torch.randn(6, 5, 33, requires_grad=True) if adds else None
    given = [t for t in (x, onto) if t is not None]
    dy = torch.randn(6, 5, 33).to(torch.float32 if adds else dtype)

    def both() -> tuple[Tensor, tuple[Tensor, ...]]:
        torch.manual_seed(1)
        y = drop(x, onto) if adds else drop(x)
        return y, torch.autograd.grad(y, given, dy)

    y, grads = both()
    assert calls == ["dropout"]
    with context.within(training=False):
        expected, gradients = both()
    assert y.dtype is expected.dtype and close(y, expected, dtype)
    for found, gradient in zip(grads, gradients, strict=True):
        assert found.dtype is gradient.dtype and close(found, gradient, dtype)
        assert (found == 0).equal(gradient == 0)


def test_dropout_drops_as_many_as_it_should_and_never_the_same_twice() -> None:
    drop, x = Dropout(0.1).train(), torch.ones(100, 100, 50, requires_grad=True)
    first, second = (drop(x) == 0 for _ in range(2))
    for dropped in (first, second):
        assert dropped.float().mean() == pytest.approx(0.1, abs=0.002)  # 5 deviations
        for axis in range(3):  # neither are neighbours alike
            both = dropped & dropped.roll(1, axis)
            assert both.float().mean() == pytest.approx(0.01, abs=0.001)
    assert (first & second).float().mean() == pytest.approx(0.01, abs=0.001)


def test_a_share_drops_what_the_whole_batch_drops_in_its_rows() -> None:
    check_that_shares_drop_as_the_whole(torch.randn(7, 5, 3, requires_grad=True))


# When


@pytest.mark.parametrize("reason", ["evaluates", "is small", "has no gradients", "is float64"])
def test_pytorchs_way_is_taken_by_what(
    reason: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float64 if reason == "is float64" else torch.float32
    q = torch.randn(3, 2, 9, 16, dtype=dtype, requires_grad=True)
    if reason == "is small":
        monkeypatch.setattr(fused, "MIN_NUMBERS", q.numel() + 1)
    training = context.within(training=reason != "evaluates")
    with training, torch.set_grad_enabled(reason != "has no gradients"):
        DEFAULT.attention(q, q, q, None, False)
        Dropout(0.1).train()(q)
    assert not calls


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(Dropout(0.1).train()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_number_of_threads_changes_no_bits() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(7, 3, 9, 3 * 16, requires_grad=True)

    def work() -> list[Tensor]:
        torch.manual_seed(1)
        y = Dropout(0.2).train()(DEFAULT.attention(*qkv.chunk(3, -1), None, True))
        return [y, *torch.autograd.grad(y.square().sum(), qkv)]

    kept, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(work())
    finally:
        torch.set_num_threads(kept)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_a_run_learns_as_with_pytorchs_way_and_resumes_to_the_same_bytes(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch, amp: bool
) -> None:
    monkeypatch.setattr(training_cases, "model", partial(training_cases.model, d_model=32))
    train(tmp_path / "whole", amp=amp)
    assert {*calls} == {"dropout", "attention"}
    stop_and_resume(tmp_path / "stopped", 6, amp=amp)
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "stopped")
    with patch.object(fused, "MIN_NUMBERS", 2**30):
        train(tmp_path / "plain", amp=amp)
    found, expected = (
        [line["loss"] for line in outcome(tmp_path / name)["log"] if "loss" in line]
        for name in ("whole", "plain")
    )
    assert found == pytest.approx(expected, rel=2e-2 if amp else 1e-4) and len(found) > 1
