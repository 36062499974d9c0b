"""The contract catches caches that break it; and what each kind promises beyond it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import test_cache_contract as contract
from helpers import CASES, Make, Subject, addresses, agree, feed, owned, tokens, write
from kvtool.core.cache import Bytes, Cache, CacheSpec, Step, cache_class, make_cache
from kvtool.core.cache.base import EMPTY
from kvtool.core.cache.dynamic import GRAIN, DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.verify.mutants.mutant import Mutant
from kvtool.core.verify.mutants.quantized import QUANTIZED
from kvtool.errors import CacheOpUnsupported, CapacityError, UsageError
from planted_bugs import MUTANTS, WholeBuffer
from test_cache_contract import KINDS

PLAIN, PADDED = CASES[0], CASES[3]
SPEC = CacheSpec(2, 3, 2, 4, 200, torch.float64)


class StoresFirstKeyTwice(DynamicCache):
    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        found = super().write(layer, k, v, step)
        self._keys[layer][:, :, step.slots[-1]] = k[:, :, 0]
        return found


class ShowsItsOwnMemory(DynamicCache):
    def snapshot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        _, _, positions = super().snapshot(layer)
        keys, values = self._keys[layer], self._values[layer]
        return keys[:, :, : self.length], values[:, :, : self.length], positions


class CommitsEarly(DynamicCache):
    """Counts tokens when they are announced, not when all layers have them."""

    def begin(self, n_new: int) -> Step:
        step = super().begin(n_new)
        super().commit(n_new)
        return step

    def commit(self, n_new: int) -> None:
        pass


class CommitsAnything(DynamicCache):
    def commit(self, n_new: int) -> None:
        self.length += n_new


class CropsNothing(DynamicCache):
    def crop(self, length: int) -> None:
        pass


class CropsOneTooFew(DynamicCache):
    """Keeps the key of the first dropped token in the place of the last kept one."""

    def crop(self, length: int) -> None:
        super().crop(length)
        for keys in self._keys:
            keys[:, :, length - 1] = keys[:, :, length]


class SelectsNothing(DynamicCache):
    def select(self, rows: Tensor) -> None:
        self.batch = rows.shape[0]


class SelectsKeysOnly(StaticCache):
    def select(self, rows: Tensor) -> None:
        values = [v.clone() for v in self._values]
        super().select(rows)
        self._values = values


class SelectsRowsThatAreGone(StaticCache):
    """Takes rows that an earlier select has dropped."""

    def select(self, rows: Tensor) -> None:
        self.batch = self.spec.batch
        super().select(rows)


class ResetKeepsThePadding(DynamicCache):
    def reset(self, left_padding: Tensor | None = None) -> None:
        super().reset(getattr(self, "left_padding", left_padding))


class ResetsIntoNewMemory(DynamicCache):
    def reset(self, left_padding: Tensor | None = None) -> None:
        super().reset(left_padding)
        self._keys = [k.clone() for k in self._keys]


class ReadsAPosition(StaticCache):
    """Asks the device how far it is, at every layer of every step."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        return super().write(layer, k, v, step) if int(step.slots[-1]) >= 0 else (k, v)


class ReadsTheLength(StaticCache):
    """Compiled, this is compiled again for every token."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        return keys[:, :, : self.length + k.shape[2]], values[:, :, : self.length + k.shape[2]]


class StoresEveryHead(DynamicCache):
    """Key-value heads are repeated before they are stored."""

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        super().__init__(dataclasses.replace(spec, n_kv_heads=4), left_padding)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        repeats = 4 // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return super().write(layer, k, v, step)


class CannotCrop(DynamicCache):
    def crop(self, length: int) -> None:
        raise NotImplementedError


class CountsKeysOnly(DynamicCache):
    def nbytes(self) -> Bytes:
        found = super().nbytes()
        return found._replace(allocated=found.allocated // 2)


class CountsDroppedRows(StaticCache):
    def nbytes(self) -> Bytes:
        return super().nbytes()._replace(live=self.length * self.spec.token_nbytes)


class PredictsNoGrowth(DynamicCache):
    @classmethod
    def predict_nbytes(cls, spec: CacheSpec, length: int, prompt: int = 1) -> int:
        return length * spec.token_nbytes


class Unlimited(StaticCache):
    """Looks at no capacity, and wraps."""

    def begin(self, n_new: int) -> Step:
        self._begun = n_new
        step = self._place(self.length, n_new)
        return dataclasses.replace(step, slots=step.slots % self.spec.capacity)


class LosesWhatDoesNotFit(Unlimited):
    """torch stores nothing, silently, in a slice beyond the end."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        start = self.length
        for buffer, new in ((self._keys[layer], k), (self._values[layer], v)):
            room = buffer[:, :, start : start + new.shape[2]]
            room[:] = new[:, :, : room.shape[2]]
        return self._keys[layer], self._values[layer]


