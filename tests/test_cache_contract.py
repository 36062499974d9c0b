"""Every registered kind of cache keeps every promise, and a cache that breaks one is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cache_checks as checks
from kvtool.core.cache import CacheSpec, Step, cache_class, make_cache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.models import Model
from kvtool.registry import CACHES
from planted_bugs import MUTANTS
from small_models import random_model

KINDS = list(CACHES)
STORING = [kind for kind in KINDS if not cache_class(kind).recompute]
RECOMPUTING = [kind for kind in KINDS if cache_class(kind).recompute]
COMPILABLE = [kind for kind in KINDS if cache_class(kind).compilable]
PADDING = torch.tensor([0, 3])
PADDING_3 = torch.tensor([2, 0, 5])

MODELS: dict[str, dict[str, Any]] = {
    "sinusoidal": {},
    "learned positions, relu": {"positions": "learned", "activation": "relu", "bias": False},
    "rotary, grouped heads, RMSNorm, SwiGLU": {
        "positions": "rotary",
        "n_kv_heads": 2,
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tied": False,
    },
}


def model_of(name: str = "sinusoidal") -> Model:
    return random_model(3, torch.float64, context=checks.LENGTH + 8, **MODELS[name])


def maker(kind: str) -> checks.Make:
    return lambda spec, padding: make_cache(kind, spec, padding)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("padding", [None, PADDING], ids=["", "left padding"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_i1_any_split_into_steps_equals_one_pass(
    kind: str, name: str, padding: Tensor | None
) -> None:
    checks.check_parity(maker(kind), model_of(name), padding)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", STORING)
def test_i2_a_column_holds_what_was_written_for_its_position(kind: str, name: str) -> None:
    checks.check_positions(maker(kind), model_of(name))


@pytest.mark.parametrize("kind", KINDS)
def test_i3_unused_columns_change_nothing(kind: str) -> None:
    checks.check_no_leak(maker(kind), model_of())


@pytest.mark.parametrize("kind", KINDS)
def test_i4_a_pass_that_raises_leaves_no_trace(kind: str) -> None:
    checks.check_atomic(maker(kind), model_of())


@pytest.mark.parametrize("padding", [None, PADDING], ids=["", "left padding"])
@pytest.mark.parametrize("kind", KINDS)
def test_i5_cropping_takes_back_what_came_after(kind: str, padding: Tensor | None) -> None:
    checks.check_crop(maker(kind), model_of(), padding)


@pytest.mark.parametrize("padding", [None, PADDING_3], ids=["", "left padding"])
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [2], [0, 2]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_i6_selected_rows_go_on_from_their_own_histories(
    kind: str, rows: list[int], padding: Tensor | None
) -> None:
    checks.check_select(maker(kind), model_of(), rows, padding)


@pytest.mark.parametrize("kind", KINDS)
def test_i6_more_rows_than_before_go_on_or_are_refused(kind: str) -> None:
    rows = [0, 1, 2, 2, 1]
    if kind == "static":
        cache = make_cache(kind, checks.spec_for(model_of(), 3))
        checks.refuses(kind, lambda: cache.select(torch.tensor(rows)))
    else:
        checks.check_select(maker(kind), model_of(), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_i7_a_reset_cache_equals_a_fresh_one_in_the_same_memory(kind: str) -> None:
    checks.check_reset(maker(kind), model_of())


@pytest.mark.parametrize("kind", STORING)
def test_i7_reset_brings_back_rows_that_select_dropped(kind: str) -> None:
    model = model_of()
    cache = make_cache(kind, checks.spec_for(model, 3))
    ids = checks.tokens(model, 3)
    checks.advance(model, cache, ids, [10])
    cache.select(torch.tensor([1]))
    cache.reset()
    found = checks.advance(model, cache, ids, [5, 6, 70])
    checks.assert_same(found, checks.whole(model, ids[:, :70]))


@pytest.mark.parametrize("kind", COMPILABLE)
def test_i8_a_compilable_kind_never_syncs_and_never_moves(kind: str) -> None:
    checks.check_compilable(maker(kind), model_of())


@pytest.mark.parametrize("kind", KINDS)
def test_i9_bytes_scale_with_the_key_value_heads(kind: str) -> None:
    sizes = []
    for n_kv_heads in (1, 2, 4):
        model = random_model(3, torch.float64, context=checks.LENGTH + 8, n_kv_heads=n_kv_heads)
        cache = make_cache(kind, checks.spec_for(model, 2))
        checks.advance(model, cache, checks.tokens(model, 2), [70])
        found = cache.nbytes()
        sizes.append((found.allocated, found.live, found.read_per_step))
    assert sizes[1] == tuple(2 * size for size in sizes[0])
    assert sizes[2] == tuple(4 * size for size in sizes[0])


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_i13_a_kind_that_stores_nothing_says_so(kind: str) -> None:
    cache = make_cache(kind, checks.spec_for(model_of(), 1))
    checks.refuses(kind, lambda: cache.snapshot(0))


@pytest.mark.parametrize("kind", KINDS)
def test_i14_the_bytes_are_those_of_the_storages(kind: str) -> None:
    checks.check_bytes(maker(kind), model_of())


@pytest.mark.parametrize("kind", STORING)
def test_i14_left_padding_is_counted(kind: str) -> None:
    checks.check_bytes(maker(kind), model_of(), PADDING)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_cache_refuses_a_token_and_loses_none(kind: str) -> None:
    checks.check_capacity(maker(kind), model_of())


# --- the checks themselves: each must catch a cache that breaks its promise


class Duplicate(DynamicCache):
    """Stores every chunk's first key in the chunk's last column too."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        found = super().write(layer, k, v, step)
        self._keys[layer][:, :, step.slots[-1]] = k[:, :, 0]
        return found


