"""A model in float64 whose weights are widened as they are read, in place of a copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvtool.core.cache import CacheSpec
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.decoding.engine import feed
from kvtool.core.verify import widened
from kvtool.core.verify.copies import converted
from kvtool.core.verify.copies import widened as widened_decoder
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.attributes import outermost
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.core.verify.widened import Room, twin
from small_models import random_model
from verify_subjects import MODELS

DECODERS = {name: changes for name, changes in MODELS.items() if "n_encoder_layers" not in changes}


@pytest.fixture(autouse=True)
def _no_weight_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "KEPT_NUMBERS", 30)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DECODERS)
def test_the_logits_are_those_of_a_copy_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype, **DECODERS[name])
    exact, wide = copy.deepcopy(model).double(), twin(model, Room())
    ids = torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(0))
    for n in (1, 3, 12):  # native code has few rows, PyTorch many
        assert torch.equal(wide(ids[:, :n]), exact(ids[:, :n]))
    spec = CacheSpec.of(model.config, 2, 12, torch.float64)
    caches = DynamicCache(spec), DynamicCache(spec)
    for n in (4, 5, 6, 12):
        found, right = (
            feed(m, cache, ids[:, :n]) for m, cache in zip((wide, exact), caches, strict=True)
        )
        assert torch.equal(found, right)


@torch.inference_mode()
def test_no_more_is_held_in_float64_than_the_largest_weight_and_the_small_ones():
    model = random_model(n_layers=5, d_ff=40, tied=False)
    room = Room()
    wide = twin(model, room)
    wide(torch.arange(20)[None])
    sizes = [weight.numel() for weight in model.parameters()]
    small = sum(n for n in sizes if n <= widened.KEPT_NUMBERS)
    assert 0 < room.nbytes <= 8 * (max(sizes) + small)
    assert room.n_widened == sum(n > widened.KEPT_NUMBERS for n in sizes)  # each was, and once
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert all(a is b for a, b in zip(wide.parameters(), model.parameters(), strict=True))


class Two(nn.Module):
    """Reads two weights before it uses either."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a.weight.T, self.b.weight.T
        return x @ a + 2 * (x @ b)


@torch.inference_mode()
def test_two_weights_that_are_read_at_once_do_not_share_memory():
    torch.manual_seed(0)
    model, room = Two(), Room()
    x = torch.randn(3, 8, dtype=torch.float64)
    wide, exact = twin(model, room), copy.deepcopy(model).double()
    for _ in range(2):
        assert torch.equal(wide(x), exact(x))
    assert room.nbytes == 2 * 64 * 8


@torch.inference_mode()
def test_of_an_embedding_the_rows_that_are_read_are_widened():
    table, room = nn.Embedding(50, 8).bfloat16(), Room()
    wide = twin(nn.Sequential(table), room)
    ids = torch.tensor([[3, 1]])
    assert torch.equal(wide(ids), table(ids).double())
    assert room.nbytes == 0


@torch.inference_mode()
def test_a_weight_that_is_widened_when_memory_is_gone_is_not_taken_for_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Two()
    room = Room()
    wide = twin(model, room)
    right = Tensor.copy_

    def breaks(self: Tensor, other: Tensor) -> Tensor:
        right(self[:1], other[:1])
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", breaks)
        with pytest.raises(MemoryError):
            _ = wide.a.weight
    assert torch.equal(wide.a.weight, model.a.weight.double())


class Tables:
    """A decoder of the protocol that holds a module, a plain table and the name of its format."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.table = torch.randn(11, 8)
        self.format = torch.float32
        self.head = nn.Linear(8, 11)
        self.layers = [nn.Linear(8, 8) for _ in range(2)]

    def full(self, ids: Tensor) -> Tensor:
        x = self.table[ids].to(self.format).cumsum(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


@torch.inference_mode()
def test_what_a_decoder_holds_beside_its_weights_is_converted_and_they_are_not():
    decoder, room = Tables(), Room()
    wide = widened_decoder(decoder, room)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(wide.full(ids), converted(decoder, torch.float64).full(ids))
    assert wide.head.weight.dtype == wide.table.dtype == wide.format == torch.float64
    for module, own in zip((wide.head, *wide.layers), (decoder.head, *decoder.layers), strict=True):
        assert module._parameters["weight"] is own.weight and own.weight.dtype == torch.float32
    assert decoder.full(ids).dtype == torch.float32
    with pytest.raises(NotImplementedError):
        widened_decoder(object(), room)


class UserDecoder(nn.Module):
    """Sums what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def full(self, ids: Tensor) -> Tensor:
        return self.head(self.up(self.embed(ids).cumsum(1)))

    def step(self, ids: Tensor, state: Tensor | float | None) -> tuple[Tensor, Tensor]:
        x = self.embed(ids).cumsum(1) + (0.0 if state is None else state)
        return self.head(self.up(x)), x[:, -1:]


class HandsOver(UserDecoder):
    """Hands its weights over by another way than by their names."""

    def full(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.up(self.embed(ids).cumsum(1)), *self.head.parameters())


@pytest.mark.parametrize("make, widens", [(UserDecoder, True), (HandsOver, False)])
def test_a_users_decoder_is_widened_where_that_runs_and_copied_where_it_does_not(
    make: Any, widens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    subject = TargetSubject(make().eval(), "own", 11, 64)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        right = subject.to(torch.float64).full(ids, Start(1, 4))
        monkeypatch.setattr("kvtool.core.verify.target.subject.copy_crowds", lambda module: True)
        other = subject.to(torch.float64)
        assert torch.equal(other.full(ids, Start(1, 4)), right)
    weights = {id(weight) for m in outermost(subject.decoder) for weight in m.parameters()}
    held = {id(weight) for m in outermost(other.decoder) for weight in m.parameters()}
    assert (held == weights) is widens
