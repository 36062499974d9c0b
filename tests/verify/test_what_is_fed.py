"""Decoders that are wrong at one size, one length, one row, one id: each is fed what shows it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvtool
from kvtool.commands.verify.cache import command
from kvtool.core.verify.arms import Case, play
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.judge import BUG, UNSUPPORTED, Judge
from kvtool.core.verify.scenarios import GENERATED, SCENARIOS
from kvtool.core.verify.target import cost
from kvtool.core.verify.target.check import check_target, decode_case
from kvtool.core.verify.target.doctor import examine
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.errors import UsageError

When = Callable[[int, int], bool]  # tokens of a step, and held before it


class Sums(nn.Module):
    """Sums what it has read: the cheapest decoder with a past. `when` plants a bug: the step does
    not see its past."""

    def __init__(self, when: When = lambda n, past: False, context: int = 1200, n_ids: int = 31):
        super().__init__()
        torch.manual_seed(0)
        self.when, self.context, self.vocab_size = when, context, n_ids
        self.table, self.head = nn.Embedding(n_ids, 8), nn.Linear(8, n_ids)

    def full(self, ids: Tensor) -> Tensor:
        return self.answer(self.table(ids).cumsum(1), torch.arange(1, ids.shape[1] + 1))

    def answer(self, sums: Tensor, places: Tensor) -> Tensor:
        return self.head(torch.tanh(sums / places[:, None].to(sums.dtype).sqrt()))

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        total, past = (torch.zeros(()), 0) if state is None else state
        n = ids.shape[1]
        x = self.table(ids).cumsum(1)
        seen = x if past and self.when(n, past) else x + total
        places = torch.arange(past + 1, past + n + 1)
        return self.answer(seen, places), (x[:, -1:] + total, past + n)


def judged(decoder: Any, scenario: str) -> Finding:
    subject = TargetSubject(decoder, "it")
    subject.find_reach()
    return Judge(subject).judge(Case(SCENARIOS[scenario]))


def wrong_in(decoder: Any) -> set[str]:
    """The scenarios that call a decoder wrong."""
    subject = TargetSubject(decoder, "it")
    main = decode_case(subject.vocab_size, subject.context, tokens=32)
    found = check_target(subject, list(SCENARIOS), main)
    return {c.finding.scenario for c in found if c.finding.verdict == BUG}


def test_a_right_decoder_is_right_in_every_scenario() -> None:
    assert wrong_in(Sums()) == set()


RARE: dict[str, tuple[When, str]] = {
    "three": (lambda n, past: n == 3, "steps"),
    "seven": (lambda n, past: n == 7, "steps"),
    "sixteen": (lambda n, past: n == 16, "steps"),
    "sixty-five": (lambda n, past: n == 65, "steps"),
    "several behind 128": (lambda n, past: n > 1 and past >= 128, "steps"),
    "one behind 300": (lambda n, past: n == 1 and past > 300, "long"),
    "one behind 1,000": (lambda n, past: n == 1 and past > 1000, "long"),
    "several behind 1,000": (lambda n, past: n > 1 and past > 1000, "long"),
    "the last token": (lambda n, past: past + n == 1200, "long"),
    "ends on 64": (lambda n, past: past + n == 64 and n > 1, "boundaries"),
    "begins on 96": (lambda n, past: past == 96, "boundaries"),
    "a step beyond 64": (lambda n, past: n > 64, "steps"),
}


@pytest.mark.parametrize("name", RARE)
def test_a_bug_at_one_size_or_length_is_found(name: str) -> None:
    when, scenario = RARE[name]
    assert judged(Sums(when), scenario).verdict == BUG


def test_a_prompt_beyond_512_that_is_read_wrongly_is_found() -> None:
    class LongPrompt(Sums):
        def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
            logits, (total, past) = super().step(ids, state)
            return logits, (total * (0.5 if ids.shape[1] > 512 else 1.0), past)

    assert judged(LongPrompt(), "long").verdict == BUG


@pytest.mark.parametrize("name", ["sliding_window", "chunk_size", "attention_window"])
def test_steps_are_put_around_a_size_that_the_configuration_names(name: str) -> None:
    decoder = Sums(lambda n, past: past + n == 2 * 77)
    assert judged(decoder, "boundaries").right
    decoder.config = SimpleNamespace(**{name: 77})
    assert judged(decoder, "boundaries").verdict == BUG


def test_a_block_size_that_is_the_context_is_no_window() -> None:
    decoder = Sums(context=64)
    decoder.config = {"block_size": 64, "window": 8}
    assert TargetSubject(decoder, "it").sizes == (8,)


def test_all_histories_of_a_scenario_are_judged_by_one_pass() -> None:
    subject = TargetSubject(Sums(), "it")
    lengths: list[int] = []
    right = subject.decoder.full
    subject.decoder.full = lambda ids: lengths.append(ids.shape[1]) or right(ids)
    arms = play(subject, Case(SCENARIOS["steps"]))
    # Two short ones find out whether the cache is used.
    assert len(arms.found) > 50 and [n for n in lengths if n > 24] == [max(lengths)]


def test_what_would_take_too_long_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_step_seconds", lambda *_: (0.0, 0.001))
    monkeypatch.setattr(cost, "_pass_seconds", lambda *_: lambda n: 4e-6 * n**2)
    subject = TargetSubject(Sums(), "it")
    main = decode_case(subject.vocab_size, subject.context, tokens=8)
    (found,) = check_target(subject, ["long"], main)
    assert found.finding.right and 160 <= subject.reach < 600
    assert found.finding.not_fed == f"beyond {subject.reach} tokens"
    before = subject.reach
    list(check_target(subject, ["long"], main, thorough=True))
    assert subject.reach > before
    told = str(kvtool.verify(Sums(), scenarios=["long", "decode"], tokens=8))
    assert "; not fed: beyond " in told.splitlines()[-1]


def test_a_slow_decoder_is_fed_little_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_step_seconds", lambda subject: (0.0, 2.0))
    monkeypatch.setattr(cost, "_pass_seconds", lambda subject: lambda n: 2.0)
    subject = TargetSubject(Sums(), "it")
    main = decode_case(subject.vocab_size, subject.context, tokens=8)
    found = {c.finding.scenario: c.finding for c in check_target(subject, GENERATED, main)}
    assert found["long"].not_fed == "most sizes of steps and beyond 64 tokens"
    assert sum(f.working.steps for f in found.values() if f.working) < 70


def test_a_vocabulary_whose_logits_fill_the_memory_shortens_the_histories(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "_step_seconds", lambda subject: (0.0, 0.0))
    monkeypatch.setattr(cost, "_pass_seconds", lambda subject: lambda n: 0.0)
    subject = TargetSubject(Sums(n_ids=31), "it")
    subject.vocab_size = 10**5
    subject.find_reach()
    assert subject.reach <= 600


def test_python_and_the_command_have_the_same_defaults() -> None:
    python = inspect.signature(kvtool.verify).parameters
    line = inspect.signature(command).parameters
    for name in ("tokens", "prompt_length", "thorough"):
        assert python[name].default == line[name].default


def test_a_prompt_is_as_long_as_was_asked_for() -> None:
    found = kvtool.verify(Sums(), scenarios=["decode"], prompt_length=700, tokens=4)
    (finding,) = found.findings
    assert finding.working is not None and finding.working.steps == 5
    assert decode_case(31, 1200, tokens=4, prompt_length=700).n_prompt == 700
    with pytest.raises(UsageError, match=r"^a prompt of 1,200 tokens is too long \(the decoder"):
        kvtool.verify(Sums(), prompt_length=1200)


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


# What is diagnosed


def test_a_bug_far_behind_is_diagnosed_on_one_short_history() -> None:
    seen: list[tuple[str, int, int]] = []

    def doctor(subject: Any, case: Case, step: int, arms: Any) -> Any:
        seen.append((case.scenario.name, step, len(arms.found)))
        return examine(subject, case, step, arms)

    subject = TargetSubject(Sums(lambda n, past: past > 1000), "it")
    found = Judge(subject, doctor).judge(Case(SCENARIOS["long"]))
    subject.reach = 1200
    found = Judge(subject, doctor).judge(Case(SCENARIOS["long"]))
    assert found.verdict == BUG and found.first_wrong is not None and found.first_wrong > 1
    assert seen == [("long", 1, 2)]


def test_generated_scenarios_are_the_ones_with_schedules() -> None:
    assert {"prompts", "steps", "boundaries", "long"} == GENERATED
