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
from typing import Any, NamedTuple

from json_server import json_server

LEAST = 8  # tokens of a prefix that are reused
Tokens = list[int]
Items = list[tuple[int, Any]]
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


class Seldom(NamedTuple):
    """A fault that shows in few answers: where its prefix has decoded tokens, in a share of the
    requests, at histories whose length is a multiple, or at the first token of an answer."""

    fault: Fault = missing
    decoded: bool = False
    share: float = 1.0
    every: int = 0
    first: bool = False


def unwritten(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    """The last token of the prefix, missing."""
    return [*ids[: n - 1], *ids[n:]]


SELDOM: dict[str, Seldom] = {  # none of them did the rule know
    "decoded tokens: one missing": Seldom(unwritten, decoded=True),
    "a quarter of the requests": Seldom(share=0.25),
    "a quarter of the requests, a stale block": Seldom(stale_block, share=0.25),
    "every 16th position": Seldom(every=16),
    "every 16th position, two tokens swapped": Seldom(swapped, every=16),
    "the first answer": Seldom(first=True),
}


class _LlamaCpp:
    """/completion of llama.cpp. prompt and salt: the fields that have a request's ids, and whose
    cache it may use."""

    prompt, salt = "prompt", ""

    def cached(self, body: dict[str, Any]) -> bool:
        """Whether a request may take from the cache."""
        return bool(body["cache_prompt"])

    def cold(self, number: int) -> dict[str, Any]:
        """What of a request changes if it must not."""
        return {"cache_prompt": False}

    def tokens(self, found: dict[str, Any]) -> Tokens:
        """The ids that an answer continues with."""
        return list(found.get("tokens", []))

    def asking(self, n: int) -> dict[str, Any]:
        """What of a request asks for so many tokens."""
        return {"n_predict": n}

    def items(self, found: dict[str, Any]) -> Items:
        """Each token of an answer, and its logprobs; none where some have none."""
        pairs = list(zip(found["tokens"], found["completion_probabilities"], strict=False))
        return pairs if all(i == found["id"] for i, found in pairs) else []

    def put(self, found: dict[str, Any], items: Items) -> None:
        """Let an answer have these tokens."""
        found["tokens"], found["completion_probabilities"] = map(list, zip(*items, strict=True))

    def mend(self, found: dict[str, Any], reused: int, temperature: float) -> None:
        """Let an answer say that so many tokens were taken from the cache, and warm it."""
        found["timings"]["cache_n"] = reused
        for token in found["completion_probabilities"]:
            for other in token["top_logprobs"]:
                other["logprob"] /= temperature


class _Salted:
    """An API that kvtool asks to share nothing by a salt of its own."""

    salt = ""

    def cached(self, body: dict[str, Any]) -> bool:
        """As _LlamaCpp.cached."""
        return "-cold-" not in body[self.salt]

    def cold(self, number: int) -> dict[str, Any]:
        """As _LlamaCpp.cold."""
        return {self.salt: f"proxy-{number}-{os.urandom(8).hex()}"}


class _VLLM(_Salted):
    """/v1/completions of vLLM."""

    prompt, salt = "prompt", "cache_salt"

    def tokens(self, found: dict[str, Any]) -> Tokens:
        """As _LlamaCpp.tokens."""
        named = found["choices"][0]["logprobs"]["tokens"]
        return [int(name.removeprefix("token_id:")) for name in named]

    def asking(self, n: int) -> dict[str, Any]:
        """As _LlamaCpp.asking."""
        return {"max_tokens": n}

    def items(self, found: dict[str, Any]) -> Items:
        """As _LlamaCpp.items."""
        told = found["choices"][0]["logprobs"]["top_logprobs"]
        return list(zip(self.tokens(found), told, strict=True))

    def put(self, found: dict[str, Any], items: Items) -> None:
        """As _LlamaCpp.put."""
        told = found["choices"][0]["logprobs"]
        told["tokens"] = [f"token_id:{i}" for i, _ in items]
        told["top_logprobs"] = [top for _, top in items]

    def mend(self, found: dict[str, Any], reused: int, temperature: float) -> None:
        """As _LlamaCpp.mend."""
        found["usage"]["prompt_tokens_details"] = {"cached_tokens": reused}
        for token in found["choices"][0]["logprobs"]["top_logprobs"]:
            for name in token:
                token[name] /= temperature


class _SGLang(_Salted):
    """/generate of SGLang."""

    prompt, salt = "input_ids", "extra_key"

    def tokens(self, found: dict[str, Any]) -> Tokens:
        """As _LlamaCpp.tokens."""
        return [token for _, token, *_ in found["meta_info"]["output_token_logprobs"]]

    def asking(self, n: int) -> dict[str, Any]:
        """As _LlamaCpp.asking."""
        return {"sampling_params": {"temperature": 0.0, "max_new_tokens": n, "ignore_eos": True}}

    def items(self, found: dict[str, Any]) -> Items:
        """As _LlamaCpp.items."""
        meta = found["meta_info"]
        pairs = zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True)
        return [(own[1], (own, top)) for own, top in pairs]

    def put(self, found: dict[str, Any], items: Items) -> None:
        """As _LlamaCpp.put."""
        meta = found["meta_info"]
        meta["output_token_logprobs"] = [own for _, (own, _) in items]
        meta["output_top_logprobs"] = [top for _, (_, top) in items]

    def mend(self, found: dict[str, Any], reused: int, temperature: float) -> None:
        """As _LlamaCpp.mend."""
        found["meta_info"]["cached_tokens"] = reused
        for token in found["meta_info"]["output_top_logprobs"]:
            for other in token:
                other[0] /= temperature


