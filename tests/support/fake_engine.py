"""A server that speaks as llama.cpp, vLLM or SGLang do, over a model and a cache of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from json_server import json_server
from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.decoding.engine import advance
from kvtool.core.native import arrays as native
from small_models import random_model

V, CONTEXT = 61, 160
Fault = Callable[[list[int]], list[int]]  # what the cache holds in place of a kept prefix

FAULTS: dict[str, Fault] = {
    "a token replaced": lambda ids: [*ids[:-1], (ids[-1] + 1) % V],
    "a token missing": lambda ids: [*ids[:2], *ids[3:]],
    "a token doubled": lambda ids: [*ids[:3], *ids[2:]],
    "a stale block": lambda ids: [*[7] * min(4, len(ids)), *ids[4:]],
    "half of the prefix lost": lambda ids: ids[len(ids) // 2 :],
}


class FakeEngine:
    """Continues token ids greedily. What it kept of the last requests serves the next one's
    prefix; `fault` spoils it. `status` is answered in place of the next requests, one each.

    slots: places that a request may name, which hold its text alone. memory: how many texts of
    requests that name none are kept.
    """

    def __init__(
        self, fault: Fault | None = None, top: int = 40, slots: int = 0, memory: int = 2
    ) -> None:
        self.model = random_model(0, vocab_size=V, context=CONTEXT)
        self.fault, self.top, self.kept = fault, top, [[0]]
        self.slots: list[list[int]] = [[] for _ in range(slots)]
        self.memory, self.files = memory, {}
        self.barred: set[int] = set()  # tokens that are never chosen, as the end of a text
        self.status: list[int] = []
        self.seen: list[tuple[str, dict[str, Any], str]] = []
        self.flushed = 0

    @torch.inference_mode()
    def complete(self, ids: list[int], n: int, cached: bool) -> tuple[list[Any], int]:
        """[(token, [(id, logprob), ...]), ...] and the tokens reused."""
        shared = max((_common(kept, ids[:-1]) for kept in self.kept), default=0) if cached else 0
        held = ids[:shared]
        if shared > 4 and self.fault is not None:
            held = self.fault(held)
        cache = make_cache("dynamic", CacheSpec.of(self.model.config, 1, CONTEXT))
        if held:
            advance(self.model, cache, torch.tensor([held]))
        new, found = ids[shared:], []
        for _ in range(n):
            logits = advance(self.model, cache, torch.tensor([new]), last=True)[0, -1]
            top = logits.float().log_softmax(-1).topk(min(self.top, V))
            pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            new = [next(token for token, _ in pairs if token not in self.barred)]
            found.append((new[0], pairs))
        self.kept = [*self.kept, [*ids, *(token for token, _ in found)]][-self.memory :]
        return found, shared

    def complete_in(self, slot: int, ids: list[int], n: int, cached: bool) -> tuple[list[Any], int]:
        """The same in a slot, which holds one text: as llama.cpp does, it looks for a better one
        among the others if it would keep less than half of that."""
        others, held = self.kept, self.slots[slot]
        self.kept = [held] if 2 * _common(held, ids) >= len(held) else [held, *others]
        found = self.complete(ids, n, cached)
        self.slots[slot] = self.kept[-1]
        self.kept = [*others, self.slots[slot]][-self.memory :]
        return found

    def file_slot(self, slot: int, action: str, name: str) -> int:
        """Keep a slot's text under a name, or take it from there: how many tokens."""
        if action == "save":
            self.files[name] = list(self.slots[slot])
        else:
            self.slots[slot] = list(self.files[name])
        return len(self.slots[slot])


