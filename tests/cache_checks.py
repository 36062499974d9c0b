"""The promises of a cache, one function each, to run over any kind; an AssertionError is a breach.

The letters and numbers are those of the interface's invariants. Each check compares with a pass
over the whole sequence that has no cache at all, in float64, where only rounding may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvtool.core.cache import Cache, CacheSpec, Step
from kvtool.core.engine import feed
from kvtool.core.models import Model
from kvtool.errors import CacheOpUnsupported, CapacityError, UsageError

Make = Callable[[CacheSpec, Tensor | None], Cache]

LENGTH = 80  # tokens: more than the 64 columns that dynamic starts with and static reads at once
ROUNDING = 1e-11
SYNCS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
}


def spec_for(model: Model, batch: int, capacity: int = LENGTH) -> CacheSpec:
    return CacheSpec.of(model.config, batch, capacity, torch.float64)


def tokens(model: Model, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, LENGTH), generator=generator)


def whole(model: Model, ids: Tensor, padding: Tensor | None = None) -> Tensor:
    """Logits (B,T,V) of one pass without a cache."""
    return model(ids, Step.full(*ids.shape, left_padding=padding))


def advance(model: Model, cache: Cache, ids: Tensor, ends: Sequence[int]) -> Tensor:
    """Feed `ids` (B,T) up to each of `ends` in turn -> logits of all tokens fed here."""
    found = []
    for end in ends:
        n_new = end - cache.length
        found.append(feed(model, cache, ids[:, :end])[:, -n_new:])
    return torch.cat(found, dim=1)


def assert_same(found: Tensor, expected: Tensor, padding: Tensor | None = None) -> None:
    """Equal up to rounding wherever there is no padding."""
    difference = (found - expected).abs().amax(-1)  # (B,T)
    if padding is not None:
        skipped = expected.shape[1] - difference.shape[1]
        columns = torch.arange(difference.shape[1]) + skipped
        difference = difference.masked_fill(columns < padding[:, None], 0.0)
    worst = float(difference.max())
    assert worst < ROUNDING * float(expected.abs().max()), worst


def owned(value: Any) -> Iterator[Tensor]:
    """Every tensor that an object holds, in lists and other objects too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from owned(item)
    elif isinstance(value, dict):
        yield from owned(list(value.values()))


def owned_by(cache: Cache) -> list[Tensor]:
    return list(owned(vars(cache)))


def check_parity(make: Make, model: Model, padding: Tensor | None = None) -> None:
    """I1: any split of a sequence into steps gives the logits of one pass."""
    ids = tokens(model, 2)
    expected = whole(model, ids, padding)
    generator = torch.Generator().manual_seed(1)
    random_ends = torch.randperm(LENGTH - 1, generator=generator)[:9].add(1).sort().values.tolist()
    singly = [*range(1, 9), 60, *range(61, 70), LENGTH]
    for ends in ([LENGTH], singly, random_ends):
        cache = make(spec_for(model, 2), padding)
        found = advance(model, cache, ids, ends)
        assert cache.length == ends[-1]
        assert_same(found, expected[:, : ends[-1]], padding)


def check_positions(make: Make, model: Model) -> None:
    """I2: a stored column holds the key and value of its position, and a position stands once."""
    ids = tokens(model, 2)
    cache = make(spec_for(model, 2), None)
    given: list[tuple[int, Tensor, Tensor]] = []
    write = cache.write

    def recording(layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        given.append((layer, k.clone(), v.clone()))
        return write(layer, k, v, step)

    cache.write = recording  # type: ignore[method-assign]
    advance(model, cache, ids, [7, 8, 9, 40, 70, LENGTH])
    for layer in range(model.config.n_layers):
        right_k = torch.cat([k for i, k, _ in given if i == layer], dim=2)
        right_v = torch.cat([v for i, _, v in given if i == layer], dim=2)
        keys, values, positions = cache.snapshot(layer)
        assert positions.sort(dim=1).values.equal(torch.arange(LENGTH).expand(2, LENGTH))
        columns = positions[0]
        assert keys.equal(right_k[:, :, columns])
        assert values.equal(right_v[:, :, columns])


def check_no_leak(make: Make, model: Model) -> None:
    """I3: whatever stands in unused columns changes nothing."""
    ids = tokens(model, 2)
    cache = make(spec_for(model, 2), None)
    for tensor in owned_by(cache):
        if tensor.is_floating_point():
            tensor.fill_(1e30)
    assert_same(advance(model, cache, ids, [3, 4, 5, 30]), whole(model, ids[:, :30]))


def check_atomic(make: Make, model: Model) -> None:
    """I4: a forward pass that raises before commit leaves everything as if it had not run."""
    ids, other = tokens(model, 2), tokens(model, 2, seed=7)
    cache = make(spec_for(model, 2), None)
    advance(model, cache, ids, [10])
    attend = cache.attend

    def failing(layer: int, *rest: Any) -> Tensor:
        if layer == 1:
            raise RuntimeError("planted")
        return attend(layer, *rest)

    cache.attend = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="planted"):
        feed(model, cache, torch.cat([ids[:, :10], other[:, 10:70]], dim=1))
    cache.attend = attend  # type: ignore[method-assign]
    assert cache.length == 10
    assert_same(advance(model, cache, ids, [11, 12, LENGTH])[:, :2], whole(model, ids)[:, 10:12])


