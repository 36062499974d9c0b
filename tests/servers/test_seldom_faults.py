"""Faults that show in few answers are found: in decoded tokens, at positions, in some requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from fake_engine import FAULTS, FakeEngine, V, Vllm, llama_cpp, served
from fault_proxy import SELDOM, FaultProxy, _LlamaCpp
from kvtool.commands.verify.server_report import VisitReport
from kvtool.core.servers.arms import common
from kvtool.core.servers.client import Client
from kvtool.core.servers.engines import connect
from kvtool.core.servers.session import Visit, visit
from kvtool.core.servers.verdict import (
    BEYOND,
    CONTRARY,
    HIDDEN,
    IDENTICAL,
    NOT_REACHED,
    WITHIN,
    ArmVerdict,
)  # fmt: skip

TAIL = 16
DRAWS = random.Random(3)
PROMPTS = [[DRAWS.randrange(V) for _ in range(n)] for n in (28, 20, 26)]
RIGHT = (WITHIN, IDENTICAL)


class Seldom(FakeEngine):
    """Wrong only where its prefix has decoded tokens, in one of `every` requests with the cache, or
    after histories of some lengths."""

    def __init__(
        self, decoded: bool = False, every: int = 1, at: Callable[[int], bool] | None = None
    ) -> None:
        super().__init__(slots=2)
        self.decoded, self.every, self.at = decoded, every, at
        self.prompts: dict[tuple[int, ...], int] = {}
        self.n_cached = 0

    def complete(self, ids: list[int], n: int, cached: bool) -> tuple[list[Any], int]:
        lost = FAULTS["half of the prefix lost"]
        reach = [(common(k, ids[:-1]), self.prompts.get(tuple(k), 0)) for k in self.kept]
        shared, n_prompt = max(reach, default=(0, 0))
        wrong = cached and shared > 4 and (not self.decoded or shared > n_prompt)
        self.n_cached += wrong
        wrong = wrong and self.n_cached % self.every == 0
        self.fault = lost if wrong and self.at is None else None
        found, reused = super().complete(ids, n, cached)
        self.prompts[tuple(self.kept[-1])] = len(ids)
        if wrong and self.at is not None:
            kept, history = self.kept, list(ids)
            for i, (token, _) in enumerate(found):
                if self.at(len(history)):
                    ((_, pairs),), _ = super().complete(lost(history), 1, False)
                    found[i] = (token, pairs)
                history.append(token)
            self.kept = kept
        return found, reused


def asked(engine: FakeEngine, *arms: str, answer: Any = llama_cpp) -> dict[str, ArmVerdict]:
    with served(engine, answer) as url:
        found = Visit()
        visit(connect(Client(url)), PROMPTS, arms, [], TAIL, lambda _: None, found)
    return {verdict.arm: verdict for verdict in found.verdicts(arms)}


def test_only_the_next_turn_of_a_chat_sees_a_fault_in_decoded_tokens() -> None:
    found = asked(Seldom(decoded=True), "prefix", "turns", "evicted")
    assert found["prefix"].verdict in RIGHT
    assert found["turns"].verdict == BEYOND and found["turns"].ratio is not None
    assert found["turns"].ratio > 100
    assert found["turns"].reached == found["turns"].requests == 2 * len(PROMPTS)
    assert (found["turns"].reused or 0) > max(map(len, PROMPTS)) + TAIL // 2


def test_a_server_that_reuses_no_decoded_tokens_does_not_reach_the_next_turn() -> None:
    class Prompts(Seldom):
        def complete(self, ids: list[int], n: int, cached: bool) -> tuple[list[Any], int]:
            self.kept = [k[: self.prompts.get(tuple(k), len(k))] for k in self.kept]
            return super().complete(ids, n, cached)

    engine = Prompts(every=10**6)
    found = asked(engine, "prefix", "turns")
    assert found["prefix"].verdict in RIGHT
    assert (found["turns"].verdict, found["turns"].right) == (NOT_REACHED, False)
    assert found["turns"].evidence == "no request reused the 32 tokens that it takes"


def test_a_fault_in_few_requests_is_found() -> None:
    found = asked(Seldom(every=5), "prefix")["prefix"]
    assert found.ratio is not None and found.ratio < 1
    assert found.verdict == BEYOND and found.evidence == "in 1 of 6 requests"
    assert (found.tail or 0) > 100


def test_a_fault_at_single_positions_is_found() -> None:
    found = asked(Seldom(at=lambda n: n % 8 == 0), "prefix")["prefix"]
    assert found.ratio is not None and found.ratio < 1 and (found.worst or 0) < 1
    assert found.verdict == BEYOND and " positions" in found.evidence
    assert found.first_beyond is not None and found.first_beyond % 8 == 0


def third(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """llama.cpp that with the cache chooses a token which its logprobs do not."""
    found = llama_cpp(engine, path, body)
    if path == "/completion" and found and body["cache_prompt"] and found["timings"]["cache_n"] > 4:
        token = found["completion_probabilities"][-1]
        token["id"] = found["tokens"][-1] = token["top_logprobs"][2]["id"]
    return found


def test_a_token_that_its_own_logprobs_contradict_is_said() -> None:
    found = asked(FakeEngine(slots=2), "prefix", answer=third)["prefix"]
    assert (found.verdict, found.right) == (CONTRARY, False)
    assert "are not the likeliest by their own logprobs" in found.evidence
    assert VisitReport([found]).exit_code == 1
    assert VisitReport([found]).conclusion.startswith("prefix: contradicts itself, ")


def test_the_end_of_a_text_that_is_ignored_contradicts_nothing() -> None:
    engine = FakeEngine(slots=2)
    asked(engine, "prefix")
    likely = [token for kept in engine.slots for token in kept[-TAIL:]]
    engine.barred = {max(set(likely), key=likely.count)}
    found = asked(engine, "prefix")["prefix"]
    assert found.verdict in RIGHT


def test_a_server_that_samples_is_not_judged_by_its_cache() -> None:
    def sampling(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        found = llama_cpp(engine, path, body)
        for token in (found or {}).get("completion_probabilities", [])[-1:]:
            token["id"] = (found or {})["tokens"][-1] = token["top_logprobs"][2]["id"]
        return found

    found = asked(FakeEngine(), "prefix", answer=sampling)["prefix"]
    assert found.verdict == HIDDEN and "does it sample" in found.evidence


def test_answers_that_are_cut_short_do_not_pass_as_right() -> None:
    def cut(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        found = llama_cpp(engine, path, body)
        if found is not None and body.get("cache_prompt") and found["timings"]["cache_n"] > 4:
            for name in ("tokens", "completion_probabilities"):
                found[name] = found[name][:1]
        return found

    found = asked(FakeEngine(slots=2), "prefix", answer=cut)["prefix"]
    assert (found.verdict, found.right) == (HIDDEN, False)
    assert "answers were cut short, by " in found.evidence


def test_answers_without_a_cache_that_are_cut_short_are_said() -> None:
    def cut(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        return llama_cpp(engine, path, {**body, "n_predict": min(body.get("n_predict", 0), 12)})

    with served(FakeEngine(slots=2), cut) as url:
        found = Visit()
        visit(connect(Client(url)), PROMPTS, ["prefix"], [], TAIL, lambda _: None, found)
    n, of = found.cut
    assert 0 < n < of
    said = VisitReport(found.verdicts(["prefix"]), cut=found.cut).conclusion
    assert f"{n} of {of} answers without a cache are shorter than was asked for" in said


@pytest.mark.parametrize("most", [1, 11])
def test_next_to_nothing_reused_is_no_evidence(most: int) -> None:
    class Little(FakeEngine):
        def complete(self, ids: list[int], n: int, cached: bool) -> tuple[list[Any], int]:
            self.kept = [kept[:most] for kept in self.kept]
            return super().complete(ids, n, cached)

    found = asked(Little(slots=2), "prefix")["prefix"]
    assert (found.verdict, found.reused, found.reached) == (NOT_REACHED, most, 0)
    assert found.evidence == "no request reused the 14 tokens that it takes"
    report = VisitReport([found])
    assert report.exit_code == 1
    assert report.conclusion == "prefix: not reached, no request reused the 14 tokens that it takes"


def test_blocks_of_16_reach_the_next_turn_of_vllm() -> None:
    class Blocks(Vllm):
        def __call__(
            self, engine: FakeEngine, path: str, body: dict[str, Any]
        ) -> dict[str, Any] | None:
            found = super().__call__(engine, path, body)
            for texts in self.kept.values():
                texts[:] = [text[: (len(text) - 1) // 16 * 16] for text in texts]
            return found

    found = asked(FakeEngine(), "turns", answer=Blocks())["turns"]
    assert found.verdict in RIGHT and (found.reached or 0) * 2 >= found.requests


def test_a_fault_of_a_quarter_of_the_requests_is_planted_in_every_fourth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drawn by chance it can miss every request: a trial that proves nothing, counted as a miss."""
    proxy, prompt = FaultProxy("", SELDOM["a quarter of the requests"]), [*range(12)]
    monkeypatch.setattr(proxy, "_ask", lambda path, body: {"tokens": [], "tokens_cached": 0})
    monkeypatch.setattr(_LlamaCpp, "mend", lambda *_: None)
    planted = []
    for _ in range(9):
        proxy.answer("/completion", {"prompt": prompt, "cache_prompt": True})
        planted.append(proxy.planted)
    assert planted == [0, 0, 1, 1, 1, 1, 2, 2, 2]  # the first finds nothing kept