def _common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def llama_cpp(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """The answer of llama-server."""
    if path == "/props":
        sizes = {"total_slots": len(engine.slots)} if engine.slots else {}
        return {"default_generation_settings": {"n_ctx": CONTEXT}, "model_alias": "fake", **sizes}
    if path == "/tokenize":
        return {"tokens": [ord(c) % V for c in body["content"]]}
    if path.startswith("/slots/"):
        slot, _, action = path.removeprefix("/slots/").partition("?action=")
        return {f"n_{action}d": engine.file_slot(int(slot), action, body["filename"])}
    if path != "/completion":
        return None
    asked = (body["prompt"], body["n_predict"], body["cache_prompt"])
    slot = body.get("id_slot")
    found, reused = engine.complete(*asked) if slot is None else engine.complete_in(slot, *asked)
    tops = [
        {"id": token, "top_logprobs": [{"id": i, "logprob": p} for i, p in pairs]}
        for token, pairs in found
    ]
    return {
        "content": "x", "tokens": [token for token, _ in found], "completion_probabilities": tops,
        "timings": {"cache_n": reused},
    }  # fmt: skip


class _Salted:
    """A server where requests of one salt alone share a cache."""

    def __init__(self) -> None:
        self.kept: dict[str, list[list[int]]] = {}

    def complete(
        self, engine: FakeEngine, salt: str, ids: list[int], n: int
    ) -> tuple[list[Any], int]:
        """As FakeEngine.complete."""
        engine.kept = self.kept.get(salt, [])
        found = engine.complete(ids, n, cached=True)
        self.kept[salt] = engine.kept
        return found


class Vllm(_Salted):
    """The answers of vLLM."""

    def __init__(self, most: int = 20) -> None:
        super().__init__()
        self.most = most

    def __call__(
        self, engine: FakeEngine, path: str, body: dict[str, Any]
    ) -> dict[str, Any] | None:
        if path == "/v1/models":
            return {"data": [{"id": "fake", "max_model_len": CONTEXT}]}
        if path == "/tokenize":
            return {"tokens": [ord(c) % V for c in body["prompt"]]}
        if path != "/v1/completions":
            return None
        if body["logprobs"] > self.most:
            return {"HTTP": 400, "error": {"message": f"logprobs may be at most {self.most}"}}
        asked = body["cache_salt"], body["prompt"], body["max_tokens"]
        found, reused = self.complete(engine, *asked)
        logprobs = {
            "tokens": [f"token_id:{token}" for token, _ in found],
            "top_logprobs": [
                {f"token_id:{i}": p for i, p in pairs[: body["logprobs"]]} for _, pairs in found
            ],
        }
        usage = {"prompt_tokens_details": {"cached_tokens": reused}}
        return {"choices": [{"logprobs": logprobs}], "usage": usage}


class Sglang(_Salted):
    """The answers of SGLang 0.5.23; or of 0.4, which has other paths and knows no `extra_key`.

    settings: more of what it tells of itself. unready: how often it refuses to drop its cache.
    """

    def __init__(self, old: bool = False, unready: int = 0, **settings: Any) -> None:
        super().__init__()
        self.old, self.unready = old, unready
        self.settings = {"max_req_input_len": CONTEXT, "chunked_prefill_size": 64, **settings}

    def __call__(
        self, engine: FakeEngine, path: str, body: dict[str, Any]
    ) -> dict[str, Any] | str | None:
        if path == ("/get_model_info" if self.old else "/model_info"):
            return {"model_path": "fake"}
        if path == "/server_info" and not self.old:
            return self.settings
        if path == "/flush_cache":
            self.unready -= 1
            if self.unready >= 0:
                return {"HTTP": 400}
            self.kept.clear()
            engine.flushed += 1
            return "Cache flushed.\nPlease check backend logs for more details."
        if path == "/tokenize":
            return {"tokens": [ord(c) % V for c in body["prompt"]]}
        if path != "/generate":
            return None
        salt = "" if self.old else body["extra_key"]
        n = body["sampling_params"]["max_new_tokens"]
        found, reused = self.complete(engine, salt, body["input_ids"], n)
        meta = {
            "output_token_logprobs": [[pairs[0][1], token, None] for token, pairs in found],
            "output_top_logprobs": [[[p, i, None] for i, p in pairs] for _, pairs in found],
            "cached_tokens": reused,
        }
        return {"meta_info": meta}


@contextmanager
def served(engine: FakeEngine, answer: Any = llama_cpp) -> Iterator[str]:
    """The address of a server that answers as told, on this machine, within."""

    def reply(path: str, body: Any, headers: Mapping[str, str]) -> tuple[int, Any]:
        body = body or {}
        engine.seen.append((path, body, headers.get("Authorization", "")))
        status = engine.status.pop(0) if engine.status else 200
        found = answer(engine, path, body) if status == 200 else {"error": "busy"}
        if found is None:
            return 404, {}
        return found.pop("HTTP", status) if isinstance(found, dict) else status, found

    # On a busy machine it takes longer to compile this than a client waits for an answer.
    native.layer_code(torch.float32)
    with json_server(reply) as address:
        yield address
