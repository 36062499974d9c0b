"""kvtool verify-cache --server: what is said, what is written, and how it ends."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli_probe import HANGS, Ran, refused
from fake_engine import FAULTS, FakeEngine, Sglang, Vllm, llama_cpp, served
from kvtool.commands.verify.server_report import VisitReport, times
from kvtool.core.servers.verdict import BEYOND, BUG, ArmVerdict
from small_models import answer

FEW = ("--tokens", "8", "--scenarios", "prefix", "fork")
LINES = f'{[*range(1, 16)]}\n"a text that is long enough, and longer"\n'


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text(LINES)
    return str(path)


@pytest.fixture
def right() -> Iterator[str]:
    with served(FakeEngine()) as url:
        yield url


@pytest.fixture
def wrong() -> Iterator[str]:
    with served(FakeEngine(FAULTS["half of the prefix lost"])) as url:
        yield url


def ask(kv: Callable[..., Ran], *args: str) -> Ran:
    return kv(*args, *FEW, command="verify-cache")


def test_a_right_server_is_within_its_own_noise(
    kv: Callable[..., Ran], right: str, prompts: str, tmp_path: Path
) -> None:
    files = ("--output", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png"))
    ran = ask(kv, "--server", right, "--prompts", prompts, *files)
    assert ran.code == 0
    assert "✓ prefix: within the engine's own noise, at most 0." in ran.out
    assert max(map(len, ran.out.splitlines()[:6])) <= 80
    assert (tmp_path / "a.png").stat().st_size > 10_000
    rows = (tmp_path / "a.csv").read_text()
    assert rows.count("within noise") + rows.count("identical,") == 2


def test_a_wrong_server_is_beyond_it_and_the_next_step_is_said(
    kv: Callable[..., Ran], wrong: str, prompts: str, tmp_path: Path
) -> None:
    page = tmp_path / "a.html"
    ran = ask(kv, "--server", wrong, "--prompts", prompts, "--output", str(page))
    assert ran.code == 1
    assert page.read_text().count("<svg") == 1
    assert "✗ beyond the engine's own noise in prefix, fork: " in ran.out
    assert " of a wrong token), up to " in ran.out
    assert "from token " in ran.out
    assert "kvtool promote MODEL.gguf" in ran.err and "--promoted URL" in ran.err


def test_the_document_has_every_gap_and_no_key(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, right: str, prompts: str
) -> None:
    monkeypatch.setenv("KVTOOL_API_KEY", "s3cret")
    ran = ask(kv, "--server", right, "--prompts", prompts, "--json")
    found = answer(ran)
    assert found["schema"] == "kvtool.verify-cache.server/1"
    assert [arm["arm"] for arm in found["arms"]] == ["prefix", "fork"]
    assert all(arm["right"] and arm["gaps"] and arm["reused"] for arm in found["arms"])
    assert found["resolved"]["prompt_tokens"] == [15, 38]
    assert found["requests_sent"] > 20
    assert "s3cret" not in ran.out + ran.err


def rounded(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """llama.cpp with noise: each shape of a request rounds in its own way."""
    found = llama_cpp(engine, path, body)
    for n, token in enumerate((found or {}).get("completion_probabilities", [])):
        draws = random.Random(len(body["prompt"]) * 1000 + n)
        for other in token["top_logprobs"]:
            other["logprob"] += draws.gauss(0, 1e-3)
    return found


@pytest.mark.parametrize(("plain", "promoted", "verdict", "code"), [
    ("right", "right", "rounding", 0), ("right", "wrong", "bug", 1), ("wrong", "wrong", "bug", 1),
    ("wrong", "right", "beyond the engine's own noise", 1),
])  # fmt: skip
def test_a_promoted_server_tells_a_bug_from_rounding(
    kv: Callable[..., Ran], prompts: str, plain: str, promoted: str, verdict: str, code: int
) -> None:
    faults = {"right": None, "wrong": FAULTS["half of the prefix lost"]}
    with (
        served(FakeEngine(faults[plain]), rounded) as url,
        served(FakeEngine(faults[promoted])) as second,
    ):
        urls = ("--server", url, "--promoted", second)
        found = answer(ask(kv, *urls, "--prompts", prompts, "--json"), code)
    assert len({arm["verdict"] for arm in found["arms"]} - {"identical"}) == 1
    assert verdict in found["conclusion"]
    if (plain, promoted) == ("wrong", "right"):  # what it accuses has the plain server's figures
        worst = max(found["arms"], key=lambda arm: arm["worst"])
        assert f"up to {times(worst['worst'])} times in a request" in found["conclusion"]
        assert " times the noise in F32" in found["conclusion"]


def test_a_promoted_server_with_as_much_noise_decides_nothing(
    kv: Callable[..., Ran], right: str, prompts: str
) -> None:
    with served(FakeEngine()) as second:
        ran = ask(kv, "--server", right, "--promoted", second, "--prompts", prompts)
    assert ran.code == 1
    assert "cannot tell, the promoted server is as noisy: is it F32?" in ran.out
    assert "--prompts: 2 prompts; a verdict of fewer than 5 is less sure" in ran.err


def test_two_servers_are_compared_with_and_without_their_caches(
    kv: Callable[..., Ran], right: str, wrong: str, prompts: str
) -> None:
    given = ("--server", right, "--against", wrong, "--prompts", prompts, "--tokens", "8")
    found = answer(kv(*given, "--json", command="verify-cache"), 1)
    cold, cached = found["comparisons"]
    assert (cold["verdict"], cold["flips"]) == ("identical", 0)
    assert cached["verdict"] == "apart" and cached["kl"] > 1e-4 and cached["ratio"] > 100
    lossy = answer(kv(*given, "--json", "--lossy", command="verify-cache"))
    assert lossy["comparisons"][1]["verdict"] == "lossy, as configured"
    assert "lossy, as configured" in lossy["conclusion"]


def test_a_dry_run_prints_the_requests_and_sends_none(kv: Callable[..., Ran], prompts: str) -> None:
    engine = FakeEngine()
    with served(engine) as url:
        ran = ask(kv, "--server", url, "--prompts", prompts, "--dry-run")
        told = answer(ask(kv, "--server", url, "--prompts", prompts, "--dry-run", "--json"))
    assert ran.code == 0
    assert [path for path, _, _ in engine.seen] == ["/props"] * 2
    assert '# prefix, prompt 1\nPOST /completion {"prompt": [1, 2, 3, ' in ran.out
    said = "none of which was sent, and 3 that identify the server (llama.cpp), of which 1 sent now"
    assert said in " ".join(ran.out.split())
    assert len(told["requests"]) > 20
    assert {request["path"] for request in told["requests"]} == {"/tokenize", "/completion"}


@pytest.mark.parametrize("flag", ["", "--promoted", "--against"])
def test_a_dry_run_names_as_many_requests_as_are_sent(
    kv: Callable[..., Ran], right: str, prompts: str, flag: str
) -> None:
    with served(FakeEngine()) as second:
        more = (flag, second) if flag else ()
        arms = () if flag == "--against" else FEW[2:]
        given = ("--server", right, *more, "--prompts", prompts, "--json", *FEW[:2], *arms)
        told = answer(kv(*given, "--dry-run", command="verify-cache"))
        ran = kv(*given, command="verify-cache")
    planned = [len(one["requests"]) + one["n_identifying"] for one in (told, *told["second"])]
    assert len(planned) == 1 + bool(flag)
    assert json.loads(ran.out)["requests_sent"] == sum(planned)


def test_requests_that_are_spent_end_the_visit_and_not_the_account(
    kv: Callable[..., Ran], right: str, prompts: str
) -> None:
    given = ("--server", right, "--prompts", prompts, "--requests", "21")
    ran = ask(kv, *given)
    assert ran.code == 0
    assert "all requests that --requests allows were sent" in ran.out
    assert "not run: fork" in ran.out


def test_a_server_that_fails_in_between_loses_nothing(kv: Callable[..., Ran], prompts: str) -> None:
    engine = FakeEngine()

    def failing(served_by: FakeEngine, path: str, body: dict) -> dict | None:
        failed = len(engine.seen) > 21
        return {"HTTP": 500} if failed else llama_cpp(served_by, path, body)

    with served(engine, failing) as url:
        ran = ask(kv, "--server", url, "--prompts", prompts)
    assert ran.code == 2
    assert "! prefix: " in ran.out
    assert "then the server failed: " in ran.out and "(HTTP 500)" in ran.out


def test_a_server_that_gets_busy_is_said_to_be(kv: Callable[..., Ran], prompts: str) -> None:
    engine = FakeEngine()

    def busy(served_by: FakeEngine, path: str, body: dict) -> dict | None:
        found = llama_cpp(served_by, path, body)
        again = not body.get("cache_prompt") and [b for _, b, _ in engine.seen].count(body) > 2
        for token in (found or {}).get("completion_probabilities", []) if again else []:
            for n, other in enumerate(token["top_logprobs"]):
                other["logprob"] += 1e-3 * (n % 3)
        return found

    with served(engine, busy) as url:
        ran = ask(kv, "--server", url, "--prompts", prompts)
    assert "the server is busy with others" in ran.out
    assert "Ask again while nobody else uses the server." in ran.err


def test_a_server_is_judged_without_loading_torch(prompts: str) -> None:
    code = (
        "import sys; from kvtool.app import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'matplotlib'};"
        "print('LOADED', code, sorted(heavy & sys.modules.keys()))"
    )
    with served(FakeEngine()) as url:
        words = ["verify-cache", "--server", url, "--prompts", prompts, *FEW, "--json"]
        ran = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=HANGS
        )
    assert ran.stdout.endswith("LOADED 0 []\n"), ran.stderr
    assert json.loads(ran.stdout.rpartition("LOADED")[0])["environment"]["torch"] is None


@pytest.mark.parametrize(("text", "said"), [
    ("\n\n", "has no line with a prompt"),
    ('[1, "x"]\n', 'line 1: found [1, "x"] (expected a text, or a list of ids)'),
    ("[1, 2\n", "line 1 is not valid JSON"),
    (f"[{2**31}, 1]\n", "line 1: found [2147483648, 1] (expected a text, or a list of ids)"),
    ('"\\ud800 and more"\n', "line 1: has half of a surrogate pair, which is no text"),
    ("[1, 2, 3]\n", "prompt 1 has 3 tokens (expected 12 or more)"),
    (f"{[7] * 196}\n", "prompt 1 is 196 tokens, and with 15 after it longer than the server's"),
])  # fmt: skip
def test_prompts_that_cannot_be_asked_are_refused(
    kv: Callable[..., Ran], right: str, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    assert said in refused(ask(kv, "--server", right, "--prompts", str(path)))


def test_the_scenarios_of_a_server_are_listed_without_asking_one(kv: Callable[..., Ran]) -> None:
    ran = kv("--server", "x", "--scenarios", "help", command="verify-cache")
    assert ran.code == 0 and "evicted" in ran.out and "cut" in ran.out


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_end_with_their_lines_and_are_asked_once(
    kv: Callable[..., Ran], right: str, tmp_path: Path, end: str
) -> None:
    odd = '"a text with a\u2028separator, and\x85another"'
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(end.join(["", odd, str([*range(1, 20)]), odd, odd]).encode())
    ran = ask(kv, "--server", right, "--prompts", str(path), "--json")
    assert answer(ran)["resolved"]["prompt_tokens"] == [len(odd) - 2, 19]
    assert "--prompts: left out 2 of 4 lines, which repeat others" in ran.err


@pytest.mark.parametrize(("api", "where", "key", "said"), [
    (llama_cpp, (), "timings", "Ask llama-server itself"),
    (Vllm(), (), "usage", "Start vLLM with --enable-prompt-tokens-details"),
    (Sglang(), ("meta_info",), "cached_tokens", "Ask SGLang itself"),
])  # fmt: skip
def test_a_server_that_does_not_tell_its_reuse_gets_the_advice_of_its_engine(
    kv: Callable[..., Ran], prompts: str, api: Any, where: tuple[str, ...], key: str, said: str
) -> None:
    def mute(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        found = api(engine, path, body)
        inner = found if isinstance(found, dict) else {}
        for name in where:
            inner = inner.get(name, {})
        inner.pop(key, None)
        return found

    with served(FakeEngine(), mute) as url:
        ran = ask(kv, "--server", url, "--prompts", prompts)
    assert ran.code == 1 and "does not report cached tokens" in ran.out
    assert f"hint: {said}" in ran.err


RARE = ArmVerdict(
    "prefix",
    BEYOND,
    "in 2 of 10 requests",
    ratio=0.89,
    worst=7.3,
    worst_gap=0.2,
    gap=0.1,
    fault=0.4,
)
IN_F32 = {"promoted_ratio": 0.8, "promoted_gap": 1e-6, "promoted_worst": 9.0}


@pytest.mark.parametrize(("arm", "said"), [
    (RARE, "noise in prefix (in 2 of 10 requests): up to 7.30 times it, 2.0e-01 nats (0.50 of a"),
    (replace(RARE, verdict=BUG, **IN_F32, promoted_worst_gap=1e-3),
     "a bug in prefix (in 2 of 10 requests): 9.00 times the noise in F32, 1.0e-03 nats"),
    (replace(RARE, evidence="", ratio=math.inf, worst=math.inf, gap=math.inf),
     "noise in prefix: its logprobs with the cache are not a number"),
])  # fmt: skip
def test_what_is_accused_has_the_size_of_the_requests_that_are(arm: ArmVerdict, said: str) -> None:
    assert said in VisitReport([arm]).conclusion
