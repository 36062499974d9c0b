"""A proxy before a live llama.cpp or vLLM, whose prefix cache is wrong in a way that was planted.

It keeps what was asked last. Where a request with the cache shares a prefix with that, the server
is asked anew, and without its cache, for what a faulty cache would have held; the answer says that
the prefix was reused.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from json_server import json_server

LEAST = 8  # tokens of a prefix that are reused
Tokens = list[int]
Fault = Callable[[Tokens, Tokens, int], Tokens]  # the prompt, what was kept, how much they share


def swapped(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    """Two tokens of the prefix, in the other order."""
    i = n // 2
    return [*ids[:i], ids[i + 1], ids[i], *ids[i + 2 :]]


def replaced(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    """A token of the prefix, replaced by another of it."""
    return [*ids[: n // 2], ids[n // 3], *ids[n // 2 + 1 :]]


def missing(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    """A token of the prefix, missing."""
    return [*ids[: n // 2], *ids[n // 2 + 1 :]]


def doubled(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    """The last token of the prefix, twice."""
    return [*ids[:n], *ids[n - 1 :]]


def stale_block(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    """The first tokens of the prefix, of another prompt."""
    return [*ids[:1], *ids[5:8], *ids[4:]]


def stale_fork(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    """The token at the fork, still the other request's."""
    return [*ids[:n], kept[n], *ids[n + 1 :]] if n < min(len(kept), len(ids) - 1) else ids


def stale_suffix(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    """All behind the fork but the last token, still the other request's."""
    stale = kept[n : len(ids) - 1]
    return [*ids[:n], *stale, *ids[n + len(stale) :]]


def forgotten(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    """The first half of the prefix, lost."""
    return ids[n // 2 :]


def sixteenth(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    """The last token of the prefix, missing where its length is a multiple of 16."""
    return ids if n % 16 else [*ids[: n - 1], *ids[n:]]


TUNED: dict[str, Fault] = {
    "a token replaced": replaced,
    "a token missing": missing,
    "a token doubled": doubled,
    "a stale block": stale_block,
    "half of the prefix lost": forgotten,
}
UNSEEN: dict[str, Fault] = {  # that the rule was not tuned on
    "two tokens swapped": swapped,
    "a stale token at the fork": stale_fork,
    "another prompt's suffix": stale_suffix,
    "a token missing at multiples of 16": sixteenth,
}
FAULTS: dict[str, Fault] = {**TUNED, **UNSEEN}


class _LlamaCpp:
    """/completion of llama.cpp."""

    def cached(self, body: dict[str, Any]) -> bool:
        """Whether a request may take from the cache."""
        return bool(body["cache_prompt"])

    def cold(self, number: int) -> dict[str, Any]:
        """What of a request changes if it must not."""
        return {"cache_prompt": False}

    def tokens(self, found: dict[str, Any]) -> Tokens:
        """The ids that an answer continues with."""
        return list(found.get("tokens", []))

    def mend(self, found: dict[str, Any], reused: int, temperature: float) -> None:
        """Let an answer say that so many tokens were taken from the cache, and warm it."""
        found["timings"]["cache_n"] = reused
        for token in found["completion_probabilities"]:
            for other in token["top_logprobs"]:
                other["logprob"] /= temperature


class _VLLM:
    """/v1/completions of vLLM, with the salts by which kvtool asks it to share nothing."""

    def cached(self, body: dict[str, Any]) -> bool:
        """As _LlamaCpp.cached."""
        return "-cold-" not in body["cache_salt"]

    def cold(self, number: int) -> dict[str, Any]:
        """As _LlamaCpp.cold."""
        return {"cache_salt": f"proxy-{number}-{os.urandom(8).hex()}"}

    def tokens(self, found: dict[str, Any]) -> Tokens:
        """As _LlamaCpp.tokens."""
        named = found["choices"][0]["logprobs"]["tokens"]
        return [int(name.removeprefix("token_id:")) for name in named]

    def mend(self, found: dict[str, Any], reused: int, temperature: float) -> None:
        """As _LlamaCpp.mend."""
        found["usage"]["prompt_tokens_details"] = {"cached_tokens": reused}
        for token in found["choices"][0]["logprobs"]["top_logprobs"]:
            for name in token:
                token[name] /= temperature


APIS: dict[str, _LlamaCpp | _VLLM] = {"/completion": _LlamaCpp(), "/v1/completions": _VLLM()}


class FaultProxy:
    """`fault`: what is planted, None nothing. `temperature`: by which cached logprobs alone are
    divided."""

    def __init__(self, url: str, fault: Fault | None = None, temperature: float = 1.0) -> None:
        self.url, self.fault, self.temperature = url, fault, temperature
        self.kept: list[tuple[str, Tokens]] = []  # each with the salt that it was asked with
        self.planted = 0  # answers that the fault has changed

    def answer(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """What the server says, or what it would say with the fault."""
        if path not in APIS or body is None:
            return self._ask(path, body)
        api = APIS[path]
        ids, shared, kept, salt = body["prompt"], 0, [], body.get("cache_salt", "")
        if api.cached(body):
            same = [k for s, k in self.kept if s == salt]
            n, kept = max(((_common(k, ids[:-1]), k) for k in same), default=(0, []))
            shared = n if n >= LEAST else 0
        if not shared or (self.fault is None and self.temperature == 1.0):
            found = self._ask(path, body)
        else:
            faulty = ids if self.fault is None else self.fault(ids, kept, shared)
            self.planted += faulty != ids or self.temperature != 1.0
            found = self._ask(path, {**body, "prompt": faulty, **api.cold(self.planted)})
            api.mend(found, shared, self.temperature)
        self.kept = [*self.kept[-1:], (salt, [*ids, *api.tokens(found)])]
        return found

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found


def _common(a: Tokens, b: Tokens) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@contextmanager
def proxied(proxy: FaultProxy) -> Iterator[str]:
    """The address of a proxy on this machine, within. It asks for one thing at a time."""

    def reply(path: str, body: dict[str, Any] | None, _: Any) -> tuple[int, dict[str, Any]]:
        try:
            return 200, proxy.answer(path, body)
        except urllib.error.HTTPError as error:  # as of an address that this engine does not have
            return error.code, {}

    with json_server(reply) as address:
        yield address
