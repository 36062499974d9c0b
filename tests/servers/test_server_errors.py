"""What people with servers meet: each is one line that says what to do, and exit code 2."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cli_probe import Ran, refused
from fake_engine import FakeEngine, Sglang, Vllm, llama_cpp, served
from kvtool.core.servers.client import N_TRIES, Client
from kvtool.core.servers.engines import connect
from kvtool.core.servers.texts import Prompt
from kvtool.errors import ServerError

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def asked(kv: Callable[..., Ran], url: str, *args: str) -> str:
    given = ("--server", url, "--tokens", "8", "--scenarios", "prefix", *args)
    return refused(kv(*given, command="verify-cache"))


@contextmanager
def raw(*answers: bytes, endless: bytes = b"") -> Iterator[str]:
    """A server that answers with these bytes, one request each, the last again and again."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def answer() -> None:
        left = list(answers)
        while not over.is_set():
            try:
                link, _ = listener.accept()
            except OSError:
                return
            with link:
                link.recv(65536)
                link.sendall(left.pop(0) if len(left) > 1 else left[0])
                try:
                    while endless and not over.wait(0.02):
                        link.sendall(endless)
                except OSError:
                    pass

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def http(body: bytes, head: bytes = ANSWER, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return head + b"Content-Length: %d\r\n\r\n" % size + body


def test_a_server_that_is_not_there(kv: Callable[..., Ran]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    said = asked(kv, f"http://127.0.0.1:{port}")
    why = "cannot be reached (Connection refused)"
    assert said == f"http://127.0.0.1:{port}: {why}. Is the server running?"


def test_a_timeout_longer_than_a_day_is_refused(kv: Callable[..., Ran]) -> None:
    said = asked(kv, "http://127.0.0.1:9", "--timeout", "1e10")
    assert said.startswith("--timeout: 10000000000.0 is out of range (expected above 0 and 86400")


@pytest.mark.parametrize("answer_", [
    b"HTTP/1.1 400 Bad\r\nContent-Length: 25\r\n\r\n" + b'{"error": "key s3cret x"}',
    b"HTTP/1.1 302 Found\r\nLocation: http://a/?k=s3cret\r\nContent-Length: 0\r\n\r\n",
    b"s3cret is no status line\r\n\r\n",
])  # fmt: skip
def test_a_key_that_a_server_repeats_is_masked(
    monkeypatch: pytest.MonkeyPatch, answer_: bytes
) -> None:
    monkeypatch.setenv("KVTOOL_API_KEY", "s3cret")
    with raw(answer_) as url, pytest.raises(ServerError) as raised:
        Client(url).get("/")
    assert "s3cret" not in str(raised.value)


def test_a_key_in_the_name_of_a_model_is_masked(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTOOL_API_KEY", "s3cret")
    named = changed(lambda f: f.update(model_alias="s3cret", model_path="s3cret"), "/props")
    with served(FakeEngine(), named) as url:
        engine = connect(Client(url))
        assert engine.model == engine.identity()["model_path"] == "***"


def test_a_key_that_is_needed_or_wrong_is_asked_for_and_never_shown(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    with served(engine) as url:
        engine.status = [401]
        assert asked(kv, url) == f"{url}/props: needs a key (HTTP 401). Set KVTOOL_API_KEY."
        monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
        engine.status = [403]
        assert "s3cret" not in kv("--server", url, "--debug", command="verify-cache").err
        engine.status = [403]
        said = asked(kv, url)
        assert said == f"{url}/props: does not accept the key (HTTP 403). Set KVTOOL_API_KEY."
    assert [key for *_, key in engine.seen] == ["", "Bearer s3cret", "Bearer s3cret"]


@pytest.mark.parametrize("key", ["s3cret\nX: y", "s3crét", "s3\x00cret"])
def test_a_key_that_no_header_can_hold_is_not_shown(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr("kvtool.core.servers.client.os.environ", {"KVTOOL_API_KEY": key})
    said = asked(kv, "http://127.0.0.1:9")
    assert said == "KVTOOL_API_KEY: holds characters that no key has. Set it anew."


def test_a_limit_of_requests_is_waited_for_within_bounds() -> None:
    engine, waited = FakeEngine(), []
    with served(engine) as url:
        engine.status = [429, 503]
        assert connect(Client(url, sleep=waited.append)).name == "llama.cpp"
        engine.status = [429] * N_TRIES
        with pytest.raises(ServerError, match=r"is busy, or limits requests \(HTTP 429, 4 tries\)"):
            Client(url, sleep=waited.append).get("/props")
    assert waited == [0.5, 1.0, 0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("after", "seconds"), [("3", 3.0), ("12", 9.0), ("86400", 9.0), ("soon", 0.5)]
)
def test_the_server_says_how_long_to_wait(after: str, seconds: float) -> None:
    head = f"HTTP/1.1 429 Too Many\r\nRetry-After: {after}\r\n".encode()
    waited: list[float] = []
    with raw(http(b"{}", head), http(b'{"a": 1}')) as url:
        assert Client(url, 9.0, sleep=waited.append).get("/") == {"a": 1}
    assert waited == [seconds]


@pytest.mark.parametrize(("bytes_", "said"), [
    (http(b"<!doctype html><p>Hi"), "/props: answers with HTML, a page for browsers"),
    (http(b'{"a": ', length=900), "its answer is cut short (6 of 900 bytes)"),
    (http(b'{"a": '), "/props: its answer is not valid JSON"),
    (http(b"[1]"), "/props: its answer is no JSON object"),
    (http(b"", b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\n"),
     "/props: redirects to http://elsewhere/ (HTTP 302), which is not followed"),
    (b"\x00\x01\x02\r\n\r\n", "cannot be reached"),
    (http(b'{"error": {"message": "out of\\u001b[31m luck"}}', b"HTTP/1.1 500 No\r\n"),
     "is no server of llama.cpp, sglang, vllm that can be recognised"),
])  # fmt: skip
def test_answers_that_are_none(kv: Callable[..., Ran], bytes_: bytes, said: str) -> None:
    with raw(bytes_) as url:
        found = asked(kv, url)
    assert said in found and "\x1b" not in found


@pytest.mark.parametrize("begun", [b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\nX-Long: "])
def test_a_heading_that_does_not_end_is_given_up(kv: Callable[..., Ran], begun: bytes) -> None:
    with raw(begun, endless=b"2") as url:
        said = asked(kv, url, "--timeout", "0.2")
    assert said == f"{url}: gave no answer within 0.2 s. Wait longer with --timeout."


def test_a_refusal_whose_words_do_not_end_is_given_up(kv: Callable[..., Ran]) -> None:
    refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 9999\r\n\r\n"
    with raw(refusal, endless=b" ") as url:
        said = asked(kv, url, "--timeout", "0.2")
    assert said.endswith("gave no answer within 0.2 s. Wait longer with --timeout.")


@pytest.mark.parametrize("endless", [b"", b" " * 10])
def test_an_answer_that_does_not_end_is_given_up(kv: Callable[..., Ran], endless: bytes) -> None:
    with raw(ANSWER + b"\r\n" + b" ", endless=endless or b"\n") as url:
        said = asked(kv, url, "--timeout", "0.2")
    assert said == f"{url}: gave no answer within 0.2 s. Wait longer with --timeout."


def test_an_answer_without_bounds_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtool.core.servers.client.MAX_ANSWER_BYTES", 2**20)
    with (
        raw(ANSWER + b"\r\n", endless=b" " * 2**18) as url,
        pytest.raises(ServerError, match="its answer is larger than 1 MiB"),
    ):
        Client(url).get("/props")


Answer = Callable[[FakeEngine, str, dict[str, Any]], dict[str, Any] | None]


def changed(change: Callable[[dict[str, Any]], object], path: str = "/completion") -> Answer:
    """llama.cpp's answers, of which one kind is changed."""

    def answer(engine: FakeEngine, asked: str, body: dict[str, Any]) -> dict[str, Any] | None:
        found = llama_cpp(engine, asked, body)
        if asked == path and found is not None:
            change(found)
        return found

    return answer


def first_top(found: dict[str, Any]) -> list[dict[str, Any]]:
    return found["completion_probabilities"][0]["top_logprobs"]


@pytest.mark.parametrize(("answer", "said"), [
    (changed(lambda f: f.pop("completion_probabilities")), "has no logprobs of token ids"),
    (changed(lambda f: f.update(completion_probabilities=[{"id": 1}])), "has no logprobs of"),
    (changed(lambda f: f.update(completion_probabilities=7)), "has no logprobs of token ids"),
    (changed(lambda f: first_top(f).__delitem__(slice(2, None))),
     "gives fewer than 5 logprobs at a token (2 found)"),
    (changed(lambda f: first_top(f)[0].update(logprob=None)), "its logprobs are no numbers (NaN)"),
    (changed(lambda f: first_top(f)[0].update(logprob=True)), "has no logprobs of token ids"),
    (changed(lambda f: first_top(f)[0].update(logprob=0.7)), "its logprobs are above 0"),
    (changed(lambda f: first_top(f)[0].update(logprob=1e308)), "its logprobs are above 0"),
    (changed(lambda f: first_top(f)[0].update(id=1.5)), "has no logprobs of token ids"),
    (changed(lambda f: first_top(f)[0].update(id=-1)), "has no logprobs of token ids"),
    (changed(lambda f: first_top(f)[0].update(id=10**30)), "has no logprobs of token ids"),
    (changed(lambda f: f.update(tokens=[-1] * 60), "/tokenize"), "did not answer with the ids of"),
    (changed(lambda f: f.update(tokens=["x"]), "/tokenize"), "did not answer with the ids of"),
    (Vllm(most=4), "gives fewer than 5 logprobs at a token (or none)"),
])  # fmt: skip
def test_an_api_that_gives_too_little(kv: Callable[..., Ran], answer: Answer, said: str) -> None:
    with served(FakeEngine(), answer) as url:
        assert said in asked(kv, url)


def test_literal_nan_in_an_answer_is_named(kv: Callable[..., Ran]) -> None:
    change = changed(lambda f: first_top(f)[0].update(logprob=float("nan")))
    with served(FakeEngine(), change) as url:
        assert "its logprobs are no numbers (NaN)" in asked(kv, url)


def test_a_model_that_is_exchanged_in_between(kv: Callable[..., Ran]) -> None:
    engine = FakeEngine()

    def later(found: dict[str, Any]) -> None:
        found["model_path"] = "b.gguf" if len(engine.seen) > 9 else "a.gguf"

    with served(engine, changed(later, "/props")) as url:
        said = asked(kv, url)
    assert "the model changed in between (model_path 'a.gguf', then 'b.gguf')" in said


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_an_engine_that_it_is_not(kv: Callable[..., Ran], name: str) -> None:
    with served(FakeEngine()) as url:
        said = asked(kv, url, "--engine", name)
    assert f"{url}: does not answer as {name} does (" in said
    assert said.endswith("Leave --engine out, or name another.")


def test_an_engine_that_nobody_knows(kv: Callable[..., Ran]) -> None:
    assert asked(kv, "http://127.0.0.1:9", "--engine", "tgi").startswith(
        "--engine: 'tgi' is unknown"
    )


@pytest.mark.parametrize("answer", [llama_cpp, Vllm(), Sglang()])
def test_a_server_without_a_tokenizer_makes_its_own_prompts(answer: Answer) -> None:
    def mute(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        return None if path == "/tokenize" else answer(engine, path, body)

    from kvtool.core.servers.prompts import LENGTHS, built_in

    with served(FakeEngine(), mute) as url:
        found = built_in(connect(Client(url)), 2)
    assert [len(ids) for ids in found] == list(LENGTHS[:2])


@pytest.mark.parametrize("flag", ["--promoted", "--against"])
def test_a_second_server_is_another_one_with_the_same_tokens(
    kv: Callable[..., Ran], flag: str
) -> None:
    other = changed(lambda f: f.update(tokens=[1, 2, 3]), "/tokenize")
    with served(FakeEngine()) as url, served(FakeEngine(), other) as second:
        given = ("--server", url, "--tokens", "8")
        for name in (url, url.replace("127.0.0.1", "localhost"), url.replace("127.0.0.1", "0")):
            same = refused(kv(*given, flag, name, command="verify-cache"))
            assert same == f"{flag}: is the same address as --server. Start a second server."
        said = refused(kv(*given, flag, second, command="verify-cache"))
    assert said == f"{flag} {second}: makes other ids of a text than {url}. Serve the same model."


def test_a_request_that_is_refused_says_why() -> None:
    body = json.dumps({"error": {"message": "the prompt exceeds the context"}}).encode()
    with (
        raw(http(body, b"HTTP/1.1 400 Bad\r\n")) as url,
        pytest.raises(ServerError, match="HTTP 400: the prompt exceeds the context"),
    ):
        Client(url).post("/completion", {})


@pytest.mark.parametrize("slots", [65, 10**9])
def test_a_server_that_claims_countless_slots_is_not_filled(
    kv: Callable[..., Ran], slots: int
) -> None:
    many = changed(lambda f: f.update(total_slots=slots), "/props")
    with served(FakeEngine(), many) as url:
        ran = kv("--server", url, "--tokens", "8", "--scenarios", "evicted", "--dry-run",
                 command="verify-cache")  # fmt: skip
    assert ran.code == 0
    assert ran.out.count("POST /completion") < 100


class Saltless(Vllm):
    """vLLM behind a gateway that drops what it does not know."""

    def __call__(self, engine: FakeEngine, path: str, body: dict[str, Any]) -> Any:
        return super().__call__(engine, path, {**body, "cache_salt": ""})


def drops_cache_prompt(engine: FakeEngine, path: str, body: dict[str, Any]) -> Any:
    return llama_cpp(engine, path, {**body, "cache_prompt": True})


@pytest.mark.parametrize(("answer", "told"), [
    (drops_cache_prompt, "cache_prompt"), (Saltless(), "cache_salt"),
])  # fmt: skip
def test_a_request_without_the_cache_that_used_it_is_no_reference(
    kv: Callable[..., Ran], answer: Answer, told: str
) -> None:
    with served(FakeEngine(), answer) as url:
        said = asked(kv, url)
    assert " tokens from its cache when asked not to. " in said
    assert said.endswith(f"Is a gateway in between that drops {told}?")


def test_a_first_token_that_is_always_kept_is_no_reuse() -> None:
    one = changed(lambda f: f["timings"].update(cache_n=max(1, f["timings"]["cache_n"])))
    with served(FakeEngine(), one) as url:
        prompt = Prompt(connect(Client(url)), 0, [*range(1, 16)], 8)
    assert len(prompt.cold.answers) == 9


@pytest.mark.parametrize("change", [
    lambda f: f.pop("completion_probabilities"),
    lambda f: f.update(completion_probabilities=None),
    lambda f: f.update(completion_probabilities=[]),
    lambda f: f["completion_probabilities"][0].update(id="x"),
])  # fmt: skip
def test_an_answer_whose_logprobs_are_lost_on_the_way_is_no_answer(change: Any) -> None:
    with (
        served(FakeEngine(), changed(change)) as url,
        pytest.raises(ServerError, match="its answer has no logprobs of token ids"),
    ):
        connect(Client(url)).complete([*range(1, 16)], 2)


@pytest.mark.parametrize(("content", "tokens", "listed", "kept"), [
    ("\ufffd", [5], None, 0), ("\ufffd", [5, 6], None, 0), ("\ufffd\ufffd", [5, 6, 7], [6, 7], 0),
    ("x\ufffd", [5, 6], [5], 1), ("x", ["5", "6"], ["5", "6"], 2),
])  # fmt: skip
def test_llama_cpp_has_no_logprobs_of_what_ends_within_a_letter(
    content: str, tokens: list[Any], listed: list[Any] | None, kept: int
) -> None:
    def cut(found: dict[str, Any]) -> None:
        top = first_top(found)
        probs = [{"id": i, "top_logprobs": top} for i in listed or []]
        found.update(content=content, tokens=tokens, completion_probabilities=probs or None)

    with served(FakeEngine(), changed(cut)) as url:
        assert len(connect(Client(url)).complete([*range(1, 16)], 2).tokens) == kept
