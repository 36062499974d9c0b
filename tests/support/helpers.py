"""What the tests of caches share: tiny subjects in float64, and a check for each promise.

A check raises AssertionError where a cache breaks its promise, beginning with the number that
docs/extending.md gives it. test_cache_contract.py runs the checks over every registered kind, and
test_cache_controls.py over broken ones, which they must catch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.cache import Cache, CacheSpec, Step
from kvtool.core.cache.quantization import Quantization
from kvtool.core.decoding.engine import feed
from kvtool.core.models import Model
from small_models import random_model

Make = Callable[[CacheSpec, "Tensor | None"], Cache]
# In float64 a right cache leaves about 1e-15, and the mildest planted bug 1e-3.
TOLERANCE = 1e-12
VOCAB = 23


@dataclass(frozen=True)
class Case:
    """A model's shape and a batch; `padding` counts the padding in front of each row."""

    positions: str
    n_kv_heads: int
    batch: int
    padding: tuple[int, ...] = ()

    def __str__(self) -> str:
        padded = f"-padded{''.join(map(str, self.padding))}" if self.padding else ""
        return f"{self.positions}-kv{self.n_kv_heads}-batch{self.batch}{padded}"


# A cache sees heads, rows and padding, not how a model uses positions. Wrong ones of a padded row
# show where they are added; rotated keys tell only how far apart they are.
CASES = (
    Case("sinusoidal", 4, 2),
    Case("learned", 2, 3, (2, 0, 5)),
    Case("rotary", 1, 1),
)
PLAIN, PADDED = CASES[0], Case("rotary", 2, 3, (2, 0, 5))


@functools.cache
def shared_model(positions: str, n_kv_heads: int) -> tuple[Model, Tensor]:
    """One model for all who ask, since nobody changes its weights, and the state of torch's
    generator when it was drawn."""
    sizes = {"vocab_size": VOCAB, "context": 256}
    model = random_model(0, torch.float64, positions=positions, n_kv_heads=n_kv_heads, **sizes)
    return model, torch.get_rng_state()