class CommitsEarly(DynamicCache):
    def begin(self, n_new: int) -> Step:
        step = super().begin(n_new)
        self.length += n_new
        return step

    def commit(self, n_new: int) -> None:
        pass


class CropsNothing(DynamicCache):
    def crop(self, length: int) -> None:
        if not 0 <= length <= self.length:
            super().crop(length)


class CropsTheCountAlone(StaticCache):
    """Keeps showing what was cropped."""

    def _reach(self, length: int) -> int:
        return self.spec.capacity

    def _place(self, start: int, n_new: int) -> Step:
        step = super()._place(start, n_new)
        return Step(step.q_pos, step.k_pos, step.slots, torch.ones_like(step.mask), False)


class SelectsNothing(DynamicCache):
    def select(self, rows: Tensor) -> None:
        self.batch = rows.shape[0]


class ResetsIntoNewMemory(DynamicCache):
    def reset(self, left_padding: Tensor | None = None) -> None:
        super().reset(left_padding)
        self._keys = [k.clone() for k in self._keys]


class ReadsTheLength(StaticCache):
    """Asks the device how far it is, at every layer of every step."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        assert int(step.slots[-1]) >= 0
        return super().write(layer, k, v, step)


class CountsHalf(DynamicCache):
    def nbytes(self) -> Any:
        found = super().nbytes()
        return found._replace(allocated=found.allocated // 2)


class NoLimit(StaticCache):
    """Moves the last column on when it is full, and says nothing."""

    def begin(self, n_new: int) -> Step:
        if self.length + n_new <= self.spec.capacity:
            return super().begin(n_new)
        return self._place(self.spec.capacity - n_new, n_new)


CONTROLS: dict[str, tuple[Callable[..., None], Any, tuple[Any, ...]]] = {
    "I2": (checks.check_positions, Duplicate, ()),
    "I3": (checks.check_no_leak, CropsTheCountAlone, ()),
    "I4": (checks.check_atomic, CommitsEarly, ()),
    "I5": (checks.check_crop, CropsNothing, ()),
    "I6": (checks.check_select, SelectsNothing, ([2, 0, 1],)),
    "I7": (checks.check_reset, ResetsIntoNewMemory, ()),
    "I8": (checks.check_compilable, ReadsTheLength, ()),
    "I8, moving": (checks.check_compilable, DynamicCache, ()),
    "I14": (checks.check_bytes, CountsHalf, ()),
    "capacity": (checks.check_capacity, NoLimit, ()),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_broken_promise_is_caught(name: str) -> None:
    check, broken, more = CONTROLS[name]
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(broken, model_of(), *more)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_planted_bug_breaks_parity(name: str) -> None:
    mutant = MUTANTS[name][0]

    def make(spec: CacheSpec, padding: Tensor | None) -> Any:
        return mutant(spec, padding)

    with pytest.raises(AssertionError):
        checks.check_parity(make, model_of())