# Which check must say which promise is broken.
CONTROLS: list[tuple[Any, type[Cache], str]] = [
    (contract.check_columns_hold_what_their_positions_say, StoresFirstKeyTwice, "I2: layer 0"),
    (contract.check_columns_hold_what_their_positions_say, ShowsItsOwnMemory, "I2: a snapshot"),
    (contract.check_unused_columns_do_not_leak, WholeBuffer, "I3, 0 tokens"),
    (contract.check_a_broken_step_leaves_no_trace, CommitsEarly, "I4: a broken step"),
    (contract.check_crop_equals_never_having_gone_on, CropsNothing, "I5, crop"),
    (contract.check_crop_equals_never_having_gone_on, CropsOneTooFew, "I5, crop"),
    (contract.check_select_continues_from_each_rows_history, SelectsNothing, "I6, select"),
    (contract.check_select_continues_from_each_rows_history, SelectsKeysOnly, "I6, select"),
    (contract.check_select_continues_from_each_rows_history, SelectsRowsThatAreGone, "I6"),
    (contract.check_reset_equals_a_new_cache, ResetKeepsThePadding, "I7, padding"),
    (contract.check_reset_equals_a_new_cache, ResetsIntoNewMemory, "I7: a reset cache"),
    (contract.check_device_work_needs_no_host, ReadsAPosition, "I8: aten._local_scalar_dense"),
    (contract.check_device_work_needs_no_host, ReadsTheLength, "I8: depends on length"),
    (contract.check_device_work_needs_no_host, DynamicCache, "I8: keys or values have moved"),
    (contract.check_bytes_scale_with_key_value_heads, StoresEveryHead, "I9"),
    (contract.check_unsupported_operations_say_so, CannotCrop, "I13: crop"),
    (contract.check_bytes_are_those_of_the_storages, CountsKeysOnly, "I14, empty"),
    (contract.check_bytes_are_those_of_the_storages, CountsDroppedRows, "I14, one row"),
    (contract.check_predicted_bytes_are_those_allocated, PredictsNoGrowth, "I14: predicts"),
    (contract.check_a_full_cache_refuses, Unlimited, "capacity, 12 held, 1 more"),
    (contract.check_a_full_cache_refuses, LosesWhatDoesNotFit, "capacity, 12 held, 1 more"),
    (contract.check_only_what_was_written_is_committed, CommitsAnything, r"commit\(3\)"),
]


@pytest.mark.parametrize(
    ("check", "broken", "said"), CONTROLS, ids=[broken.__name__ for _, broken, _ in CONTROLS]
)
def test_a_broken_promise_is_caught_and_named(check: Any, broken: Make, said: str) -> None:
    with pytest.raises(AssertionError, match=f"^{said}"):
        check(broken, PADDED)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_planted_bug_breaks_parity(name: str) -> None:
    with pytest.raises(AssertionError, match=r"^I1, steps to .* differ by"):
        contract.check_any_split_equals_one_pass(MUTANTS[name][0], PLAIN)


@pytest.mark.parametrize("mutant", QUANTIZED[:-1], ids=lambda mutant: mutant.name)
def test_every_planted_bug_of_a_quantizer_breaks_a_promise(mutant: Mutant) -> None:
    check, number = {
        "crop": (contract.check_crop_equals_never_having_gone_on, "I5"),
        "permuted": (contract.check_select_continues_from_each_rows_history, "I6"),
    }.get(mutant.scenario, (contract.check_any_split_equals_one_pass, "I1"))
    with pytest.raises(AssertionError, match=f"^{number}, .* differ by"):
        check(mutant.make, PADDED)


@pytest.mark.parametrize("broken", [CropsOneTooFew, SelectsKeysOnly, ResetKeepsThePadding])
def test_random_histories_find_bugs_by_themselves(broken: Make) -> None:
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        contract.check_a_long_random_history(broken, PADDED)


def test_the_tensors_of_a_cache_are_found_wherever_it_keeps_them() -> None:
    class Holder:
        def __init__(self) -> None:
            self.pages = {"a": [torch.zeros(1), (torch.zeros(2),)]}
            self.inner = StaticCache(SPEC)
            self.inner.owner = self  # type: ignore[attr-defined]

    assert len(list(owned(Holder()))) == 2 + 4


# --- what all kinds refuse


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_one_token_or_more(kind: str) -> None:
    for n in (0, -1):
        with pytest.raises(UsageError, match=f"1 token or more .found {n}"):
            make_cache(kind, SPEC).begin(n)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_cache_says_what_it_holds_and_what_would_be_needed(kind: str) -> None:
    cache = make_cache(kind, SPEC)
    write(cache, 190)
    n, held = (201, 0) if cache.recompute else (11, 190)
    with pytest.raises(CapacityError) as caught:
        cache.begin(n)
    assert caught.value.message == (
        f"{kind} cache is full: {held} tokens held and {n} new ones need 201 (capacity 200)"
    )
    assert "larger" in caught.value.hint