class Subject:
    """A random decoder of two layers and four heads, random tokens, and their padding."""

    def __init__(self, case: Case, n: int = 12) -> None:
        self.model, drawn = shared_model(case.positions, case.n_kv_heads)
        torch.set_rng_state(drawn)
        self.ids = tokens(case.batch, n, 1)
        self.padding = torch.tensor(case.padding) if case.padding else None

    def cache(self, make: Make, capacity: int = 0) -> Cache:
        """An empty cache that the tokens just fill, or a larger one."""
        batch, n = self.ids.shape
        spec = CacheSpec.of(self.model.config, batch, capacity or n, torch.float64)
        return make(spec, self.padding)

    def filled(self, make: Make, length: int, capacity: int = 0) -> Cache:
        """A cache that holds the first tokens, fed in two steps."""
        cache = self.cache(make, capacity)
        advance(self.model, cache, self.ids[:, :length], length - length // 3)
        return cache


def tokens(batch: int, n: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full(
    model: Model,
    ids: Tensor,
    padding: Tensor | None,
    window: int = 0,
    sinks: int = 0,
    quantization: Quantization | None = None,
) -> Tensor:
    """The logits (B,T,V) of one pass over everything; no cache is involved."""
    step = Step.full(
        *ids.shape, left_padding=padding, window=window, sinks=sinks, quantization=quantization
    )
    return model(ids, step)


@torch.no_grad()
def advance(model: Model, cache: Cache, ids: Tensor, chunk: int | Sequence[int]) -> Tensor:
    """Feed what of `ids` (B,n) the cache does not hold yet, `chunk` tokens at a time or up to each
    of the given ends -> the logits (B,new,V)."""
    n = ids.shape[1]
    ends = [*range(cache.length, n, chunk), n][1:] if isinstance(chunk, int) else chunk
    found = []
    for end in ends:
        held = cache.length
        # A kind that recomputes answers with all tokens: the new ones are the last.
        found.append(feed(model, cache, ids[:, :end])[:, held - end :])
    return torch.cat(found, dim=1)


def agree(
    promise: str,
    subject: Subject,
    cache: Cache,
    ids: Tensor,
    padding: Tensor | None,
    chunk: int | Sequence[int] = 1,
    held: int = 0,
) -> None:
    """Feed `ids` to a cache that should hold the first `held` of them, and compare the logits of
    real tokens with those of one full pass under the same window, that quantizes the same way."""
    require(cache.length == held, f"{promise}: length is {cache.length}, not {held}")
    found = advance(subject.model, cache, ids, chunk)
    seen = (cache.window, cache.sinks, cache.quantization)
    expected = full(subject.model, ids, padding, *seen)[:, held:]
    shift = 0 if padding is None else padding[:, None]
    padded = (torch.arange(held, ids.shape[1]) - shift < 0).expand(expected.shape[:2])
    difference = (found - expected).masked_fill(padded[..., None], 0.0)
    gap = float(difference.abs().max() / expected.abs().max())
    require(gap < TOLERANCE, f"{promise}: the logits differ by {gap:.1e}")


def require(kept: bool, broken: str) -> None:
    """Not `assert`: pytest explains those of test files only, and this says more."""
    if not kept:
        raise AssertionError(broken)


def refuses(
    promise: str, error: type[Exception], call: Callable[..., object], *args: object
) -> Exception:
    """The error that `call(*args)` must raise."""
    try:
        call(*args)
    except error as found:
        return found
    except Exception as found:
        raise AssertionError(f"{promise}: raises {found!r}, not {error.__name__}") from found
    raise AssertionError(f"{promise}: nothing is raised")


class Broken(RuntimeError):
    """What a broken module raises."""


@contextmanager
def broken(module: nn.Module) -> Iterator[None]:
    """The module raises when it is called."""

    def fail(*_: object) -> None:
        raise Broken

    module.forward = fail
    try:
        yield
    finally:
        del module.forward


def break_off(subject: Subject, cache: Cache, ids: Tensor, module: nn.Module) -> None:
    """A forward pass over `ids` that raises when it reaches `module`."""
    with torch.no_grad(), broken(module):
        refuses("a broken model", Broken, feed, subject.model, cache, ids)


def owned(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that can be reached through the attributes of an object, each once."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    inside = thing.values() if isinstance(thing, Mapping) else getattr(thing, "__dict__", {})
    inside = inside.values() if isinstance(inside, Mapping) else inside
    for part in thing if isinstance(thing, (list, tuple, set)) else inside:
        if not isinstance(part, (type, str)):
            yield from owned(part, seen)


def options(make: Make) -> dict[str, Any]:
    """The options that a `functools.partial` gives to a kind."""
    return getattr(make, "keywords", {})


def storage_nbytes(cache: Cache) -> int:
    """Bytes of the storages that a cache owns; views of one storage count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in owned(cache)}
    return sum(storages.values())


def addresses(cache: Cache) -> list[int]:
    """Where the keys and values of a cache are."""
    return [t.data_ptr() for t in owned(cache) if t.is_floating_point()]


@torch.no_grad()
def write(cache: Cache, n: int, value: float = 0.0, commit: bool = True) -> None:
    """Put `n` tokens of keys and values that are all `value` into every layer."""
    step = cache.begin(n)
    s = cache.spec
    held = torch.full((cache.batch, s.n_kv_heads, n, s.head_dim), value, dtype=s.dtype)
    for layer in range(s.n_layers):
        cache.write(layer, held, held, step)
    if commit:
        cache.commit(n)


def compilations(subject: Subject, cache: Cache) -> int:
    """How often the model is compiled for one-token steps to the end, twice."""
    count = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    model = torch.compile(subject.model, backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        cache.reset()
        with torch.no_grad():
            feed(subject.model, cache, tokens(2, 5, 0))
            for _ in range(7):
                model(tokens(2, 1, 0), cache.begin(1), cache)
                cache.commit(1)
    return count
