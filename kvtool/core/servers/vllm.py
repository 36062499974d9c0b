"""vLLM's server: its requests and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtool.core.servers.client import Client, Refused
from kvtool.core.servers.engine import (
    NEEDED,
    WANTED,
    Completion,
    Request,
    Salts,
    Slotless,
    completion,
    ids_in,
    number,
    pairs_in,
    too_few,
    whole,
)


class VLLM(Slotless):
    """vLLM's server, by /v1/completions."""

    name = "vllm"
    to_tell_reuse = (
        "Start vLLM with --enable-prompt-tokens-details, so that it says what it reuses."
    )
    cold_by = "cache_salt"
    to_give_more = "Let the server give more: --max-logprobs -1 of vLLM."

    def __init__(self, client: Client, models: dict[str, Any]) -> None:
        self.client = client
        first = _first(models)
        self.model, self.context = str(first.get("id", "")), whole(first.get("max_model_len"))
        self.slots, self.chunk = 0, 2048  # max_num_batched_tokens is not told, and by default this
        self._salts = Salts()
        self._n_wanted = 0

    def identity(self) -> dict[str, str]:
        """As Engine.identity."""
        first = _first(self.client.get("/v1/models"))
        return {
            key: self.client.masked(str(first.get(key, "")))
            for key in ("id", "root", "max_model_len")
        }

    def requests(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> list[Request]:
        """As Engine.requests. Without the cache, a salt of its own shares nothing."""
        body = {
            "model": self.model, "prompt": list(ids), "max_tokens": n, "temperature": 0.0,
            "return_tokens_as_token_ids": True, "ignore_eos": True,
            "cache_salt": self._salts.of(cached, salt),
            "logprobs": self._n_wanted or WANTED,
        }  # fmt: skip
        return [("/v1/completions", body)]

    def complete(
        self,
        ids: Sequence[int],
        n: int = 1,
        cached: bool = False,
        salt: str = "",
        slot: int | None = None,
    ) -> Completion:
        """As Engine.complete."""
        ((_, body),) = self.requests(ids, n, cached, salt, slot)
        answer = self._with_logprobs(body)
        choices = answer.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        choice = first.get("logprobs") if isinstance(first, dict) else None
        found = pairs_in(choice, "tokens", "top_logprobs")
        usage = answer.get("usage")
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        reused = details.get("cached_tokens") if isinstance(details, dict) else None
        return completion(self, len(ids), n, found, lambda t: _named(t[0]), _of_vllm, reused)

    def _with_logprobs(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer with as many logprobs as the server allows, found at the first request."""
        allowed = [self._n_wanted] if self._n_wanted else [WANTED, 20, NEEDED]
        for n in allowed:
            try:
                answer = self.client.post("/v1/completions", {**body, "logprobs": n})
            except Refused as error:
                if error.code != 400 or "logprob" not in error.message.lower():
                    raise
                continue
            self._n_wanted = n
            return answer
        raise too_few(self)

    def tokenize(self, text: str) -> list[int]:
        """As Engine.tokenize."""
        return ids_in(self, self.client.post(*self.tokenize_request(text)))

    def tokenize_request(self, text: str) -> Request:
        """As Engine.tokenize_request."""
        return "/tokenize", {"model": self.model, "prompt": text}


def _first(models: dict[str, Any]) -> dict[str, Any]:
    """The model that a server names first."""
    found = models.get("data")
    return found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}


def _of_vllm(token: Any) -> dict[int, float]:
    return {_named(name): number(value) for name, value in token[1].items()}


def _named(name: str) -> int:
    """The id of vLLM's token_id:123."""
    return int(name.removeprefix("token_id:"))
