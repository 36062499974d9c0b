"""Servers that are right are not accused, and every planted fault is found, on three APIs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fake_engine import FAULTS, FakeEngine, Sglang, V, Vllm, llama_cpp, served
from kvtool.core.servers.arms import SHORT
from kvtool.core.servers.client import Client
from kvtool.core.servers.engines import connect
from kvtool.core.servers.session import Visit, visit
from kvtool.core.servers.verdict import (
    BEYOND,
    IDENTICAL,
    RIGHT,
    UNSUPPORTED,
    VACUOUS,
    WITHIN,
    ArmVerdict,
)  # fmt: skip

TAIL = 10
DRAWS = random.Random(1)
PROMPTS = [[DRAWS.randrange(V) for _ in range(n)] for n in (24, 27, 21)]
APIS: dict[str, Callable[[], Any]] = {
    "llama.cpp": lambda: llama_cpp,
    "vllm": Vllm,
    "sglang": Sglang,
    "sglang 0.4": lambda: Sglang(old=True),
}


def asked(engine: FakeEngine, api: str, arms: Sequence[str]) -> dict[str, ArmVerdict]:
    with served(engine, APIS[api]()) as url:
        found = Visit()
        visit(connect(Client(url)), PROMPTS, arms, [], TAIL, lambda _: None, found)
    return {verdict.arm: verdict for verdict in found.verdicts(arms)}


@pytest.mark.parametrize("api", APIS)
def test_a_server_that_is_right_is_not_accused(api: str) -> None:
    arms = SHORT if api == "llama.cpp" else ["prefix", "fork"]
    found = asked(FakeEngine(), api, arms)
    assert {v.verdict for v in found.values()} <= {WITHIN, IDENTICAL, UNSUPPORTED}
    assert all(found[name].right and found[name].reused for name in ("prefix", "fork"))
    assert all(v.fault is None or v.fault > 1000 * (v.floor or 0) for v in found.values())


@pytest.mark.parametrize(
    ("api", "name"),
    [*(("llama.cpp", name) for name in FAULTS), ("vllm", "a token missing"),
     ("sglang", "a token missing"), ("sglang 0.4", "a token missing")],
)  # fmt: skip
def test_a_planted_fault_is_found(api: str, name: str) -> None:
    found = asked(FakeEngine(FAULTS[name]), api, ["prefix"])["prefix"]
    assert (found.verdict, found.right) == (BEYOND, False)
    assert found.ratio is not None and found.ratio > 1000
    assert found.first_beyond is not None and found.first_beyond > len(PROMPTS[2])


def test_each_arm_finds_a_fault() -> None:
    arms = ["decode", "fork", "between", "slot"]
    found = asked(FakeEngine(FAULTS["half of the prefix lost"]), "llama.cpp", arms)
    assert {v.verdict for v in found.values()} == {BEYOND}


def test_a_fault_at_the_ends_of_blocks_alone_is_found() -> None:
    def at_some(ids: list[int]) -> list[int]:
        return ids if len(ids) % 16 != 15 else [*ids[:2], *ids[3:]]

    found = asked(FakeEngine(at_some), "llama.cpp", ["prefix"])["prefix"]
    assert found.verdict == BEYOND
    assert found.ratio is not None and found.ratio < 1 < 100 < (found.worst or 0)
    assert found.evidence.startswith("in ") and found.evidence.endswith(" of 6 requests")


def test_a_server_that_reuses_nothing_proves_nothing() -> None:
    class Forgetful(FakeEngine):
        def complete(self, ids: list[int], n: int, cached: bool) -> tuple[list[Any], int]:
            return super().complete(ids, n, cached=False)

    found = asked(Forgetful(), "llama.cpp", ["prefix", "cut"])
    assert (found["prefix"].verdict, found["prefix"].reused) == (VACUOUS, 0)
    assert found["cut"].verdict == UNSUPPORTED
    assert not any(v.verdict in RIGHT for v in found.values())


def test_a_server_that_does_not_say_what_it_reuses_proves_nothing() -> None:
    class Silent(Vllm):
        def __call__(
            self, engine: FakeEngine, path: str, body: dict[str, Any]
        ) -> dict[str, Any] | None:
            found = super().__call__(engine, path, body)
            if found is not None:
                found.pop("usage", None)
            return found

    with served(FakeEngine(), Silent()) as url:
        visited = Visit()
        visit(connect(Client(url)), PROMPTS[:1], ["prefix"], [], TAIL, lambda _: None, visited)
    (found,) = visited.verdicts(["prefix"])
    assert (found.verdict, found.reused) == (VACUOUS, None)
    assert "does not report" in found.evidence


def test_cached_logprobs_that_are_not_numbers_are_beyond_every_noise() -> None:
    def not_numbers(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        found = llama_cpp(engine, path, body)
        if found is not None and body.get("cache_prompt") and found["timings"]["cache_n"] > 4:
            found["completion_probabilities"][0]["top_logprobs"][0]["logprob"] = None
        return found

    with served(FakeEngine(), not_numbers) as url:
        visited = Visit()
        visit(connect(Client(url)), PROMPTS[:1], ["prefix"], [], TAIL, lambda _: None, visited)
    (found,) = visited.verdicts(["prefix"])
    assert (found.verdict, found.ratio) == (BEYOND, float("inf"))
