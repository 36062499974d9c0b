"""The checks of the contract, checked: a broken promise is caught, and named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import cache_checks as checks
import cache_cost_checks as costs
from helpers import PADDED, PLAIN, Make, owned
from kvtool.core.cache import Bytes, Cache, CacheSpec, Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.verify.mutants.mutant import Mutant
from kvtool.core.verify.mutants.quantized import QUANTIZED
from planted_bugs import MUTANTS, WholeBuffer

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
        before = getattr(self, "left_padding", left_padding)
        super().reset(left_padding)
        self.left_padding = before


class ResetsIntoNewMemory(StaticCache):
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
        step = self._make_step(self.length, n_new)
        return dataclasses.replace(step, slots=step.slots % self.spec.capacity)


class LosesWhatDoesNotFit(Unlimited):
    """torch stores nothing, silently, in a slice beyond the end."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        start = self.length
        for buffer, new in ((self._keys[layer], k), (self._values[layer], v)):
            room = buffer[:, :, start : start + new.shape[2]]
            room[:] = new[:, :, : room.shape[2]]
        reach = step.k_pos.shape[1]
        return self._keys[layer][:, :, :reach], self._values[layer][:, :, :reach]


# Which check must say which promise is broken.
CONTROLS: list[tuple[Any, type[Cache], str]] = [
    (checks.check_columns_hold_what_their_positions_say, StoresFirstKeyTwice, "I2: layer 0"),
    (checks.check_columns_hold_what_their_positions_say, ShowsItsOwnMemory, "I2: a snapshot"),
    (checks.check_unused_columns_do_not_leak, WholeBuffer, "I3, 0 tokens"),
    (checks.check_a_broken_step_leaves_no_trace, CommitsEarly, "I4: a broken step"),
    (checks.check_crop_equals_never_having_gone_on, CropsNothing, "I5, crop"),
    (checks.check_crop_equals_never_having_gone_on, CropsOneTooFew, "I5, crop"),
    (checks.check_select_continues_from_each_rows_history, SelectsNothing, "I6, select"),
    (checks.check_select_continues_from_each_rows_history, SelectsKeysOnly, "I6, select"),
    (checks.check_select_continues_from_each_rows_history, SelectsRowsThatAreGone, "I6"),
    (checks.check_reset_equals_a_new_cache, ResetKeepsThePadding, "I7, padding"),
    (checks.check_reset_equals_a_new_cache, ResetsIntoNewMemory, "I7: a reset cache"),
    (costs.check_device_work_needs_no_host, ReadsAPosition, "I8: aten._local_scalar_dense"),
    (costs.check_device_work_needs_no_host, ReadsTheLength, "I8: depends on length"),
    (costs.check_device_work_needs_no_host, DynamicCache, "I8: keys or values have moved"),
    (costs.check_bytes_scale_with_key_value_heads, StoresEveryHead, "I9"),
    (costs.check_unsupported_operations_say_so, CannotCrop, "I13: crop"),
    (costs.check_bytes_are_those_of_the_storages, CountsKeysOnly, "I14, empty"),
    (costs.check_bytes_are_those_of_the_storages, CountsDroppedRows, "I14, one row"),
    (costs.check_predicted_bytes_are_those_allocated, PredictsNoGrowth, "I14: predicts"),
    (costs.check_a_full_cache_refuses, Unlimited, "capacity, 12 held, 1 more"),
    (costs.check_a_full_cache_refuses, LosesWhatDoesNotFit, "capacity, 12 held, 1 more"),
    (costs.check_only_what_was_written_is_committed, CommitsAnything, r"commit\(3\)"),
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
        checks.check_any_split_equals_one_pass(MUTANTS[name][0], PLAIN)


@pytest.mark.parametrize("mutant", QUANTIZED[:-1], ids=lambda mutant: mutant.name)
def test_every_planted_bug_of_a_quantizer_breaks_a_promise(mutant: Mutant) -> None:
    check, number = {
        "crop": (checks.check_crop_equals_never_having_gone_on, "I5"),
        "permuted": (checks.check_select_continues_from_each_rows_history, "I6"),
    }.get(mutant.scenario, (checks.check_any_split_equals_one_pass, "I1"))
    with pytest.raises(AssertionError, match=f"^{number}, .* differ by"):
        check(mutant.make, PADDED)


@pytest.mark.parametrize(
    ("broken", "error", "said"),
    [
        (CropsOneTooFew, AssertionError, "operation 12: the logits differ"),
        (SelectsKeysOnly, AssertionError, "operation 12: the logits differ"),
        (ResetKeepsThePadding, RuntimeError, "The size of tensor a"),  # of other rows
    ],
)
def test_random_histories_find_bugs_by_themselves(
    broken: Make, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        checks.check_a_long_random_history(broken, PADDED)


def test_the_tensors_of_a_cache_are_found_wherever_it_keeps_them() -> None:
    class Holder:
        def __init__(self) -> None:
            self.pages = {"a": [torch.zeros(1), (torch.zeros(2),)]}
            self.inner = StaticCache(SPEC)
            self.inner.owner = self  # type: ignore[attr-defined]

    assert len(list(owned(Holder()))) == 2 + 4