def test_an_unknown_kind_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"--cache: 'statik' .* Did you mean static"):
        make_cache("statik", SPEC)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_belongs_to_the_cache(kind: str) -> None:
    subject = Subject(PADDED)
    padding = subject.padding
    assert padding is not None
    cache = cache_class(kind)(subject.cache(cache_class(kind)).spec, padding)
    subject.padding = padding.clone()
    padding.fill_(1)
    agree("padding", subject, cache, subject.ids, subject.padding, 4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_column_that_does_not_exist_is_an_error_and_not_a_lost_token(kind: str) -> None:
    cache = make_cache(kind, dataclasses.replace(SPEC, capacity=4))
    step = cache.begin(1)
    k = torch.zeros(3, 2, 1, 4, dtype=torch.float64)
    for beyond in (step.slots + 4, step.slots - 1):
        with pytest.raises((IndexError, RuntimeError)):
            cache.write(0, k, k, dataclasses.replace(step, slots=beyond))
    with pytest.raises(RuntimeError):
        cache.write(0, k[:2], k[:2], step)  # other rows
    with pytest.raises(RuntimeError):
        cache.write(0, k.float(), k.float(), step)  # another format


def test_a_model_refuses_a_cache_without_its_step() -> None:
    """It would overwrite the first tokens, and say nothing."""
    subject = Subject(PLAIN)
    with pytest.raises(ValueError, match="begin"):
        subject.model(subject.ids, cache=subject.cache(DynamicCache))


# --- none


def test_no_cache_computes_the_whole_sequence_and_owns_nothing() -> None:
    cache = make_cache("none", SPEC)
    write(cache, 5)
    write(cache, 6)
    assert (cache.length, cache.nbytes(), list(owned(cache))) == (6, Bytes(0, 0, 0), [])
    step = cache.begin(7)
    assert step.q_pos.tolist() == [list(range(7))] * 3 and step.causal


# --- dynamic


def test_a_dynamic_cache_moves_a_few_times_only() -> None:
    cache = make_cache("dynamic", dataclasses.replace(SPEC, capacity=3000))
    sizes = []
    for _ in range(3000):
        cache.begin(1)
        cache.commit(1)
        sizes.append(cache.nbytes().allocated // cache.spec.token_nbytes)
    assert len(set(sizes)) < 12  # by half each time; by one grain each time would be 47
    assert all(size % GRAIN == 0 or size == 3000 for size in sizes)
    assert max(size / n for n, size in enumerate(sizes, 1) if n > GRAIN) < 2


def test_a_dynamic_cache_outlives_a_growth_that_ran_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = Subject(PLAIN, 80)
    cache = subject.filled(DynamicCache, 60)
    allocate, calls = Tensor.new_zeros, []

    def limited(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return allocate(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Tensor, "new_zeros", limited)
        cache.begin(20)
    agree("after MemoryError", subject, cache, subject.ids, subject.padding, 5, 60)


def test_a_prediction_ends_at_the_capacity() -> None:
    full = DynamicCache.predict_nbytes(SPEC, SPEC.capacity)
    assert DynamicCache.predict_nbytes(SPEC, SPEC.capacity + 1) == full


# --- static


def test_a_static_cache_has_no_room_for_more_rows_and_says_so() -> None:
    cache = make_cache("static", SPEC)
    with pytest.raises(CacheOpUnsupported, match=r"static cache cannot select 4 rows: .* for 3"):
        cache.select(torch.tensor([0, 1, 2, 0]))
    assert cache.batch == 3
    cache.select(torch.tensor([1]))
    cache.select(torch.tensor([0, 0, 0]))  # the room is still there


def test_a_static_cache_reads_whole_blocks() -> None:
    cache = StaticCache(SPEC, block=64)
    reached = []
    for _ in range(200):
        step = cache.begin(1)
        cache.commit(1)
        assert step.k_pos.shape[1] == step.mask.shape[-1]  # type: ignore[union-attr]
        assert int((step.k_pos[0] == EMPTY).sum()) == step.k_pos.shape[1] - cache.length
        reached.append(step.k_pos.shape[1])
    assert reached == [64] * 64 + [128] * 64 + [192] * 64 + [200] * 8


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


def test_a_static_cache_is_compiled_once_for_all_steps() -> None:
    subject = Subject(PLAIN)
    cache = subject.cache(lambda spec, padding: StaticCache(spec, padding, block=spec.capacity))
    before = addresses(cache)
    assert compilations(subject, cache) == 1
    assert addresses(cache) == before
    by_blocks = subject.cache(lambda spec, padding: StaticCache(spec, padding, block=4))
    assert compilations(subject, by_blocks) == 2  # columns 0..7 and 0..11
