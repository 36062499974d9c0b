"""The lengths at which requests part cover the ends of blocks, and depend on no earlier visit."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from fake_engine import FakeEngine, Sglang, V, Vllm, llama_cpp, served
from kvtool.core.servers.arms import SHORT
from kvtool.core.servers.client import Client
from kvtool.core.servers.engine import Completion
from kvtool.core.servers.engines import connect
from kvtool.core.servers.prompts import LENGTHS
from kvtool.core.servers.session import Visit, visit
from kvtool.core.servers.splits import ANY, Kind, drawn
from kvtool.core.servers.texts import TAIL, Prompt
from kvtool.core.servers.verdict import BEYOND, IDENTICAL, UNSUPPORTED, WITHIN

DRAWS = random.Random(2)
PROMPTS = [[DRAWS.randrange(V) for _ in range(n)] for n in (40, 44)]


class Counted:
    """An engine that tells nothing: where requests part is drawn without it."""

    name, slots = "counted", 0

    def complete(self, ids: list[int], n: int = 1, **_: Any) -> Completion:
        return Completion((1,) * n, ({1: -0.5},) * n, None)


def prompts(lengths: tuple[int, ...]) -> list[Prompt]:
    return [Prompt(Counted(), n, range(size), TAIL) for n, size in enumerate(lengths)]  # type: ignore[arg-type]


def is_end(length: int, block: int) -> bool:
    """Of a block of just this size, or of 64 tokens and more."""
    return length % block == 0 and (block == 64 or length % (2 * block) != 0)


def test_a_default_visit_meets_the_ends_of_blocks_of_each_size_and_one_beside() -> None:
    pairs = [list(prompt.splits()) for prompt in prompts(LENGTHS)]
    lengths = [length for both in pairs for length in both]
    assert len(lengths) == 10
    for block in (16, 32, 64):
        assert any(is_end(n, block) for n in lengths)
        assert any(is_end(n + off, block) for n in lengths for off in (1, -1))
    assert sum(any(n % 32 == 0 for n in both) for both in pairs) >= 3  # of 5: the median has them
    assert any(n % 16 not in (0, 1, 15) for n in lengths)  # and some that are near no end


@pytest.mark.parametrize("turn", range(3))
def test_arms_of_one_length_meet_both_sides_of_an_end(turn: int) -> None:
    lengths = [prompt.split(turn) for prompt in prompts(LENGTHS)]
    assert {33, 32, 63} <= set(lengths)
    assert any((n - 1) % 16 == 0 and n != 33 for n in lengths)
    others = [prompt.split((turn + 1) % 3) for prompt in prompts(LENGTHS)]
    assert sum(a != b for a, b in zip(lengths, others, strict=True)) >= 4


@pytest.mark.parametrize(("kind", "possible", "expected"), [
    (Kind(64), range(25, 76), {64}), (Kind(32), range(25, 76), {32}),
    (Kind(16), range(25, 76), {48}), (Kind(16, -1), range(25, 76), {47}),
    (Kind(64, 1), range(25, 76), {65}), (Kind(64), range(25, 60), {32}),
    (Kind(64), range(17, 31), {*range(17, 31)}), (Kind(32), range(60, 70), {64}),
    (Kind(64), range(100, 300), {128, 192, 256}), (Kind(32), range(100, 300), {160, 224, 288}),
    (ANY, range(3, 5), {3, 4}),
])  # fmt: skip
def test_a_length_is_at_the_end_of_such_a_block_or_of_a_smaller_one(
    kind: Kind, possible: range, expected: set[int]
) -> None:
    assert {drawn(kind, possible, random.Random(seed)) for seed in range(200)} == expected


def test_two_texts_part_just_where_they_should() -> None:
    for prompt in prompts((40, 12)):
        for split in range(1, prompt.end):
            other = prompt.parted(split, 3)
            assert len(other) == split + 3
            assert other[:split] == prompt.ids[:split] and other[split] != prompt.ids[split]


def reuse(engine: FakeEngine, answer: Any = llama_cpp, arms: list[str] = SHORT) -> Any:
    """What each arm says of an engine, and what each of its requests took from the cache."""
    with served(engine, answer) as url:
        found = Visit()
        visit(connect(Client(url)), PROMPTS, arms, [], 20, lambda _: None, found)
    taken = {
        arm: [sorted({(p.run, p.reused) for p in m.probes}) for m in found.measured if m.arm == arm]
        for arm in arms
    }
    return {v.arm: v.verdict for v in found.verdicts(arms)}, taken


def test_a_second_visit_reuses_what_the_first_did_and_says_the_same() -> None:
    engine = FakeEngine(slots=2, memory=10_000)  # it forgets nothing
    assert reuse(engine) == reuse(engine)


@pytest.mark.parametrize("api", [lambda: llama_cpp, Vllm, Sglang, lambda: Sglang(old=True)])
def test_each_request_finds_no_more_than_its_own_scene_has_left(api: Any) -> None:
    verdicts, taken = reuse(FakeEngine(slots=2, memory=10_000), api(), ["prefix", "fork"])
    (first, second), (third, _) = ([n for _, n in runs] for runs in taken["prefix"])
    assert {first, third} == {32} and second in (31, 33)
    assert set(verdicts.values()) <= {WITHIN, IDENTICAL}


def test_a_fault_where_blocks_of_32_end_is_in_the_median_over_prompts() -> None:
    def at_ends(ids: list[int]) -> list[int]:
        return ids if len(ids) % 32 else [*ids[:2], *ids[3:]]

    found = Visit()
    five = [[random.Random(n).randrange(V) for _ in range(48)] for n in range(5)]
    with served(FakeEngine(at_ends, slots=4)) as url:
        visit(connect(Client(url)), five, ["prefix"], [], 28, lambda _: None, found)
    (prefix,) = found.verdicts(["prefix"])
    wrong = Counter(gap.prompt for gap in prefix.gaps if gap.ratio > 100)
    assert prefix.verdict == BEYOND
    assert prefix.ratio is not None and prefix.ratio > 100 and len(wrong) >= 3


def test_a_slot_is_saved_and_restored_into_another() -> None:
    engine = FakeEngine(slots=2)
    verdicts, taken = reuse(engine, arms=["restored"])
    assert verdicts["restored"] in (WITHIN, IDENTICAL)
    assert [path for path, _, _ in engine.seen if "slots" in path] == [
        "/slots/0?action=save", "/slots/1?action=restore", "/slots/1?action=save",
        "/slots/0?action=restore",
    ]  # fmt: skip
    assert all(n > 40 for runs in taken["restored"] for _, n in runs)


def test_a_restore_that_brings_back_nothing_proves_nothing() -> None:
    engine = FakeEngine(slots=2)
    engine.file_slot = lambda *_: 0  # type: ignore[method-assign]
    verdicts, taken = reuse(engine, arms=["restored"])
    assert verdicts["restored"] == UNSUPPORTED and taken["restored"] == [[]]


def test_a_restore_that_mixes_up_tokens_is_found() -> None:
    engine = FakeEngine(lambda ids: [*ids[:5], *ids[6:]], slots=2)
    assert reuse(engine, arms=["restored"])[0]["restored"] == BEYOND


@pytest.mark.parametrize(("code", "said"), [
    (501, "--slot-save-path is not set"),
    (400, "it failed to save and restore a slot: "),
])  # fmt: skip
def test_a_server_that_saves_no_slots_is_asked_once_and_says_why(code: int, said: str) -> None:
    engine = FakeEngine(slots=2)

    def refusing(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        return {"HTTP": code} if "slots" in path else llama_cpp(engine, path, body)

    with served(engine, refusing) as url:
        found = Visit()
        visit(connect(Client(url)), PROMPTS, ["restored"], [], 12, lambda _: None, found)
    (restored,) = found.verdicts(["restored"])
    assert restored.verdict == "unsupported" and restored.evidence.startswith(said)
    assert len([path for path, _, _ in engine.seen if "slots" in path]) == 1


def test_an_engine_without_slots_is_not_asked_to_save_one() -> None:
    engine = FakeEngine()
    verdicts, _ = reuse(engine, arms=["restored"])
    assert verdicts["restored"] == "unsupported"
    assert not any("slots" in path for path, _, _ in engine.seen)


@pytest.mark.parametrize("told", [10**30, -1, 3.5, "7", True, None])
def test_a_server_that_claims_an_impossible_reuse_says_nothing_of_it(told: Any) -> None:
    def claiming(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        found = llama_cpp(engine, path, body)
        if found is not None and "timings" in found:
            found["timings"]["cache_n"] = told
        return found

    with served(FakeEngine(), claiming) as url:
        assert connect(Client(url)).complete([1, 2, 3], cached=True).reused is None
