"""A model in float64 whose weights are widened as they are read, in place of a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kvtool.core.cache import CacheSpec
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.decoding.engine import feed
from kvtool.core.verify import widened
from kvtool.core.verify.widened import Room, twin
from small_models import random_model
from verify_subjects import MODELS

DECODERS = {name: changes for name, changes in MODELS.items() if "n_encoder_layers" not in changes}


@pytest.fixture(autouse=True)
def _no_weight_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "SMALL", 30)


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
    small = sum(n for n in sizes if n <= widened.SMALL)
    assert 0 < room.nbytes <= 8 * (max(sizes) + small)
    assert room.n_widened == sum(n > widened.SMALL for n in sizes)  # each was, and once
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

    monkeypatch.setattr(Tensor, "copy_", breaks)
    with pytest.raises(MemoryError):
        _ = wide.a.weight
    monkeypatch.undo()
    assert torch.equal(wide.a.weight, model.a.weight.double())
