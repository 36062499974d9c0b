"""Decoders that are wrong in some row, at some id, or once they are saved: what shows it is fed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core.verify.arms import Case
from kvtool.core.verify.judge import BUG, UNSUPPORTED
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.target.subject import TargetSubject
from summing import Sums, judged, wrong_in

# Rows


class RowsOfTheFirst(Sums):
    """Behind the prompt every row adds what row 0 read."""

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        return super().step(ids if state is None else ids[:1].expand_as(ids), state)


class Mixing(Sums):
    """Rows are centred on each other, with and without a cache."""

    def answer(self, sums: Tensor, places: Tensor) -> Tensor:
        return super().answer(sums - sums.mean(0, keepdim=True) * 0.1, places)


def test_rows_that_read_the_first_are_found_without_select() -> None:
    assert wrong_in(RowsOfTheFirst()) == {"rows"}


def test_rows_that_mix_without_a_cache_are_a_bug_in_words() -> None:
    found = judged(Mixing(), "rows")
    assert found.verdict == BUG
    assert found.evidence.startswith("rows of a batch are not what each is alone, uncached (")


class Selects(Sums):
    def select(self, state: Any, rows: Tensor) -> Any:
        return state[0][rows], state[1]


def test_a_row_that_leaves_takes_its_past_along() -> None:
    class KeepsTheFirst(Selects):
        def select(self, state: Any, rows: Tensor) -> Any:
            if len(rows) < len(state[0]):
                return state[0][: len(rows)], state[1]
            return super().select(state, rows)

    assert wrong_in(Selects()) == set()
    assert wrong_in(KeepsTheFirst()) == {"leaving"}


class Masked(Sums):
    """Positions come from attention_mask alone, as `forward` takes no position_ids."""

    full = step = None  # type: ignore[assignment]  # adapted from its forward

    def __init__(self, behind: str = "") -> None:
        super().__init__(context=200)
        self.behind = behind

    def forward(self, ids: Tensor, attention_mask: Any = None, past: Any = None) -> Any:
        total, held = (0.0, 0) if past is None else past
        if attention_mask is None:
            attention_mask = torch.ones(len(ids), held + ids.shape[1], dtype=torch.long)
        places = attention_mask.cumsum(1)[:, held:]
        if past is not None and self.behind == "counts padding":
            places = torch.arange(held + 1, held + ids.shape[1] + 1).expand_as(ids)
        x = self.table(ids)
        if past is None or self.behind != "reads padding":
            x = x * attention_mask[:, held:, None]
        holes = (attention_mask[:, 0] == 1).all() and (attention_mask == 0).any()
        if past is not None and holes and self.behind == "forgets a hole":
            x = x * 1.5
        sums = x.cumsum(1) + total
        new = (sums[:, -1:], held + ids.shape[1])
        return self.head(torch.tanh(sums / places[..., None].clamp(min=1).to(sums.dtype))), new


def test_a_mask_without_positions_is_taken_as_padding() -> None:
    subject = TargetSubject(Masked(), "it")
    assert {"padding", "right-padding"} <= subject.abilities
    assert wrong_in(Masked()) == set()
    assert wrong_in(Masked("counts padding")) == {"padded", "right-padded"}


def test_padding_behind_shorter_prompts_is_fed_where_an_uncached_pass_hides_it() -> None:
    assert wrong_in(Masked("forgets a hole")) == {"right-padded"}

    class Counts(Masked):  # places count padding that is not on the left
        def forward(self, ids: Tensor, attention_mask: Any = None, past: Any = None) -> Any:
            if attention_mask is not None:
                left = (attention_mask.cumsum(1) == 0).long()
                attention_mask = 1 - left
            return super().forward(ids, attention_mask, past)

    subject = TargetSubject(Counts(), "it")
    assert "padding" in subject.abilities and "right-padding" not in subject.abilities
    assert wrong_in(Counts()) == set()


def test_a_mask_that_hides_nothing_is_no_padding() -> None:
    class Ignores(Masked):
        def forward(self, ids: Tensor, attention_mask: Any = None, past: Any = None) -> Any:
            return super().forward(ids, None, past)

    assert "padding" not in TargetSubject(Ignores(), "it").abilities


# Ids


class Special(Sums):
    """The id `eos_token_id` counts nothing in the past; without a cache it does."""

    def __init__(self, eos: int, n_ids: int = 3000, **config: int) -> None:
        super().__init__(n_ids=n_ids, context=200)
        self.eos, self.config = eos, SimpleNamespace(**config)

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, (total, past) = super().step(ids, state)
        lost = ((ids == self.eos)[..., None] * self.table(ids)).sum(1, keepdim=True)
        return logits, (total - lost, past)


@pytest.mark.parametrize("eos", [0, 2999, 1234])
def test_ids_with_a_meaning_and_the_ends_of_the_vocabulary_are_fed(eos: int) -> None:
    assert judged(Special(eos, eos_token_id=eos), "ids").verdict == BUG
    assert judged(Special(eos), "ids").right is (eos == 1234)


def test_the_id_of_padding_is_no_text() -> None:
    decoder = Special(7, pad_token_id=7, sep_token_id=[8, 9], vocab_token_id=5000)
    assert TargetSubject(decoder, "it").special_ids == (8, 9)


def test_runs_of_one_id_are_fed() -> None:
    class Once(Sums):
        """A token that repeats the one before is not stored."""

        def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
            logits, (total, past) = super().step(ids, state)
            same = (ids[:, 1:] == ids[:, :-1])[..., None] * self.table(ids[:, 1:])
            return logits, (total - same.sum(1, keepdim=True), past)

    assert judged(Once(n_ids=100_000, context=200), "ids").verdict == BUG


def test_scenarios_feed_ids_of_their_own() -> None:
    subject = TargetSubject(Sums(), "it")
    firsts = set()
    for name in ("chunks", "reset", "growth", "token-by-token"):
        run = Case(SCENARIOS[name]).run(subject)
        firsts.add(tuple(run.next_ids(1, 8)[0].tolist()))
    assert len(firsts) == 4


def test_a_second_request_that_begins_as_the_first_is_fed() -> None:
    class Remembers(Sums):
        """Takes a prompt for known by its first ids, and goes on from all that it read then."""

        known: Any = None

        def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
            logits, (total, past) = super().step(ids, state)
            if state is None and ids.shape[1] > 4:
                if self.known is not None and torch.equal(self.known[0], ids[:, :4]):
                    return logits, (self.known[1], past)
                self.known = (ids[:, :4], total)
            return logits, (total, past)

    assert judged(Remembers(), "second-request").verdict == BUG


# Saving


class Store:
    """What mlx calls a cache: `state` saves and loads it."""

    def __init__(self, lost: float = 1.0) -> None:
        self.total, self.past, self.lost = torch.zeros(1, 1, 8), 0, lost

    @property
    def state(self) -> Any:
        return self.total, self.past

    @state.setter
    def state(self, given: Any) -> None:
        self.total, self.past = given[0] * self.lost, given[1]


class Saves(Sums):
    full = step = None  # type: ignore[assignment]  # adapted from its forward

    def __init__(self, lost: float = 1.0, store: type[Store] = Store) -> None:
        super().__init__(context=200)
        self.lost, self.store = lost, store

    def new_cache(self) -> Store:
        return self.store(self.lost)

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        cache = cache or self.new_cache()
        n, sums = ids.shape[1], self.table(ids).cumsum(1) + cache.total
        places = torch.arange(cache.past + 1, cache.past + n + 1)
        cache.total, cache.past = sums[:, -1:], cache.past + n
        return self.answer(sums, places), cache


class StoreOfMethods(Store):
    state = None  # type: ignore[assignment]

    def get_state(self) -> Any:
        return {"total": self.total, "past": self.past}

    def set_state(self, given: Any) -> None:
        self.total, self.past = given["total"] * self.lost, given["past"]


class StoreOfTorch(Store):
    state = None  # type: ignore[assignment]

    def state_dict(self) -> Any:
        return {"total": self.total, "past": self.past}

    def load_state_dict(self, given: Any) -> None:
        self.total, self.past = given["total"] * self.lost, given["past"]


@pytest.mark.parametrize("store", [Store, StoreOfMethods, StoreOfTorch])
def test_a_cache_is_saved_and_loaded_into_a_new_one(store: type[Store]) -> None:
    assert judged(Saves(store=store), "saved").right
    assert wrong_in(Saves(lost=0.5, store=store)) == {"saved"}


def test_a_cache_that_cannot_load_is_not_accused() -> None:
    class Refuses(StoreOfMethods):
        def set_state(self, given: Any) -> None:
            raise ValueError("read only")

    found = judged(Saves(store=Refuses), "saved")
    assert found.verdict == UNSUPPORTED and found.evidence.endswith("ValueError: read only")