def check_crop(make: Make, model: Model, padding: Tensor | None = None) -> None:
    """I5: crop and going on equals never having gone past; beyond the end it raises."""
    ids = tokens(model, 2)
    wrong = torch.cat([ids[:, :20], tokens(model, 2, seed=7)[:, 20:]], dim=1)
    cache = make(spec_for(model, 2), padding)
    advance(model, cache, wrong, [15, 70])
    for length in (cache.length + 1, -1):
        with pytest.raises(UsageError):
            cache.crop(length)
    cache.crop(20)
    assert cache.length == 20
    found = advance(model, cache, ids, [21, 22, LENGTH])
    assert_same(found, whole(model, ids, padding)[:, 20:], padding)


def check_select(make: Make, model: Model, rows: list[int], padding: Tensor | None = None) -> None:
    """I6: select and going on equals going on from those rows' own histories."""
    ids = tokens(model, 3)
    cache = make(spec_for(model, 3), padding)
    advance(model, cache, ids, [9, 10, 30])
    picked = torch.tensor(rows)
    ids = torch.cat([ids[picked, :30], tokens(model, len(rows), seed=7)[:, 30:]], dim=1)
    padding = None if padding is None else padding[picked]
    cache.select(picked)
    found = advance(model, cache, ids, [31, 32, LENGTH])
    assert_same(found, whole(model, ids, padding)[:, 30:], padding)


def check_reset(make: Make, model: Model) -> None:
    """I7: reset and reuse equals a fresh cache, in the same memory."""
    cache = make(spec_for(model, 2), None)
    advance(model, cache, tokens(model, 2, seed=7), [LENGTH])
    before = [tensor.data_ptr() for tensor in owned_by(cache)]
    cache.reset()
    assert cache.length == 0
    ids = tokens(model, 2)
    assert_same(advance(model, cache, ids, [4, 5, LENGTH]), whole(model, ids))
    assert [tensor.data_ptr() for tensor in owned_by(cache)] == before


class NoSync(TorchDispatchMode):
    """Refuses operations that make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name().split(".")[0] not in SYNCS, func.name()
        return func(*args, **(kwargs or {}))


def check_compilable(make: Make, model: Model) -> None:
    """I8: write and attend never wait for the device, and no buffer ever moves."""
    ids = tokens(model, 2)
    cache = make(spec_for(model, 2), None)
    before = [tensor.data_ptr() for tensor in owned_by(cache)]
    for end in (6, 7, 8, 70, 71):
        step = cache.begin(end - cache.length)
        with NoSync():
            model(ids[:, cache.length : end], step, cache)
        cache.commit(end - cache.length)
    assert [tensor.data_ptr() for tensor in owned_by(cache)] == before


def check_bytes(make: Make, model: Model, padding: Tensor | None = None) -> None:
    """I14: nbytes is what the owned storages sum to; live fits in it; the prediction is right."""
    ids = tokens(model, 2)
    for prompt, length in ((1, 5), (1, 66), (70, 79)):
        spec = spec_for(model, 2)
        cache = make(spec, padding)
        advance(model, cache, ids, [prompt, *range(prompt + 1, length + 1)])
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in owned_by(cache)}
        found = cache.nbytes()
        assert found.allocated == sum(storage.nbytes() for storage in storages.values())
        assert 0 <= found.live <= found.allocated
        assert found.overhead == found.allocated - found.live
        extra = 0 if padding is None else padding.untyped_storage().nbytes()
        assert type(cache).predict_nbytes(spec, length, prompt) == found.allocated - extra
        if not cache.recompute:
            assert found.live == length * spec.token_nbytes


def check_capacity(make: Make, model: Model) -> None:
    """A token too many is refused before anything is written, and nothing is lost."""
    ids = tokens(model, 1)
    cache = make(spec_for(model, 1, capacity=16), None)
    advance(model, cache, ids, [10, 16])
    with pytest.raises(CapacityError, match="16"):
        feed(model, cache, ids[:, :17])
    cache.crop(15)
    assert_same(advance(model, cache, ids, [16]), whole(model, ids[:, :16])[:, 15:])


def refuses(kind: str, operation: Callable[[], object]) -> None:
    """I13: what cannot be done is said, with the kind, the operation and what to do instead."""
    with pytest.raises(CacheOpUnsupported) as caught:
        operation()
    assert (caught.value.kind, bool(caught.value.op), bool(caught.value.hint)) == (kind, True, True)
