"""Layers that see one token: the order of weights in memory, and the threads that share them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvtool.core import checkpoint, layers
from kvtool.core.layers import Linear, lay_out_for_decoding
from kvtool.core.safetensors_file import SafetensorsFile
from kvtool.core.text import Tokenizer
from small_models import random_model

WIDE = 24, 96  # in, out


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, for layers of any size."""
    monkeypatch.setattr(layers, "LARGE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def linear(n_in: int, n_out: int, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    layer = Linear(n_in, n_out, bias=bias).requires_grad_(False)
    if bias:
        layer.bias.normal_()
    return layer


def by_the_book(layer: Linear, x: Tensor) -> Tensor:
    y = x.double() @ layer.weight.double().mT
    return y if layer.bias is None else y + layer.bias.double()


def columns_first(layer: torch.nn.Module) -> bool:
    return layer.get_parameter("weight").stride(0) == 1


def test_weights_wider_than_high_are_stored_by_columns_and_keep_their_values() -> None:
    model = random_model(0)
    before = copy.deepcopy(model.state_dict())
    lay_out_for_decoding(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    block = model.get_submodule("layers.0")
    assert columns_first(block.get_submodule("mlp.up"))
    assert not columns_first(block.get_submodule("mlp.down"))


def test_a_tied_head_stays_tied() -> None:
    model = random_model(0, tied=True)
    lay_out_for_decoding(model)
    assert model.get_parameter("head.weight") is model.get_parameter("embed.tokens.weight")
    assert columns_first(model.get_submodule("head"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_as_they_are(dtype: torch.dtype) -> None:
    model = random_model(0, dtype)
    lay_out_for_decoding(model)
    assert not any(columns_first(m) for m in model.modules() if isinstance(m, Linear))


def test_a_loaded_checkpoint_is_laid_out_and_saved_as_it_was(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train("char", ["abc"])
    model = random_model(0, vocab_size=tokenizer.vocab_size)
    cpu = torch.device("cpu")
    first = checkpoint.save(tmp_path / "a", model, tokenizer)
    loaded = checkpoint.load(str(tmp_path / "a"), cpu, torch.float32)
    assert columns_first(loaded.model.get_submodule("layers.0.mlp.up"))
    assert checkpoint.save(tmp_path / "b", loaded.model, tokenizer) == first


def test_weights_are_not_held_as_they_were_read_while_they_are_laid_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a wide model would take nearly twice its memory for a moment."""
    tokenizer = Tokenizer.train("char", ["abc"])
    checkpoint.save(tmp_path, random_model(0, vocab_size=tokenizer.vocab_size), tokenizer)
    read: list[weakref.ref[Tensor]] = []
    held: list[bool] = []
    real = SafetensorsFile.read

    def read_and_watch(self: SafetensorsFile) -> tuple[dict[str, Tensor], str]:
        weights, sha256 = real(self)
        read.extend(map(weakref.ref, weights.values()))
        return weights, sha256

    def lay_out(model: torch.nn.Module) -> None:
        held.extend(tensor() is not None for tensor in read)

    monkeypatch.setattr(SafetensorsFile, "read", read_and_watch)
    monkeypatch.setattr(checkpoint, "lay_out_for_decoding", lay_out)
    checkpoint.load(str(tmp_path), torch.device("cpu"), torch.float32)
    assert len(held) > 10 and not any(held)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24)])
@pytest.mark.usefixtures("two_threads")
def test_one_token_is_shared_by_the_threads_and_right(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = linear(*WIDE, bias=bias)
    lay_out_for_decoding(layer)
    x = torch.randn(shape)
    called = []
    real = layers.by_threads
    monkeypatch.setattr(layers, "by_threads", lambda *a: called.append(a) or real(*a))
    y = layer(x)
    assert len(called) == 1
    assert y.shape == (*shape[:-1], WIDE[1])
    torch.testing.assert_close(y.double(), by_the_book(layer, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("why", ["several tokens", "rows first", "odd width", "one thread"])
@pytest.mark.usefixtures("two_threads")
def test_what_threads_cannot_share_is_right_too(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(24, 95 if why == "odd width" else 96)
    if why != "rows first":
        lay_out_for_decoding(layer)
    if why == "one thread":
        torch.set_num_threads(1)
    monkeypatch.setattr(layers, "by_threads", lambda *_: pytest.fail("shared"))
    x = torch.randn(3 if why == "several tokens" else 1, 1, 24)
    torch.testing.assert_close(layer(x).double(), by_the_book(layer, x), rtol=0, atol=1e-6)


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
    assert len(called) == 4
