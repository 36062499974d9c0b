"""SGLang's server, of today and of before `extra_key`: answers as 0.5.23 gave them on a CPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from cli_probe import Ran, refused
from fake_engine import FakeEngine, Sglang, V, served
from fault_proxy import FAULTS, FaultProxy, proxied
from kvtool.core.servers import sglang
from kvtool.core.servers.client import Client
from kvtool.core.servers.engines import connect
from kvtool.core.servers.session import Visit, visit
from kvtool.core.servers.verdict import BEYOND
from small_models import answer

HOW = [(False,), (False,), (True, "a"), (True, "a"), (True, "b")]  # requests that share a prefix


def asked(kv: Callable[..., Ran], url: str) -> str:
    given = ("--server", url, "--tokens", "8", "--scenarios", "prefix")
    return refused(kv(*given, command="verify-cache"))


def test_an_older_sglang_that_is_serving_others_keeps_its_cache_and_is_given_up(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang, "PAUSE", 0.0)
    with served(FakeEngine(), Sglang(old=True, unready=10**9)) as url:
        said = asked(kv, url)
    why = "did not drop its cache, since it is serving other requests"
    assert said == f"{url}: {why}. Ask while nobody else uses the server."


def test_an_older_sglang_that_needs_a_moment_to_drop_its_cache_gets_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sglang, "PAUSE", 0.0)
    engine = FakeEngine()
    with served(engine, Sglang(old=True, unready=3)) as url:
        found = connect(Client(url))
        first, second = (found.complete([1, 2, 3, 4, 5, 6]) for _ in range(2))
    assert first.reused == second.reused == 0 and engine.flushed == 1


def test_the_cache_of_a_newer_sglang_is_left_to_others() -> None:
    engine = FakeEngine()
    with served(engine, Sglang()) as url:
        found = connect(Client(url))
        reused = [found.complete([1, 2, 3, 4, 5, 6], 1, *how).reused for how in HOW]
    assert reused == [0, 0, 0, 5, 0] and engine.flushed == 0
    paths = [path for path, *_ in engine.seen]
    assert paths.count("/generate") == len(HOW) and "/get_model_info" not in paths


def test_a_server_without_a_cache_is_told_at_once(kv: Callable[..., Ran]) -> None:
    engine = FakeEngine()
    with served(engine, Sglang(disable_radix_cache=True)) as url:
        said = asked(kv, url)
    why = "was started with --disable-radix-cache, so it has no cache to judge"
    assert said == f"{url}: {why}. Start it without."
    assert all(path != "/generate" for path, *_ in engine.seen)


@pytest.mark.parametrize(
    ("sizes", "context", "chunk"),
    [
        ({"max_req_input_len": 8186, "max_total_num_tokens": 20000}, 8186, 4096),
        ({"max_req_input_len": None, "max_total_num_tokens": 500}, 500, 4096),
        ({"max_req_input_len": "x", "chunked_prefill_size": -1}, 0, 0),
    ],
)
def test_sglang_tells_its_sizes(sizes: dict[str, Any], context: int, chunk: int) -> None:
    with served(FakeEngine(), Sglang(**{"chunked_prefill_size": 4096, **sizes})) as url:
        found = connect(Client(url))
    assert (found.name, found.context, found.chunk) == ("sglang", context, chunk)


@pytest.mark.parametrize("answer", [{"HTTP": 401}, {"HTTP": 404}, {"HTTP": 500}, "words", None])
def test_sglang_that_does_not_tell_its_settings_is_asked_without_them(answer: Any) -> None:
    right = Sglang()

    def silent(engine: FakeEngine, path: str, body: dict[str, Any]) -> Any:
        settings = dict(answer) if isinstance(answer, dict) else answer
        return settings if "server_info" in path else right(engine, path, body)

    with served(FakeEngine(), silent) as url:
        found = connect(Client(url))
        assert found.complete([1, 2, 3]).reused == 0
    assert (found.name, found.context, found.chunk, found.no_cache) == ("sglang", 0, 0, "")


@pytest.mark.parametrize("old", [False, True])
def test_a_dry_run_prints_the_requests_that_are_sent_first(
    kv: Callable[..., Ran], old: bool
) -> None:
    engine = FakeEngine()
    given = ("--tokens", "8", "--scenarios", "prefix")
    with served(engine, Sglang(old)) as url:
        told = answer(kv("--server", url, *given, "--dry-run", "--json", command="verify-cache"))
        engine.seen.clear()
        assert kv("--server", url, *given, command="verify-cache").code == 0
    (path, body), *others = [(path, body) for path, body, _ in engine.seen if body]
    first, *rest = told["requests"]
    assert (first["path"], first["body"]) == (path, body) and "prompt" in body
    assert len(rest) == len(others) or old  # which is found to need the cache dropped


def test_a_fault_before_sglang_is_found() -> None:
    prompts = [[random.Random(n).randrange(V) for _ in range(24)] for n in range(3)]
    with (
        served(FakeEngine(), Sglang()) as url,
        proxied(FaultProxy(url, FAULTS["a token missing"])) as address,
    ):
        found = Visit()
        visit(connect(Client(address)), prompts, ["prefix"], [], 10, lambda _: None, found)
    (prefix,) = found.verdicts(["prefix"])
    assert prefix.verdict == BEYOND