Api = _LlamaCpp | _VLLM | _SGLang
APIS: dict[str, Api] = {
    "/completion": _LlamaCpp(),
    "/v1/completions": _VLLM(),
    "/generate": _SGLang(),
}


class FaultProxy:
    """`fault`: what is planted, None nothing. `temperature`: by which cached logprobs alone are
    divided."""

    def __init__(
        self, url: str, fault: Fault | Seldom | None = None, temperature: float = 1.0
    ) -> None:
        self.url, self.temperature = url, temperature
        self.seldom = fault if isinstance(fault, Seldom) else Seldom(fault or _nothing)
        self.kept: list[tuple[str, Tokens, int]] = []  # salt, tokens, how many were its prompt
        self.planted = 0  # answers that the fault has changed
        self.due = 0.5  # of a share of the requests: at 1 it is the next one's turn

    def answer(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """What the server says, or what it would say with the fault."""
        if path not in APIS or body is None:
            return self._ask(path, body)
        api = APIS[path]
        ids = body[api.prompt]
        found = self._spoiled(api, path, body) or self._ask(path, body)
        self.kept = [
            *self.kept[-1:],
            (body.get(api.salt, ""), [*ids, *api.tokens(found)], len(ids)),
        ]
        return found

    def _spoiled(self, api: Api, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer with the fault; None where it does not show."""
        ids, salt, seldom = body[api.prompt], body.get(api.salt, ""), self.seldom
        if not api.cached(body):
            return None
        same = [(k, n) for s, k, n in self.kept if s == salt]
        common = [(_common(k, ids[:-1]), k, n) for k, n in same]
        shared, kept, n_prompt = max(common, default=(0, [], 0))
        if shared < LEAST or (seldom.decoded and shared <= n_prompt):
            return None
        self.due += seldom.share
        if self.due < 1:
            return None
        self.due -= 1

        def faulty(ids: Tokens) -> Tokens:
            return seldom.fault(ids, kept, shared)

        if seldom.every or seldom.first:
            return self._at_some(api, path, body, faulty)
        changed = faulty(ids) != ids or self.temperature != 1.0
        if not changed:
            return None
        self.planted += 1
        found = self._ask(path, {**body, api.prompt: faulty(ids), **api.cold(self.planted)})
        api.mend(found, shared, self.temperature)
        return found

    def _at_some(
        self, api: Api, path: str, body: dict[str, Any], faulty: Callable[[Tokens], Tokens]
    ) -> dict[str, Any]:
        """The server's own answer, but for the tokens after some histories."""
        ids, seldom = body[api.prompt], self.seldom
        found = self._ask(path, body)
        items = api.items(found)
        n = len(items)

        def asked(ids: Tokens, n: int) -> Items:
            cold = api.cold(self.planted)
            return api.items(self._ask(path, {**body, **cold, **api.asking(n), api.prompt: ids}))

        for i in range(n):
            if i if seldom.first else (len(ids) + i) % seldom.every:
                continue
            self.planted += 1
            history = [*ids, *(token for token, _ in items[:i])]
            if not (wrong := asked(faulty(history), 1)):
                continue
            same, left = wrong[0][0] == items[i][0], n - i - 1
            rest = items[i + 1 :] if same or not left else asked([*history, wrong[0][0]], left)
            items = [*items[:i], *wrong, *rest]
        if items:
            api.put(found, items)
        return found

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found


FIXED = 40  # tokens of a prompt; a fault lies in the middle of them, whatever the request


class WrongEverywhere(FaultProxy):
    """A server that is wrong without its cache too, as with wrong weights or positions."""

    def answer(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """As FaultProxy.answer."""
        if path not in APIS or body is None:
            return self._ask(path, body)
        api = APIS[path]
        wrong = self.seldom.fault(body[api.prompt], [], FIXED)
        found = self._ask(path, {**body, api.prompt: wrong})
        api.mend(found, 0, self.temperature)
        return found


def _nothing(ids: Tokens, kept: Tokens, n: int) -> Tokens:
    return ids


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
